"""Writes and reads what a run leaves to look at: metrics.jsonl and samples.

Device values become Python numbers here and nowhere else (`OneStepLate`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.run.progress import Progress
from grpo_jax.run.trackers import Guarded, Session
from grpo_jax.run.workdir import write_whole

METRICS = "metrics.jsonl"
SAMPLES = "samples"
# Names that earlier versions wrote, and the names that readers get.
RENAMED = {
  "dynamic_sampling/refills": "dynamic_sampling/resamples",
}


class OneStepLate:
  """Delays metrics by one step, so that no step waits for its own.

  Reading a device value blocks until it is computed. The metrics of a step are read when those of
  the next step arrive: they are ready by then, and the device has work while the host reads.

  Example:
    >>> late = OneStepLate(lambda step, metrics: print(step, metrics))
    >>> late.push(0, {"loss": jax.numpy.float32(0.5)})
    >>> late.push(1, {"loss": jax.numpy.float32(0.25)})
    0 {'loss': 0.5}
    >>> late.flush()
    1 {'loss': 0.25}
  """

  def __init__(self, write: Callable[[int, dict[str, float]], object]) -> None:
    self._write = write
    self._pending: tuple[int, Mapping[str, Any]] | None = None

  def push(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of a step (scalars, on the device or not); writes those of the step before.

    Raises:
      ValueError: a metric of the step before is not a scalar.
    """
    pending, self._pending = self._pending, (step, dict(metrics))
    self._hand_on(pending)

  def flush(self) -> None:
    """Writes the pending metrics: at the end of a run, and before a checkpoint.

    Raises:
      ValueError: one of them is not a scalar.
    """
    pending, self._pending = self._pending, None
    self._hand_on(pending)

  def _hand_on(self, pending: tuple[int, Mapping[str, Any]] | None) -> None:
    if pending is None:
      return
    step, metrics = pending[0], jax.device_get(dict(pending[1]))
    for name, value in metrics.items():
      if np.ndim(value) != 0:
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}: a metric is one number")
    self._write(step, {name: np.asarray(value).item() for name, value in metrics.items()})


