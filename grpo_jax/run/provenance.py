"""Says what a run was made of: commits and changes of its code, its data, the machines."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from grpo_jax.distributed import hosts

DIFFS = "diffs"  # folder of a work directory that holds changes of the code since its commit
GIT_SECONDS = 5  # time limit in seconds for asking git
DIFF_BYTES = 2**20  # largest change of the code that is kept
UNTRACKED = 50  # names of files without a commit that are kept
PROBLEMS = 1000  # of a split whose contents make its digest
PACKAGE = Path(__file__).parents[1]


def code(folder: str | Path, workdir: str | Path | None = None) -> dict[str, Any]:
  """Describes the code of a run: its own repository, and the package's if that is another one.

  Args:
    folder: a folder of the code of the run.
    workdir: gets the changes since the commits, as `diffs/DIGEST.patch`; None keeps none.

  Returns:
    {"git": of the folder, "git_package": of this package, where its files are in another
    repository}; None for a folder without a repository, a commit or git. See `repository`.
  """
  own = repository(folder, workdir)
  package = repository(PACKAGE, workdir) if _is_tracked(PACKAGE / "__init__.py") else None
  states: dict[str, Any] = {"git": own}
  if package and (own is None or own["folder"] != package["folder"]):
    states["git_package"] = package
  return states


def repository(folder: str | Path, workdir: str | Path | None = None) -> dict[str, Any] | None:
  """Describes the git repository around a folder.

  Args:
    folder: any folder in it.
    workdir: gets the changes of its files since the commit, if there are any; `git apply` puts them
      back. Changes of more than `DIFF_BYTES` are not kept.

  Returns:
    {"folder": its root, "commit": hash, "changed": bool}, and if there are any: "untracked", names
    of files that git does not know; "diff", the file of the changes in `workdir`; "diff_bytes",
    their size. None if there is no repository, no commit or no git.
  """
  try:
    root = _git(folder, "rev-parse", "--show-toplevel").decode().strip()
    commit = _git(folder, "rev-parse", "HEAD").decode().strip()
    lines = _git(root, "status", "--porcelain", "-z").decode(errors="replace").split("\0")
  except (OSError, ValueError, subprocess.SubprocessError):
    return None
  untracked = [line[3:] for line in lines if line.startswith("??")]
  changed = any(line and not line.startswith("??") for line in lines)
  state: dict[str, Any] = {"folder": root, "commit": commit, "changed": changed}
  if untracked:
    state["untracked"] = untracked[:UNTRACKED]
  if changed and workdir is not None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      patch = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
      state["diff_bytes"] = len(patch)
      if len(patch) <= DIFF_BYTES:
        state["diff"] = _keep(Path(workdir), patch)
  return state


def _keep(workdir: Path, patch: bytes) -> str:
  """Writes a patch into a work directory and returns its name there; equal ones are one file."""
  name = f"{DIFFS}/{hashlib.sha256(patch).hexdigest()[:12]}.patch"
  path = workdir / name
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".part")
  partial.write_bytes(patch)  # as it is: the files in it may have any encoding
  os.replace(partial, path)
  return name


def _is_tracked(path: Path) -> bool:
  """Tells whether git knows a file; an installed package lies in a repository without being one."""
  try:
    _git(path.parent, "ls-files", "--error-unmatch", path.name)
    return True
  except (OSError, ValueError, subprocess.SubprocessError):
    return False


def _git(folder: str | Path, *command: str) -> bytes:
  return subprocess.run(
    ["git", "-C", str(folder), *command],
    check=True,
    capture_output=True,
    timeout=GIT_SECONDS,
    stdin=subprocess.DEVNULL,
    env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # status does not write its index
  ).stdout


def data(splits: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
  """Describes the problems of a task, generated ones too.

  The digest is of the prompts and columns of up to `PROBLEMS` problems, spread evenly.

  Args:
    splits: examples with a `prompt` and `columns` by split.

  Returns:
    {"problems": number, "sha256": digest} by split.
  """
  described = {}
  for name, examples in splits.items():
    count = len(examples)
    taken = min(count, PROBLEMS)
    digest = hashlib.sha256()
    for i in range(taken):
      example = examples[i * count // taken]
      columns = dict(example.columns)
      text = json.dumps([example.prompt, columns], sort_keys=True, default=_plain)
      digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    described[name] = {"problems": count, "sha256": digest.hexdigest()}
  return described


def _plain(value: Any) -> Any:
  """Returns what JSON can hold of a value; its type, where that is not clear."""
  if isinstance(value, Mapping):
    return dict(value)
  if isinstance(value, set | frozenset):
    return sorted(map(str, value))
  return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def machines() -> list[dict[str, Any]]:
  """Describes each process of the run; all of them have to call it.

  Returns:
    {"process": index, "host": name of its machine, "pid", "devices": number and kind, "ids"}.
  """
  devices = jax.local_devices()
  own = {
    "process": jax.process_index(),
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "ids": [device.id for device in devices],
  }
  return hosts.gathered_json([own])
