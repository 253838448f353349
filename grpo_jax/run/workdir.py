"""Guards a work directory: one run at a time, its config, and files without partial writes."""

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
from typing import Any, TextIO

from grpo_jax import addresses

CONFIG = "config.json"
LOCK = "lock"
# Error numbers of a full file system, an exhausted quota, and a limit on the size of files.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WorkdirError(ValueError):
  """Reports that a work directory cannot be used as it is; the message says what to do."""


@contextlib.contextmanager
def lock(workdir: str | Path) -> Iterator[None]:
  """Keeps other runs out of a work directory; makes it if it is missing.

  The operating system holds the lock and releases it when this process ends, however it ends, so
  that no stale lock can be left behind. Network file systems with locks (NFS, and Lustre mounted
  with `flock`) hold it across machines. The lock of a machine that died is released when the server
  gives up on it: for NFS, after about 90 s. A file system without locks gives a warning: a second
  run is not kept out there.

  Raises:
    WorkdirError: another run uses the directory (the message names its process; no file changes),
      or it cannot be made or written.
  """
  path = Path(workdir) / LOCK
  with _opened(path) as file:
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
        f"{workdir} is on a file system without locks ({error.strerror}): make sure that no second "
        "run uses it", RuntimeWarning, stacklevel=3,
      )  # fmt: skip
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    yield


def path_of(workdir: str | Path) -> Path:
  """Returns the path of a work directory on this machine, with `~` as the home of the user.

  Raises:
    WorkdirError: the path is empty or the URL of another machine, or something else than a
      directory is there.

  Example:
    >>> path_of("runs/a").as_posix()
    'runs/a'
  """
  text = str(workdir)
  if not text.strip() or "\0" in text:
    raise WorkdirError(f"the work directory is {text!r}: give the path of a directory")
  try:
    path = addresses.local(workdir, "the work directory")
    for part in (path, *path.parents):
      if part.is_symlink() and not part.exists():
        raise WorkdirError(
          f"{path} cannot be a work directory: {part} is a link to {os.readlink(part)}, which does "
          "not exist; use another --workdir"
        )
      if part.exists() and not part.is_dir():
        raise WorkdirError(
          f"{path} cannot be a work directory: {part} is a file; use another --workdir"
        )
  except addresses.AddressError as error:
    raise WorkdirError(str(error)) from None
  except (OSError, RuntimeError) as error:  # too long a name; a home that is not known
    raise WorkdirError(f"{text[:300]!r} cannot be a work directory: {error}") from error
  return path


def _opened(path: Path) -> TextIO:
  """Makes the work directory and opens its lock file."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")
  except OSError as error:
    if is_full(error):
      raise
    raise WorkdirError(
      f"{path.parent} cannot be a work directory: {error.strerror}; use another --workdir"
    ) from error


def write_whole(path: Path, text: str) -> None:
  """Writes a file atomically: a kill leaves either the old content or the new one."""
  partial = path.with_name(f".{path.name}.part")
  with partial.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def write_config(workdir: str | Path, config: dict[str, Any]) -> None:
  """Writes the config of the run to `config.json`."""
  write_whole(Path(workdir) / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(workdir: str | Path) -> dict[str, Any] | None:
  """Reads the config that the run in a work directory was started with.

  Returns:
    The fields as they were saved, or None if there is no config yet.

  Raises:
    WorkdirError: the file is not a config.
  """
  path = path_of(workdir) / CONFIG
  if not path.is_file():
    return None
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
      raise ValueError(f"it holds a {type(config).__name__}, not an object")
    return config
  except (ValueError, RecursionError, OSError) as error:
    raise WorkdirError(
      f"{path} is damaged ({error}), so the config that this run was started with is unknown. Put "
      "a copy of it back; or remove it, and the config of the next command becomes the run's"
    ) from error


def is_full(error: BaseException) -> bool:
  """Tells whether an error, or one that it arose from, means that the file system is full."""
  messages = [os.strerror(number) for number in FULL]
  cause: BaseException | None = error
  while cause is not None:
    if getattr(cause, "errno", None) in FULL or any(text in str(cause) for text in messages):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def free_space(path: str | Path) -> str:
  """Returns a phrase with the free space, in MiB, of the file system that a path is on.

  Example:
    >>> free_space("/").endswith("free on the file system at /")
    True
  """
  mount = Path(path).resolve()
  while not mount.exists() or not os.path.ismount(mount):
    mount = mount.parent
  return f"{shutil.disk_usage(mount).free / 2**20:.1f} MiB are free on the file system at {mount}"
