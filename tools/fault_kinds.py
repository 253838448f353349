"""Harms runs for `faults.py`: moments to kill them at, damage to their files, small disks."""

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_jax.run import checkpoint
from tools.faulty_runs import Run, checkpoints, steps_written, unfinished_checkpoints


def pick(rng: random.Random, low: float, high: float) -> float:
  """Draws a number between `low` and `high`."""
  return low + (high - low) * rng.random()


# --- moments to kill at ---------------------------------------------------------------------------


def _after(seconds: float) -> bool:
  time.sleep(seconds)
  return True


def starting(run: Run, rng: random.Random) -> bool:
  """Waits for a moment while the run starts."""
  return _after(pick(rng, 0.2, 4.0))


def stepping(run: Run, rng: random.Random) -> bool:
  """Waits for a moment in a step: sampling, rewards, the update, its metrics and samples."""
  first, more = steps_written(run.workdir), rng.randint(1, 4)
  run.until(lambda: "steps " in run.output)  # the loop has started: it has removed later samples
  first = min(first, steps_written(run.workdir))
  return run.until(lambda: steps_written(run.workdir) >= first + more) and _after(pick(rng, 0, 0.1))


def saving(run: Run, rng: random.Random) -> bool:
  """Waits until a checkpoint is being written."""
  return run.until(lambda: fresh(run)) and _after(pick(rng, 0, 0.03))


def renaming(run: Run, rng: random.Random) -> bool:
  """Waits until a checkpoint has its digests; the rename comes next."""
  digests = checkpoint.DIGESTS
  return run.until(lambda: any((p / digests).exists() for p in fresh(run))) and _after(
    pick(rng, 0, 0.003)
  )


def committed(run: Run, rng: random.Random) -> bool:
  """Waits until a checkpoint has its final name; an old one is removed next."""
  before = set(checkpoints(run.workdir))
  return run.until(lambda: set(checkpoints(run.workdir)) - before) and _after(pick(rng, 0, 0.01))


def fresh(run: Run) -> list[Path]:
  """Returns the unfinished checkpoints of this process; earlier ones go before its loop starts."""
  return unfinished_checkpoints(run.workdir) if "steps " in run.output else []


MOMENTS = {
  "while starting": starting,
  "in a step": stepping,
  "in a save": saving,
  "at the rename": renaming,
  "after the rename": committed,
}


# --- damage ---------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
  """Returns the largest file in a folder."""
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
  """Flips one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path: Path) -> None:
  """Cuts a file to half its size."""
  os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
  """Removes a file."""
  path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
  """Returns the content of every file but the lock, which names the process that held it last."""
  files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- full disks -----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, Callable, Callable]]:
  """Makes a disk that can fill up: a tmpfs, or without the right to mount, a limit on file sizes.

  Yields:
    (work directory on it, function of a run and a number of KiB that leaves it no more space than
    that, function that makes room again).
  """
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    size = lambda: (folder / "metrics.jsonl").stat().st_size  # noqa: E731

    def limit(run: Run, kib: int) -> None:
      resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size() + kib * 1024,) * 2)

    yield folder, limit, lambda: None
    return

  def remount(run: Run | None, kib: int) -> None:
    size = shutil.disk_usage(folder).used // 1024 + kib
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)

  try:
    yield folder, remount, lambda: remount(None, 65536)
  finally:
    subprocess.run(["umount", str(folder)], check=True)
