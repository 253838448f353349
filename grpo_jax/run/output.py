"""Writes what a run leaves in its work directory: metrics, samples, checkpoints, the curve."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.distributed import hosts
from grpo_jax.evaluate import Evaluation
from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint, metrics, plots
from grpo_jax.run.workdir import WorkdirError


class Output(contextlib.AbstractContextManager):
  """The files and the console of one run; only the first host writes, all hosts call.

  Metrics of a step are written when the next step is, so that no step waits for the device.

  Args:
    workdir: the work directory.
    steps: steps of the whole run, for the progress bar.
    keep: number of newest checkpoints to keep.
    samples: completions shown on the console at a time.
    samples_every: steps between the completions shown; 0 shows none.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    steps: int,
    keep: int = 2,
    samples: int = 3,
    samples_every: int = 10,
  ) -> None:
    self.workdir = Path(workdir)
    self._steps, self._samples, self._samples_every = steps, samples, samples_every
    self._checkpoints = checkpoint.Checkpoints(workdir, keep)
    self._open = contextlib.ExitStack()
    self._open.enter_context(self._checkpoints)
    self._num_tokens, self._step_began = 0.0, time.monotonic()

  def resume(
    self, state: TrainState, evaluates_at: Callable[[int], bool] = lambda step: True
  ) -> tuple[int, TrainState]:
    """Returns (number of finished steps, state) of the newest whole checkpoint, or (0, `state`).

    Opens the files. Metrics and samples of later steps are dropped, as those steps run again; the
    evaluation after the last finished step stays unless it is done again.

    Args:
      evaluates_at: whether the run evaluates before a step.

    Raises:
      WorkdirError: the work directory holds more steps than the run has; nothing is changed.
    """
    start, state = self._checkpoints.resume(state, _warn)
    if start > self._steps:
      raise WorkdirError(
        f"{self.workdir} holds {start} finished steps, and steps is {self._steps}: set "
        f"--config.steps={start} or more, or use another --workdir"
      )
    again = start == self._steps or evaluates_at(start)
    make = metrics.MetricsWriter if hosts.is_first() else metrics.NoWriter
    writer = make(self.workdir, self._steps, resume_step=start, keep_evaluation=not again)
    self._writer = self._open.enter_context(writer)
    self._late = metrics.OneStepLate(self._writer.write)
    self._num_tokens = metrics.last(self.workdir, "num_tokens", 0)
    self.start_step()
    return start, state

  def print(self, text: str) -> None:
    """Shows lines of text above the progress bar."""
    self._writer.print(text)

  def start_step(self) -> None:
    """Starts the clock of a step; evaluations before it are not part of its time."""
    self._step_began = time.monotonic()

  def write_step(
    self,
    step: int,
    values: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    num_tokens: int,
  ) -> None:
    """Writes the metrics and samples of a step, with its time and tokens."""
    seconds = time.monotonic() - self._step_began
    self._num_tokens += num_tokens
    timing = {
      "step_time": seconds,
      "tokens_per_second": num_tokens / seconds,
      "num_tokens": self._num_tokens,
    }
    self._late.push(step, {**values, **timing})
    self._writer.write_samples(step, samples)
    if self._samples_every and step % self._samples_every == 0:
      self._writer.print_samples(samples[: self._samples])

  def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
    """Writes the metrics and samples of an evaluation; one without metrics is not written."""
    self._late.flush()
    if evaluation.metrics:
      self._writer.write(step, evaluation.metrics)
      self._writer.write_samples(step, evaluation.samples, kind="eval")

  def save(self, steps: int, state: TrainState) -> None:
    """Starts saving the state after `steps` steps; the metrics before it are on disk by then."""
    self._late.flush()
    self._writer.sync()
    self._checkpoints.save(steps, state)

  def check(self) -> None:
    """Raises SaveError if a checkpoint written in the background has failed; does not wait."""
    self._checkpoints.check()

  def draw_curve(self) -> None:
    """Draws `curve.png`."""
    if hosts.is_first():
      plots.draw_curve(self.workdir)

  def __exit__(self, *error: Any) -> None:
    self._open.__exit__(*error)


def _warn(line: str) -> None:
  if hosts.is_first():
    print(f"warning: {line}", file=sys.stderr, flush=True)
