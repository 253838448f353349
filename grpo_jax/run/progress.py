"""How a run looks while it runs: a bar in a terminal, one line per step anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

# What the bar and the lines show: metric, label, format.
SHOWN = (
  ("reward", "reward", "{:.3f}"),
  ("accuracy", "accuracy", "{:.3f}"),
  ("entropy", "entropy", "{:.3f}"),
  ("tokens_per_second", "tokens/s", "{:.0f}"),
)


class Progress:
  """A progress bar in a terminal, and one line per step where the output is not one."""

  def __init__(self, total_steps: int, start_step: int = 0) -> None:
    self.total_steps = total_steps
    self._start_step, self._start_time = start_step, time.monotonic()
    self._bar = None
    if not sys.stdout.isatty():
      return
    from rich.progress import (
      BarColumn,
      MofNCompleteColumn,
      Progress,
      TextColumn,
      TimeRemainingColumn,
    )

    self._bar = Progress(
      TextColumn("step"),
      MofNCompleteColumn(),
      BarColumn(bar_width=24),
      TimeRemainingColumn(compact=True),
      TextColumn("{task.fields[shown]}", markup=False),
    )
    self._bar.start()
    self._row = self._bar.add_task("train", total=total_steps, completed=start_step, shown="")

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Show the metrics of a finished step; evaluations (`eval/...`) on their own line."""
    metrics = {name: value for name, value in metrics.items() if name != "step"}
    evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    if evaluated:
      values = "  ".join(f"{name} {value:.3f}" for name, value in sorted(evaluated.items()))
      self.print(f"step {step}: {values}")
    if len(evaluated) == len(metrics):
      return
    shown = "  ".join(
      f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics
    )
    if self._bar:
      self._bar.update(self._row, completed=step + 1, shown=shown)
      return
    done = step + 1 - self._start_step
    left = (time.monotonic() - self._start_time) / max(done, 1) * (self.total_steps - step - 1)
    print(f"step {step + 1:>4}/{self.total_steps}  {shown}  {_minutes(left)} left", flush=True)

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    """One line a sample: its reward, the end of its prompt, and the completion."""
    for sample in samples:
      prompt, reward = sample["prompt"], sample.get("reward")
      text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
      scored = reward is not None and not math.isnan(reward)
      given = f"{reward:6.2f}" if scored else "  none"
      last_line = text.rstrip().rpartition("\n")[2][-60:]
      self.print(f"  {given} | {last_line} -> {sample['completion']!r:.120}")

  def print(self, text: str) -> None:
    """Print a line above the bar, as it is: a completion may look like the bar's own markup."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def _minutes(seconds: float) -> str:
  return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
