"""What `faults.py` does to runs: moments to kill them at, damage to their files, small disks."""

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
from tools.faulty_runs import Run, being_saved, checkpoints, steps_written


def pick(rng: random.Random, low: float, high: float) -> float:
  return low + (high - low) * rng.random()


# --- moments to kill at ---------------------------------------------------------------------------


def _after(seconds: float) -> bool:
  time.sleep(seconds)
  return True


def starting(run: Run, rng: random.Random) -> bool:
  return _after(pick(rng, 0.2, 4.0))


def stepping(run: Run, rng: random.Random) -> bool:
  """Anywhere in a step: sampling, rewards, the update, its line and samples."""
  first, more = steps_written(run.workdir), rng.randint(1, 4)
  run.until(lambda: "steps " in run.output)  # the loop begins; it drops what it will run again
  first = min(first, steps_written(run.workdir))
  return run.until(lambda: steps_written(run.workdir) >= first + more) and _after(pick(rng, 0, 0.1))


def saving(run: Run, rng: random.Random) -> bool:
  return run.until(lambda: fresh(run)) and _after(pick(rng, 0, 0.03))


def renaming(run: Run, rng: random.Random) -> bool:
  """The digests stand in the folder, the next thing is its name."""
  digests = checkpoint.DIGESTS
  return run.until(lambda: any((p / digests).exists() for p in fresh(run))) and _after(
    pick(rng, 0, 0.003)
  )


def committed(run: Run, rng: random.Random) -> bool:
  """A new checkpoint has its name, an old one is removed."""
  before = set(checkpoints(run.workdir))
  return run.until(lambda: set(checkpoints(run.workdir)) - before) and _after(pick(rng, 0, 0.01))


def fresh(run: Run) -> list[Path]:
  """Folders of this process's unfinished checkpoints: those of earlier ones go before its loop."""
  return being_saved(run.workdir) if "steps " in run.output else []


MOMENTS = {
  "while starting": starting,
  "in a step": stepping,
  "in a save": saving,
  "at the rename": renaming,
  "after the rename": committed,
}


# --- damage ---------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path: Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
  path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
  """Every file but the lock, which names the process that had it last."""
  files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- full disks -----------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path) -> Iterator[tuple[Path, Callable, Callable]]:
  """(a work directory, leaves so many KiB to a run, makes room): a tmpfs, or a limit on files."""
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    size = lambda: (place / "metrics.jsonl").stat().st_size  # noqa: E731

    def limit(run: Run, kib: int) -> None:  # not allowed to mount: no file may be larger
      resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size() + kib * 1024,) * 2)

    yield place, limit, lambda: None
    return

  def remount(run: Run | None, kib: int) -> None:
    size = shutil.disk_usage(place).used // 1024 + kib
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(place)], check=True)

  try:
    yield place, remount, lambda: remount(None, 65536)
  finally:
    subprocess.run(["umount", str(place)], check=True)
