"""Records digests of the files that a run was started with, so that edits to them are noticed.

A resumed run is the same run only if its data, rewards, experiment file and chat template are the
same. `identity.json` in the work directory holds their SHA-256 digests.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from grpo_jax.run.workdir import WorkdirError, write_whole

IDENTITY = "identity.json"


def digests(files: Iterable[str | Path], texts: Mapping[str, str]) -> dict[str, str]:
  """Computes the SHA-256 of files and texts.

  Args:
    files: paths of files, and of folders, which stand for all files in them.
    texts: further texts by name.

  Returns:
    Digest by path, as it is given here, or by name. Of a file that was downloaded from the hub, the
    path is without its commit: a later state of the same file counts as a change of it.
  """
  sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
  for file in map(Path, files):
    parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
    for part in parts:
      with part.open("rb") as content:
        sums[_name(part)] = hashlib.file_digest(content, "sha256").hexdigest()
  return sums


def _name(path: Path) -> str:
  """Returns a path; one in the cache of the hub begins with the data set, without the commit.

  Example:
    >>> _name(Path(f"/cache/hub/datasets--a--b/snapshots/{'0' * 40}/data/train.csv"))
    'datasets--a--b/data/train.csv'
  """
  match = re.search(r"([^/]+)/snapshots/[0-9a-f]{40}/(.+)", path.as_posix())
  return "/".join(match.groups()) if match else str(path)


def read(workdir: str | Path) -> dict[str, str] | None:
  """Reads the digests of the files that a run was started with; None if there are none.

  Raises:
    WorkdirError: the file is damaged.
  """
  path = Path(workdir) / IDENTITY
  if not path.is_file():
    return None
  try:
    sums = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(sums, dict) or not all(isinstance(s, str) for s in sums.values()):
      raise ValueError("it does not hold digests by name")
    return sums
  except ValueError as error:
    raise WorkdirError(
      f"{path} is damaged ({error}). Remove it; the next command takes the files as they are now"
    ) from error


def write(workdir: str | Path, sums: Mapping[str, str]) -> None:
  """Writes the digests of a run atomically."""
  text = json.dumps(dict(sums), indent=2, sort_keys=True) + "\n"
  write_whole(Path(workdir) / IDENTITY, text)


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """Returns the names of files and texts that both hold with different digests, sorted.

  A name that only one of them holds is a change of the config, which is checked elsewhere.

  Example:
    >>> changed({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    ['b']
  """
  return sorted(name for name, digest in now.items() if saved.get(name, digest) != digest)
