"""A work directory: one run at a time, its config, and files that appear whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = "config.json"
LOCK = "lock"
# What a full file system, a used-up quota and a limit on the size of files say.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WorkdirError(ValueError):
  """A work directory cannot be used as it is; the text says what to do."""


@contextlib.contextmanager
def lock(workdir: str | Path) -> Iterator[None]:
  """Keeps other runs out of a work directory, which is made if it is missing.

  The operating system holds the lock and drops it when this process ends, however it ends, so none
  is ever left behind. Network file systems that have locks (NFS, Lustre mounted with `flock`) hold
  it between machines; that of a machine that died is dropped when the server gives it up, for NFS
  after about 90 s. Without locks there is a warning: nothing keeps a second run out.

  Errors: WorkdirError, with the process that has it, and nothing changed in the directory.
  """
  path = Path(workdir) / LOCK
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise WorkdirError(
        f"{workdir} is in use by {file.read().strip() or 'another run'}. Use another --workdir, or "
        "stop that run first: with Ctrl-C or `kill` it saves, and the same command continues"
      ) from None
    except OSError as error:
      warnings.warn(
        f"{workdir} is on a file system without locks ({error.strerror}): take care that no second "
        "run uses it", RuntimeWarning, stacklevel=3,
      )  # fmt: skip
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    yield


def write_whole(path: Path, text: str) -> None:
  """Write a file so that a kill at any moment leaves the old one or the new one, never a part."""
  part = path.with_name(f".{path.name}.part")
  with part.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)


def write_config(workdir: str | Path, config: dict[str, Any]) -> None:
  """Puts the config of the run beside its checkpoints."""
  write_whole(Path(workdir) / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(workdir: str | Path) -> dict[str, Any] | None:
  """The config that the work directory was started with; None in a new one.

  Errors: WorkdirError where the file is not a config.
  """
  path = Path(workdir) / CONFIG
  if not path.is_file():
    return None
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
      raise ValueError(f"it holds a {type(config).__name__}, not an object")
    return config
  except ValueError as error:
    raise WorkdirError(
      f"{path} is damaged ({error}), so it is not known what this run was started with. Put a copy "
      "of it back; or remove it, and the next command's config is taken for the run's"
    ) from error


def is_full(error: BaseException) -> bool:
  """Whether an error, or what led to it, is that there is no room for a file."""
  texts = [os.strerror(number) for number in FULL]
  seen: BaseException | None = error
  while seen is not None:
    if getattr(seen, "errno", None) in FULL or any(text in str(seen) for text in texts):
      return True
    seen = seen.__cause__ or seen.__context__
  return False


def room(path: str | Path) -> str:
  """How much is free where a path is, in words.

  >>> room("/").endswith("free on the file system at /")
  True
  """
  place = Path(path).resolve()
  while not place.exists() or not os.path.ismount(place):
    place = place.parent
  return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB are free on the file system at {place}"
