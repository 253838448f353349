"""Shows a run while it runs: a progress bar in a terminal, one line per step elsewhere."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Metrics in the bar and in the lines: (name, label, format).
COLUMNS = (
  ("reward", "reward", "{:.3f}"),
  ("accuracy", "accuracy", "{:.3f}"),
  ("entropy", "entropy", "{:.3f}"),
  ("tokens_per_second", "tokens/s", "{:.0f}"),
)


class Progress:
  """Draws a progress bar if the output is a terminal, else prints one line per step.

  Args:
    total_steps: number of steps of the whole run.
    start_step: first step that this process runs.
  """

  def __init__(self, total_steps: int, start_step: int = 0) -> None:
    self.total_steps = total_steps
    self._seconds: list[float] = []  # of each step
    self._bar = None
    if not sys.stdout.isatty():
      return
    from rich.progress import (
      BarColumn,
      MofNCompleteColumn,
      Progress,
      TextColumn,
    )

    self._bar = Progress(
      TextColumn("step"),
      MofNCompleteColumn(),
      BarColumn(bar_width=24),
      TextColumn("{task.fields[columns]}", markup=False),
    )
    self._bar.start()
    self._task = self._bar.add_task("train", total=total_steps, completed=start_step, columns="")

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows the metrics of a finished step; those of an evaluation (`eval/...`) on their own line.

    Args:
      step: number of the step, from 0.
      metrics: by name, NaN where a metric has no value. `step` is ignored.
    """
    metrics = {name: value for name, value in metrics.items() if name != "step"}
    evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    if evaluation:
      values = "  ".join(f"{name} {value:.3f}" for name, value in sorted(evaluation.items()))
      self.print(f"step {step}: {values}")
    if len(evaluation) == len(metrics):
      return
    columns = "  ".join(
      f"{label} {form.format(metrics[name])}" for name, label, form in COLUMNS if name in metrics
    )
    if "step_time" in metrics:
      self._seconds.append(metrics["step_time"])
    columns += self._left(self.total_steps - step - 1)
    if self._bar:
      self._bar.update(self._task, completed=step + 1, columns=columns)
    else:
      print(f"step {step + 1:>4}/{self.total_steps}  {columns}", flush=True)

  def _left(self, steps: int) -> str:
    """Returns the time of the steps that are left; the first one of this process compiled."""
    usual = self._seconds[1:]
    return f"  {_minutes(statistics.median(usual) * steps)} left" if usual else ""

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line per sample: its reward, the end of its prompt, and the completion."""
    for sample in samples:
      prompt, reward = sample["prompt"], sample.get("reward")
      text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
      scored = reward is not None and not math.isnan(reward)
      score = f"{reward:6.2f}" if scored else "  none"
      last_line = text.rstrip().rpartition("\n")[2][-60:]
      self.print(f"  {score} | {last_line} -> {sample['completion']!r:.120}")

  def print(self, text: str) -> None:
    """Prints text above the bar, without markup: a completion may look like rich's own."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, flush=True)

  def close(self) -> None:
    """Ends the progress bar. A second call does nothing."""
    if self._bar:
      self._bar.stop()


def choose_samples(samples: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
  """Returns completions of one prompt to show: a right and a wrong one, then more of its group.

  The prompt is the first one whose completions have different rewards, else the first one.

  Args:
    samples: of one step, the completions of a prompt side by side; `reward` may be missing or NaN.
    count: number of completions, at most.

  Example:
    >>> rewards = (0.0, 0.0, 0.0, 1.0)
    >>> samples = [{"prompt": "ab"[i // 2], "reward": r} for i, r in enumerate(rewards)]
    >>> choose_samples(samples, 3)
    [{'prompt': 'b', 'reward': 1.0}, {'prompt': 'b', 'reward': 0.0}]
  """

  def reward(sample: Mapping[str, Any]) -> float:
    value = sample.get("reward")
    return -math.inf if value is None or math.isnan(value) else value

  groups = groups_of(samples)
  mixed = (g for g in groups if len({reward(sample) for sample in g}) > 1)
  group = next(mixed, groups[0] if groups else [])
  ranked = sorted(group, key=reward, reverse=True)
  return (ranked[:1] + ranked[-1:] + ranked[1:-1])[: min(count, len(group))]


def groups_of(samples: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
  """Returns the completions of each prompt, which stand side by side."""
  by_prompt = itertools.groupby(samples, key=lambda s: (s.get("key"), s["prompt"]))
  return [list(group) for _, group in by_prompt]


def _minutes(seconds: float) -> str:
  return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
