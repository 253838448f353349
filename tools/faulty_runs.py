"""Starts runs of the tiny model in processes that are killed, and compares how two of them ended.

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

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
TINY = "experiments/tiny.py"
TIMES = ("step_time", "tokens_per_second", "time/sampling", "time/rewards")


class Run:
  """Runs `grpo_jax.train` in a process of its own; its output goes to a file beside `workdir`.

  Args:
    workdir: the work directory.
    settings: overrides of the config.
    devices: number of CPU devices.
    config: the experiment file.
    variables: environment variables to add.
    target: what the command gets as its work directory, instead of `workdir`.
  """

  def __init__(
    self,
    workdir: Path,
    settings: Iterable[str],
    *,
    devices: int = 1,
    config: str = TINY,
    variables: dict[str, str] | None = None,
    target: str = "",
  ) -> None:
    self.workdir = workdir
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": str(ROOT)} | (variables or {})
    self._log = workdir.with_name(f"{workdir.name}.log")
    with self._log.open("a", encoding="utf-8") as log:
      self._start = log.tell()
      self.process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.train", "--config", config, "--workdir",
         target or str(workdir), *settings],
        env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
      )  # fmt: skip

  @property
  def output(self) -> str:
    """Returns what this process has printed so far."""
    with self._log.open(encoding="utf-8", errors="replace") as log:
      log.seek(self._start)
      return log.read()

  @property
  def running(self) -> bool:
    """True until the process has ended."""
    return self.process.poll() is None

  def end(self, code: int = 0, seconds: float = 900.0) -> str:
    """Waits until the process ends with this exit code; returns its output.

    Args:
      seconds: timeout in seconds.
    """
    try:
      exit_code = self.process.wait(seconds)
    finally:
      self.process.kill()
    assert exit_code == code, f"exit code {exit_code} instead of {code}\n{self.output}"
    return self.output

  def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Waits for a condition; returns False if the process ends first.

    Args:
      seconds: timeout in seconds, after which it is an AssertionError.
    """
    deadline = time.monotonic() + seconds
    while not condition():
      if not self.running:
        return False
      if time.monotonic() > deadline:
        raise AssertionError(f"timed out after {seconds} s:\n{self.output}")
      time.sleep(0.0005)
    return True

  def kill(self) -> None:
    """Sends SIGKILL; asserts that the reward workers end soon after."""
    workers = children(self.process.pid)
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()
    deadline = time.monotonic() + 30
    while left := [pid for pid in workers if alive(pid)]:
      assert time.monotonic() < deadline, f"processes {left} outlive the run that started them"
      time.sleep(0.01)


def children(pid: int) -> list[int]:
  """Returns the descendants of a process."""
  try:
    pids = [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()]  # fmt: skip
  except OSError:
    return []
  return pids + [other for child in pids for other in children(child)]


def alive(pid: int) -> bool:
  """Tells whether a process runs; a zombie does not."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


# --- contents of a work directory -----------------------------------------------------------------


def names(folder: Path) -> set[str]:
  """Returns the names of a folder's entries; empty if the folder does not exist yet."""
  try:
    return {entry.name for entry in os.scandir(folder)}
  except OSError:
    return set()


def checkpoints(workdir: Path) -> list[int]:
  """Returns the steps of the complete checkpoints, in order."""
  return sorted(int(name) for name in names(workdir / "checkpoints") if name.isdigit())


def unfinished_checkpoints(workdir: Path) -> list[Path]:
  """Returns the folders of checkpoints that have not been renamed to their final name."""
  entries = names(workdir / "checkpoints")
  return [workdir / "checkpoints" / name for name in entries if not name.isdigit()]


def steps_written(workdir: Path) -> int:
  """Returns the number of training steps with a file of samples."""
  return sum(name.startswith("step_") for name in names(workdir / SAMPLES))


def rows(workdir: Path) -> list[dict]:
  """Returns the lines of metrics.jsonl without times; asserts that none is cut short."""
  lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
  metrics = read_metrics(workdir)
  assert len(lines) == len(metrics), "a partial line is left"
  return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics]


def state(
  workdir: Path, settings: Iterable[str], step: int, config: str = TINY
) -> list[np.ndarray]:
  """Returns the parameters, optimizer state, reference and count of the newest checkpoint.

  Args:
    step: asserted to be the step of that checkpoint.
  """
  like = build(load(config, list(settings))).initial_state()
  with checkpoint.Checkpoints(workdir, keep=2, read_only=True) as saved:
    assert saved.latest() == step, f"the newest checkpoint is {saved.latest()}, not {step}"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(saved.restore(step, like))]


def same_end(one: Path, other: Path, settings: Iterable[str], step: int, **options: str) -> str:
  """Asserts that two runs ended bit for bit alike; returns a phrase about what was compared."""
  states = [state(workdir, settings, step, **options) for workdir in (one, other)]
  for a, b in zip(*states, strict=True):
    np.testing.assert_array_equal(a, b)
  assert rows(one) == rows(other), "the lines of metrics.jsonl differ"
  files = [sorted((workdir / SAMPLES).glob("*.jsonl")) for workdir in (one, other)]
  assert [a.name for a in files[0]] == [b.name for b in files[1]]
  for a, b in zip(*files):
    assert a.read_bytes() == b.read_bytes(), f"the samples in {a.name} differ"
  return f"the same {len(states[0])} arrays, {len(rows(one))} lines, {len(files[0])} sample files"


def close_end(one: Path, other: Path, tolerance: float) -> str:
  """Asserts equal completions, and metrics equal within rounding; returns a phrase about it.

  Args:
    tolerance: largest difference of a metric, relative above 1 and absolute below.
  """
  largest, rows_one, rows_other = 0.0, rows(one), rows(other)
  for file in sorted((one / SAMPLES).glob("*.jsonl")):
    texts = [re.findall(r'"completion": "(?:[^"\\]|\\.)*"', path.read_text(encoding="utf-8"))
             for path in (file, other / SAMPLES / file.name)]  # fmt: skip
    assert texts[0] == texts[1], f"the completions in {file.name} differ"
    assert texts[0]
  for a, b in zip(rows_one, rows_other, strict=True):
    assert set(a) == set(b)
    for name in a:
      if a[name] is None or b[name] is None:
        assert a[name] is b[name], name
        continue
      difference = abs(a[name] - b[name]) / max(1.0, abs(a[name]))
      assert difference <= tolerance, f"{name} of step {a['step']}: {a[name]} and {b[name]}"
      largest = max(largest, difference)
  return f"the same completions, metrics within {largest:.1e}"


# --- the page -------------------------------------------------------------------------------------


def write_section(title: str, about: str, text: str) -> None:
  """Writes a section of docs/faults.md, in place of the one with the same title."""
  page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
  first, *sections = re.split(r"(?m)^(?=## )", page)
  sections = [part for part in sections if not part.startswith(f"## {title}\n")]
  sections.append(f"## {title}\n\n{textwrap.fill(about, 100, break_on_hyphens=False)}\n\n{text}")
  parts = [part.strip() for part in (first, *sorted(sections))]
  PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
  """Returns a Markdown table."""
  head = list(header)
  body = [" | ".join(map(str, line)) for line in (head, ["---"] * len(head), *lines)]
  return "\n".join(f"| {line} |" for line in body)
