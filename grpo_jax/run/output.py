"""Writes the files of a run to its work directory: metrics, samples, checkpoints, the curve."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from grpo_jax.distributed import hosts
from grpo_jax.evaluate import Evaluation
from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint, metrics, plots
from grpo_jax.run.mirror import Mirror
from grpo_jax.run.progress import choose_samples
from grpo_jax.run.workdir import WorkdirError


class Output(contextlib.AbstractContextManager):
  """Writes the files of one run and shows its progress. All hosts call it; the first one writes.

  The metrics of a step are written with the next step, so that no step waits for the device. Call
  `resume` before anything else. Use it as a context manager: it also draws the curve of a run that
  ends early, by a signal or an error.

  Args:
    workdir: the work directory.
    steps: number of steps of the whole run.
    keep: number of checkpoints to keep, the newest ones.
    save_seconds: time in seconds after which another save is due; 0 is never.
    samples: number of completions to print at a time, right and wrong ones of one prompt.
    samples_every: number of steps between printed completions; 0 prints none.
    trackers, about: as in `MetricsWriter`.
    mirror: keeps the work directory of a store like `workdir`; None without one.
    remark: called with each record, its step included; returns lines to show.

  Attributes:
    finished: number of finished steps.
    pending: rollouts ahead of the updates, from the checkpoint that `resume` restored.
    latest: step and value of the newest record of each metric; on hosts that do not write, only of
      this process's own records.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    steps: int,
    keep: int = 2,
    save_seconds: float = 0.0,
    samples: int = 3,
    samples_every: int = 10,
    remark: Callable[[dict[str, Any]], Iterable[str]] = lambda row: (),
    trackers: Sequence[str] = ("tensorboard",),
    about: Mapping[str, Any] | None = None,
    mirror: Mirror | None = None,
  ) -> None:
    self.workdir, self._mirror = Path(workdir), mirror
    self._steps, self._samples, self._samples_every = steps, samples, samples_every
    self._remark, self._trackers, self._about = remark, trackers, about
    if mirror:  # the store keeps them
      publish = partial(mirror.publish, keep=keep)
      self._checkpoints = checkpoint.Checkpoints(workdir, 1, publish=publish)
    else:
      self._checkpoints = checkpoint.Checkpoints(workdir, keep)
    self._open = contextlib.ExitStack()
    self._open.enter_context(self._checkpoints)
    self._num_tokens, self._step_start = 0.0, time.monotonic()
    self._saved = self.finished = 0
    self.pending: dict[str, Any] = {}
    self._save_seconds, self._saved_at = save_seconds, self._step_start
    self.latest: dict[str, tuple[int, float | None]] = {}

  def resume(
    self, state: TrainState, evaluates_at: Callable[[int], bool] = lambda step: True
  ) -> tuple[int, TrainState]:
    """Restores the newest checkpoint without damage and opens the files.

    Metrics and samples of later steps are removed, as these steps run again. The evaluation after
    the last finished step is kept unless it is done again.

    Args:
      state: state with the shapes, dtypes and shardings to restore to.
      evaluates_at: tells whether the run evaluates before a step.

    Returns:
      (number of finished steps, state); (0, `state`) if there is no checkpoint.

    Raises:
      WorkdirError: the work directory holds more steps than the run has (nothing is changed), or
        all checkpoints are damaged.
    """
    start, state = self._checkpoints.resume(state, lambda line: _warn(self._shown(line)))
    self.pending = self._checkpoints.pending
    if start > self._steps:
      raise WorkdirError(
        f"{self.workdir} holds {start} finished steps, and steps is {self._steps}: set "
        f"--config.steps={start} or more, or use another --workdir"
      )
    if self._mirror:
      self._mirror.resumed(start)
    again = start == self._steps or evaluates_at(start)
    make = metrics.MetricsWriter if hosts.is_first() else metrics.NoWriter
    writer = make(
      self.workdir,
      self._steps,
      resume_step=start,
      keep_evaluation=not again,
      trackers=self._trackers,
      about=self._about,
    )
    self._writer = self._open.enter_context(writer)
    self._late = metrics.OneStepLate(self._write)
    self._saved = self.finished = start
    # Only the first host writes metrics; the file may not exist yet for the others.
    for row in metrics.read_metrics(self.workdir) if hosts.is_first() else ():
      self.latest.update({name: (int(row["step"]), value) for name, value in row.items()})
    self._num_tokens = self.latest.get("num_tokens", (0, 0.0))[1] or 0.0
    self.start_step()
    self._saved_at = self._step_start
    return start, state

  def print(self, text: str) -> None:
    """Prints lines of text above the progress bar."""
    self._writer.print(self._shown(text))

  @property
  def share(self) -> Callable[[Path], object] | None:
    """Uploads a folder that every host has written its part of; None if they share a folder."""
    return self._mirror.share if self._mirror and jax.process_count() > 1 else None

  def _shown(self, text: str) -> str:
    return self._mirror.shown(text) if self._mirror else text

  def start_step(self) -> None:
    """Starts the clock of a step; an evaluation before this call does not count as its time."""
    self._step_start = time.monotonic()

  def write_step(
    self,
    step: int,
    values: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    num_tokens: int,
  ) -> None:
    """Writes the metrics and samples of a step, with its time and its tokens.

    Args:
      step: number of the step.
      values: metrics; scalars, on the device or not.
      samples: one mapping per completion.
      num_tokens: number of tokens of the step: prompts (each once) and completions.
    """
    seconds = time.monotonic() - self._step_start
    self._num_tokens += num_tokens
    timing = {
      "step_time": seconds,
      "tokens_per_second": num_tokens / seconds,
      "num_tokens": self._num_tokens,
    }
    self.finished = step + 1
    self._late.push(step, {**values, **timing})
    if samples:
      self._writer.write_samples(step, samples)
    if samples and self._samples_every and step % self._samples_every == 0:
      self._writer.track_samples(step, samples)
      self._writer.print_samples(choose_samples(samples, self._samples))

  def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
    """Writes the metrics and samples of an evaluation, if it has metrics."""
    self._late.flush()
    if evaluation.metrics:
      self._write(step, evaluation.metrics)
      if evaluation.samples:
        self._writer.write_samples(step, evaluation.samples, kind="eval")

  def evaluation_at(self, steps: int) -> dict[str, float]:
    """Returns the metrics of the evaluation after `steps` steps; empty if there was none."""
    own = {n: v for n, (at, v) in self.latest.items() if n.startswith("eval/") and at == steps}
    # After a resume, only the first host knows earlier records.
    own = hosts.gathered_json([own if hosts.is_first() else {}])[0]
    return {name: math.nan if value is None else value for name, value in own.items()}

  def is_save_due(self) -> bool:
    """Tells whether `save_seconds` have passed since the last save began, or since `resume`.

    All hosts have to call it. The clock of the first one decides for all of them, so that they
    save the same steps.
    """
    if not self._save_seconds:
      return False
    return hosts.of_first(time.monotonic() - self._saved_at >= self._save_seconds)

  def save(
    self, steps: int, state: TrainState, pending: Callable[[], dict[str, Any]] = dict
  ) -> None:
    """Starts saving the state after `steps` steps, once the metrics of these steps are on the disk.

    A state that is saved already is not saved again.

    Args:
      pending: returns the rollouts ahead of the updates, as `Checkpoints.save` takes them.

    Raises:
      SaveError: this checkpoint, or an earlier one in the background, could not be written.
      NotFiniteError: the parameters or the optimizer state hold NaN or infinity.
    """
    if steps == self._saved:
      return
    self._saved_at = time.monotonic()
    self._late.flush()
    self._writer.sync()
    self._checkpoints.save(steps, state, pending())
    self._saved = steps

  @contextlib.contextmanager
  def saved_if_it_raises(
    self, steps: int, state: TrainState, pending: Callable[[], dict[str, Any]] = dict
  ) -> Iterator[None]:
    """Saves the state after `steps` steps if the body raises, and lets the error go on.

    Ctrl-C does not save: a second one stops at once. On several hosts, only an error that all of
    them raise together is one that all of them can save at.

    Args:
      state: the state before the body, which must not donate it.
      pending: as in `save`.
    """
    try:
      yield
    except Exception as error:
      if steps > self._saved and (jax.process_count() == 1 or hosts.raised_together(error)):
        try:
          self.save(steps, state, pending)
          self.print(f"the state after {steps} steps is saved; the same command continues")
        except (OSError, ValueError, checkpoint.NotFiniteError) as reason:
          _warn(f"the state after {steps} steps could not be saved: {reason}")
      raise

  def check(self) -> None:
    """Checks for errors in the background without waiting.

    Raises:
      SaveError: the last checkpoint could not be written.
      LeaseLost: another run has taken the work directory.
    """
    if self._mirror:
      self._mirror.check()
    self._checkpoints.check()

  def draw_curve(self) -> None:
    """Draws `curve.png` from the metrics."""
    if hosts.is_first():
      plots.draw_curve(self.workdir)

  def _write(self, step: int, values: Mapping[str, float | None]) -> None:
    self.latest.update({name: (step, value) for name, value in values.items()})
    self._writer.write(step, values)
    for line in self._remark({"step": step, **values}) if hosts.is_first() else ():
      self.print(line)

  def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
    try:
      self._open.__exit__(kind, *error)
    finally:
      if kind is not None:  # interrupted: show what there is, and let nothing hide the reason
        with contextlib.suppress(Exception):
          self.draw_curve()


def _warn(line: str) -> None:
  if hosts.is_first():
    print(f"warning: {line}", file=sys.stderr, flush=True)
