"""Lets a reader hold on to a checkpoint, which the run beside it then does not delete.

The reader has a shared lock on a file of the checkpoint. The operating system releases it when the
reader ends, however it ends. A run on several hosts deletes all the same, as its hosts must decide
alike, and so does a run on a file system without locks: readers try the next checkpoint there.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax


def held(path: Path) -> bool:
  """Tells whether a reader holds a file, in this process or another one."""
  try:
    with path.open("rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # no such file, or a file system without locks
    return False
  return False


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
  """Holds a file while the body runs; does nothing where that is impossible."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      file = stack.enter_context(path.open("rb"))
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    yield


class KeepNewest:
  """Tells orbax to keep the newest checkpoints, and older ones that are being read.

  Args:
    folder: holds a folder for each checkpoint, named by its step.
    file: name of the file in a checkpoint that readers hold.
    count: number of checkpoints to keep.
  """

  def __init__(self, folder: Path, file: str, count: int) -> None:
    self._folder, self._file, self._count = folder, file, count

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns whether each of the checkpoints, in the order of their steps, is kept."""
    old = len(checkpoints) - self._count
    # All hosts of a run must decide alike.
    alone = jax.process_count() == 1
    return [
      i >= old or (alone and held(self._folder / str(info.step) / self._file))
      for i, info in enumerate(checkpoints)
    ]
