"""Remembers the files a run was started with, so that one that was edited is not used in silence.

A resumed run is the same run only if its data, rewards, experiment file and chat template are the
same. Their SHA-256 digests stand in `identity.json` of the work directory.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from grpo_jax.run.workdir import WorkdirError, write_whole

IDENTITY = "identity.json"


def digests(files: Iterable[str | Path], texts: Mapping[str, str]) -> dict[str, str]:
  """Returns the SHA-256 of each file by its path as given, and of each text by its name.

  A folder counts as all the files in it.
  """
  sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
  for file in map(Path, files):
    parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
    for part in parts:
      with part.open("rb") as opened:
        sums[str(part)] = hashlib.file_digest(opened, "sha256").hexdigest()
  return sums


def read(workdir: str | Path) -> dict[str, str] | None:
  """Returns the digests a work directory was started with; None if it has none.

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
  """Writes the digests of a run, whole or not at all."""
  text = json.dumps(dict(sums), indent=2, sort_keys=True) + "\n"
  write_whole(Path(workdir) / IDENTITY, text)


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """Returns the names of files and texts that are in both and differ.

  A file that only one of them has is a change of the config, which is checked apart.
  """
  return sorted(name for name, digest in now.items() if saved.get(name, digest) != digest)
