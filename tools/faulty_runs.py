"""Runs of the tiny model in processes that are killed, and whether two of them ended alike.

Shared by `faults.py` and `soak.py`.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import METRICS, SAMPLES, read_metrics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
TINY = "experiments/tiny.py"
TIMES = ("step_time", "tokens_per_second")


class Run:
  """A command of the package in a process of its own; its output goes to a file beside it."""

  def __init__(
    self, workdir: Path, settings: Iterable[str], *, devices: int = 1, **more: object
  ) -> None:
    self.workdir = workdir
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": str(ROOT)} | more.pop("variables", {})
    self._log = workdir.with_name(f"{workdir.name}.log")
    with self._log.open("a", encoding="utf-8") as log:
      self._begin = log.tell()
      self.process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.train", "--config", more.pop("config", TINY),
         "--workdir", str(workdir), *settings],
        env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, **more,
      )  # fmt: skip

  @property
  def output(self) -> str:
    with self._log.open(encoding="utf-8", errors="replace") as log:
      log.seek(self._begin)
      return log.read()

  @property
  def running(self) -> bool:
    return self.process.poll() is None

  def end(self, code: int = 0, seconds: float = 900.0) -> str:
    """Its output, once it has ended by itself, with this exit code."""
    try:
      got = self.process.wait(seconds)
    finally:
      self.process.kill()
    assert got == code, f"exit code {got} instead of {code}\n{self.output}"
    return self.output

  def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Waits for a condition; False if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
      if not self.running:
        return False
      if time.monotonic() > deadline:
        raise AssertionError(f"waited {seconds} s in vain:\n{self.output}")
      time.sleep(0.0005)
    return True

  def kill(self) -> None:
    """SIGKILL; its reward workers have to be gone soon after."""
    workers = children(self.process.pid)
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()
    deadline = time.monotonic() + 30
    while left := [pid for pid in workers if alive(pid)]:
      assert time.monotonic() < deadline, f"processes {left} outlive the run that started them"
      time.sleep(0.01)


def children(pid: int) -> list[int]:
  """The processes that a process has started, and those that these have."""
  try:
    found = [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
             for word in (task / "children").read_text().split()]  # fmt: skip
  except OSError:
    return []
  return found + [other for child in found for other in children(child)]


def alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


# --- what a work directory holds ------------------------------------------------------------------


def names(folder: Path) -> set[str]:
  try:
    return {entry.name for entry in os.scandir(folder)}
  except OSError:  # not there yet
    return set()


def checkpoints(workdir: Path) -> list[int]:
  return sorted(int(name) for name in names(workdir / "checkpoints") if name.isdigit())


def being_saved(workdir: Path) -> list[Path]:
  """Folders of checkpoints that are not committed."""
  found = names(workdir / "checkpoints")
  return [workdir / "checkpoints" / name for name in found if not name.isdigit()]


def steps_written(workdir: Path) -> int:
  """Training steps of which there are samples."""
  return sum(name.startswith("step_") for name in names(workdir / SAMPLES))


def rows(workdir: Path) -> list[dict]:
  """The lines of metrics.jsonl without times."""
  lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
  found = read_metrics(workdir)
  assert len(lines) == len(found), "a part of a line is left"
  return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def state(
  workdir: Path, settings: Iterable[str], step: int, config: str = TINY
) -> list[np.ndarray]:
  """Parameters, optimizer state, reference and count of a checkpoint."""
  c = load(config, list(settings))
  like = build(c).initial_state()
  with checkpoint.Checkpoints(workdir, keep=2, read_only=True) as saved:
    assert saved.latest() == step, f"the newest checkpoint is {saved.latest()}, not {step}"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(saved.restore(step, like))]


def same_end(one: Path, other: Path, settings: Iterable[str], step: int, **options: str) -> str:
  """Asserts that two runs ended bit for bit alike; what was compared, in words."""
  states = [state(workdir, settings, step, **options) for workdir in (one, other)]
  for a, b in zip(*states, strict=True):
    np.testing.assert_array_equal(a, b)
  assert rows(one) == rows(other), "other lines in metrics.jsonl"
  files = [sorted((workdir / SAMPLES).glob("*.jsonl")) for workdir in (one, other)]
  assert [a.name for a in files[0]] == [b.name for b in files[1]]
  for a, b in zip(*files):
    assert a.read_bytes() == b.read_bytes(), f"other samples in {a.name}"
  return f"the same {len(states[0])} arrays, {len(rows(one))} lines, {len(files[0])} sample files"


def close_end(one: Path, other: Path, tolerance: float) -> str:
  """Asserts the same completions and metrics within rounding; the largest difference, in words."""
  worst, a_rows, b_rows = 0.0, rows(one), rows(other)
  for a in sorted((one / SAMPLES).glob("*.jsonl")):
    texts = [re.findall(r'"completion": "(?:[^"\\]|\\.)*"', path.read_text(encoding="utf-8"))
             for path in (a, other / SAMPLES / a.name)]  # fmt: skip
    assert texts[0] == texts[1], f"other completions in {a.name}"
    assert texts[0]
  for a, b in zip(a_rows, b_rows, strict=True):
    assert set(a) == set(b)
    for name in a:
      if a[name] is None or b[name] is None:
        assert a[name] is b[name], name
        continue
      difference = abs(a[name] - b[name]) / max(1.0, abs(a[name]))
      assert difference <= tolerance, f"{name} of step {a['step']}: {a[name]} and {b[name]}"
      worst = max(worst, difference)
  return f"the same completions, metrics within {worst:.1e}"


# --- the page -------------------------------------------------------------------------------------


def write_section(title: str, about: str, text: str) -> None:
  """Puts a section into docs/faults.md in place of the one with this title."""
  old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
  first, *sections = re.split(r"(?m)^(?=## )", old)
  sections = [part for part in sections if not part.startswith(f"## {title}\n")]
  sections.append(f"## {title}\n\n{textwrap.fill(about, 100, break_on_hyphens=False)}\n\n{text}")
  parts = [part.strip() for part in (first, *sorted(sections))]
  PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
  head = list(header)
  body = [" | ".join(map(str, line)) for line in (head, ["---"] * len(head), *lines)]
  return "\n".join(f"| {line} |" for line in body)