class MetricsWriter:
  """Writes the metrics and samples of a run into its work directory and shows its progress.

  Use it as a context manager, or call `close`.

  Args:
    workdir: gets `metrics.jsonl` (one line per call of `write`) and `samples/step_000012.jsonl`.
      Made if it is missing.
    total_steps: number of steps of the whole run, for the progress bar.
    resume_step: first step to run; None is 0. Lines and samples of this and later steps are
      removed, as is a line that a kill cut short: no step appears twice.
    keep_evaluation: keep the evaluation before `resume_step`, which will not be done again.
    show: draw the progress bar and print lines.
    trackers: where the metrics go as well, keys of `trackers.TRACKERS`.
    about: what trackers are told about the run.
  """

  def __init__(
    self,
    workdir: str | Path,
    total_steps: int,
    resume_step: int | None = None,
    *,
    keep_evaluation: bool = False,
    show: bool = True,
    trackers: Sequence[str] = ("tensorboard",),
    about: Mapping[str, Any] | None = None,
  ) -> None:
    self.workdir = Path(workdir)
    self.workdir.mkdir(parents=True, exist_ok=True)
    start = resume_step or 0
    _drop_from(self.workdir, start, keep_evaluation)
    self._file = (self.workdir / METRICS).open("a", encoding="utf-8")
    session = Session(self.workdir, start, about or {})
    self._trackers = [Guarded(name, session) for name in trackers]
    self._progress = Progress(total_steps, start) if show else None

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Appends the metrics of a step; NaN and infinity become null, as JSON cannot express them.

    Raises:
      ValueError: a metric is not a number, or is named `step`.
    """
    row: dict[str, Any] = {"step": int(step)}
    for name, value in sorted(metrics.items()):
      if name == "step" or isinstance(value, str) or np.ndim(value) != 0:
        raise ValueError(f"metric {name!r} is {value!r}: a metric is one number, not named 'step'")
      if value is not None and not isinstance(value, int):
        value = float(value)
      row[name] = value if value is not None and math.isfinite(value) else None
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    numbers = {name: v for name, v in row.items() if v is not None and name != "step"}
    for tracker in self._trackers:
      tracker.write(step, numbers)
    if self._progress:
      shown = {name: math.nan if value is None else value for name, value in row.items()}
      self._progress.update(step, shown)

  def sync(self) -> None:
    """Waits until metrics.jsonl is on the disk: call it before a checkpoint that relies on it."""
    os.fsync(self._file.fileno())

  def write_samples(
    self, step: int, samples: Sequence[Mapping[str, Any]], kind: str = "step"
  ) -> Path:
    """Writes the samples of a step, one JSON object per line; a kill leaves no partial file.

    Args:
      samples: one mapping per completion; may hold NumPy values.
      kind: first part of the file's name: `step` for training, `eval` for evaluation.

    Returns:
      The path of the file.
    """
    path = self.workdir / SAMPLES / f"{kind}_{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(json.dumps(_to_json(sample)) + "\n" for sample in samples))
    return path

  def track_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Hands samples on to the trackers."""
    plain = [_to_json(sample) for sample in samples]
    for tracker in self._trackers:
      tracker.write_samples(step, plain)

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    """Prints samples (their `prompt`, `completion` and `reward`) above the progress bar."""
    if self._progress:
      self._progress.print_samples(samples)

  def print(self, text: str) -> None:
    """Prints lines of text above the progress bar."""
    if self._progress:
      self._progress.print(text)

  def close(self) -> None:
    """Closes the progress bar and the files. A second call does nothing."""
    with contextlib.ExitStack() as stack:  # closes each of them even if another one fails
      for tracker in self._trackers:
        stack.callback(tracker.close)
      stack.callback(self._file.close)
      if self._progress:
        stack.callback(self._progress.close)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class NoWriter:
  """Takes the place of `MetricsWriter` on hosts that write nothing."""

  def __init__(self, *arguments: Any, **options: Any) -> None:
    pass

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""

  def write_samples(self, *arguments: Any, **options: Any) -> None:
    """Does nothing."""

  def track_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Does nothing."""

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    """Does nothing."""

  def print(self, text: str) -> None:
    """Does nothing."""

  def __enter__(self) -> NoWriter:
    return self

  def __exit__(self, *_: object) -> None:
    pass


def read_metrics(workdir: str | Path) -> list[dict[str, float | None]]:
  """Reads the lines of a run's metrics.jsonl; names of earlier versions become today's.

  Returns:
    One dict per line, in order. A last line that a kill cut short is left out.

  Raises:
    ValueError: another line is not a JSON object with a step.
  """
  rows = (row for row, _ in _rows(Path(workdir) / METRICS))
  return [{RENAMED.get(name, name): value for name, value in row.items()} for row in rows]


def read_samples(path: str | Path) -> tuple[list[dict[str, Any]], int]:
  """Returns the completions of a file of samples, and the number of lines that are none.

  A file that cannot be read counts as one such line.
  """
  rows, damaged = [], 0
  try:
    text = Path(path).read_text(encoding="utf-8", errors="replace")
  except OSError:
    return [], 1
  for line in text.split("\n"):
    try:
      row = json.loads(line) if line else None
    except (ValueError, RecursionError):
      row = line
    if isinstance(row, dict) and "prompt" in row:
      rows.append(row)
    else:
      damaged += bool(line)
  return rows, damaged


def at(workdir: str | Path, step: int, prefix: str) -> dict[str, float]:
  """Returns the metrics of `step` whose names begin with `prefix`, null as NaN."""
  metrics: dict[str, float] = {}
  for row in read_metrics(workdir):
    if row["step"] == step:
      metrics |= {name: value for name, value in row.items() if name.startswith(prefix)}
  return {name: math.nan if value is None else value for name, value in metrics.items()}


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields each line of a metrics file, parsed and as text."""
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):  # the process was killed while it wrote this line
        return
      raise ValueError(f"{path}, line {number}: not a line of metrics: {line[:80]!r}") from error
    yield row, line


def _drop_from(workdir: Path, step: int, keep_evaluation: bool) -> None:
  """Removes metrics and samples of `step` and later steps, which will be run again.

  Args:
    keep_evaluation: keep the row and the samples of the evaluation before `step`.
  """

  def keeps(number: int, is_evaluation: bool) -> bool:
    return number < step or (keep_evaluation and is_evaluation and number == step)

  path = workdir / METRICS
  if path.exists():
    rows = ((line, keeps(row["step"], "eval/n" in row)) for row, line in _rows(path))
    text = "".join(f"{line}\n" for line, kept in rows if kept)
    if text.encode() != path.read_bytes():
      write_whole(path, text)
  for sample in (workdir / SAMPLES).glob("*_*.jsonl"):
    kind, _, number = sample.stem.rpartition("_")
    if number.isdigit() and not keeps(int(number), kind == "eval"):
      sample.unlink()


def _to_json(value: Any) -> Any:
  """Converts NumPy numbers and arrays to Python values, NaN and infinity to None."""
  if isinstance(value, Mapping):
    return {str(name): _to_json(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_to_json(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _to_json(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
