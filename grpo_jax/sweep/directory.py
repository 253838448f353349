"""Holds the directory of a sweep, on this machine or on an object store."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.addresses import Address
from grpo_jax.run import mirror, record
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.metrics import METRICS
from grpo_jax.run.stores import open_store

SWEEP = "sweep.json"
_READ = (SWEEP, workdirs.CONFIG, record.RECORD, METRICS)  # files that a sweep reads


class Directory:
  """Reads and writes the directory of a sweep.

  Args:
    workdir: its path or its address on a store.

  Raises:
    WorkdirError: it can be neither.
  """

  def __init__(self, workdir: str | Path | Address) -> None:
    self._place = mirror.place_of(workdir)

  def __str__(self) -> str:
    return str(self._place)

  @contextlib.contextmanager
  def seen(self) -> Iterator[Path]:
    """Yields a folder with the files of the sweep and of its runs, as they are now, to read.

    Raises:
      WorkdirError: the store cannot be read.
    """
    if isinstance(self._place, Path):
      yield self._place
    elif not open_store(self._place).list():
      with tempfile.TemporaryDirectory(prefix="grpo_jax_") as empty:
        yield Path(empty)
    else:
      with mirror.fetched(self._place, _to_read) as copy:
        yield copy

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps another sweep out; on a store, each run keeps other runs out of its own directory."""
    if isinstance(self._place, Path):
      with workdirs.lock(self._place):
        yield
    else:
      yield

  def write(self, text: str) -> None:
    """Writes `sweep.json` whole."""
    if isinstance(self._place, Path):
      workdirs.write_whole(self._place / SWEEP, text)
    else:
      open_store(self._place).write(SWEEP, text.encode())


def _to_read(names: list[str]) -> list[str]:
  """Chooses the files of a sweep and of its runs.

  Example:
    >>> _to_read(["sweep.json", "seed=0/run.json", "seed=0/curve.png", "a/samples/run.json"])
    ['sweep.json', 'seed=0/run.json']
  """
  parts = {name: name.split("/") for name in names}
  return [name for name in names if parts[name][-1] in _READ and len(parts[name]) <= 2]
