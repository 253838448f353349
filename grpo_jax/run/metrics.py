"""What a run leaves to look at: metrics.jsonl, TensorBoard, sampled completions, a curve.

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
from jaxtyping import Bool, Float, Int

from grpo_jax.run.progress import Progress
from grpo_jax.run.tensorboard import Events
from grpo_jax.run.workdir import write_whole

METRICS = "metrics.jsonl"
SAMPLES = "samples"


def rollout_metrics(
  rewards: Float[np.ndarray, "P G"],
  per_name: Mapping[str, Float[np.ndarray, "P G"]],
  lengths: Int[np.ndarray, "P G"],
  truncated: Bool[np.ndarray, "P G"],
) -> dict[str, float]:
  """Statistics of one batch of groups, under the names other GRPO tools use.

  Args:
    rewards: total rewards; NaN means "not scored" and is left out.
    per_name: the rewards of each function, NaN where it did not apply.
    lengths: completion lengths in tokens, up to and including the end of text.
    truncated: completions that ran into the length limit instead of ending.

  Returns (NaN where there is nothing to take the statistic of):
    reward, reward_std: mean and standard deviation (ddof=1) of all scored rewards.
    rewards/<name>/mean: mean over the completions to which the function applied.
    frac_reward_zero_std: share of the groups with a scored reward whose scored rewards are all
      equal: they teach nothing. Compared exactly, as float noise hides groups of equal 0.3 from a
      test on the standard deviation.
    frac_unscored: share of the completions without a reward.
    completions/{mean,min,max}_length, completions/mean_terminated_length (of those that ended),
    completions/clipped_ratio: share that was truncated.

  >>> out = rollout_metrics(np.array([[1.0, 0.0], [1.0, np.nan]]), {}, np.array([[3, 5], [2, 2]]),
  ...                       np.array([[False, True], [False, False]]))
  >>> round(out["reward"], 3), out["frac_reward_zero_std"], out["frac_unscored"]
  (0.667, 0.5, 0.25)
  """
  shape = np.shape(rewards)
  for name, array in {"lengths": lengths, "truncated": truncated, **per_name}.items():
    if np.shape(array) != shape or len(shape) != 2:
      raise ValueError(f"{name} has shape {np.shape(array)}, rewards {shape}: both must be [P, G]")
  rewards = np.asarray(rewards, np.float64)
  scored = ~np.isnan(rewards)
  high = np.where(scored, rewards, -np.inf).max(axis=1, initial=-np.inf)
  low = np.where(scored, rewards, np.inf).min(axis=1, initial=np.inf)
  values = rewards[scored]
  return {
    "reward": _mean(values),
    "reward_std": float(values.std(ddof=1)) if values.size > 1 else math.nan,
    **{f"rewards/{name}/mean": _mean(r[~np.isnan(r)]) for name, r in per_name.items()},
    "frac_reward_zero_std": _mean((high == low)[scored.any(axis=1)]),
    "frac_unscored": _mean(~scored),
    "completions/mean_length": _mean(lengths),
    "completions/min_length": float(np.min(lengths)) if np.size(lengths) else math.nan,
    "completions/max_length": float(np.max(lengths)) if np.size(lengths) else math.nan,
    "completions/mean_terminated_length": _mean(np.asarray(lengths)[~np.asarray(truncated)]),
    "completions/clipped_ratio": _mean(truncated),
  }


def _mean(values: Any) -> float:
  return float(np.mean(values)) if np.size(values) else math.nan


class OneStepLate:
  """Hands on the metrics of a step when those of the next arrive, so that no step waits for them.

  Reading a device value waits until it is computed. By the time the next step has been started,
  the previous one's values are ready, and the device has work while the host reads them.

  >>> late = OneStepLate(lambda step, metrics: print(step, metrics))
  >>> late.push(0, {"loss": jax.numpy.float32(0.5)})
  >>> late.push(1, {"loss": jax.numpy.float32(0.25)})
  0 {'loss': 0.5}
  >>> late.flush()
  1 {'loss': 0.25}
  """

  def __init__(self, write: Callable[[int, dict[str, float]], object]) -> None:
    self._write = write
    self._held: tuple[int, Mapping[str, Any]] | None = None

  def push(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Keep these metrics (scalars, on the device or not) and hand on the ones kept before."""
    held, self._held = self._held, (step, dict(metrics))
    self._hand_on(held)

  def flush(self) -> None:
    """Hand on what is still kept: at the end, and before a checkpoint."""
    held, self._held = self._held, None
    self._hand_on(held)

  def _hand_on(self, held: tuple[int, Mapping[str, Any]] | None) -> None:
    if held is None:
      return
    step, values = held[0], jax.device_get(dict(held[1]))
    for name, value in values.items():
      if np.ndim(value) != 0:
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}: a metric is one number")
    self._write(step, {name: np.asarray(value).item() for name, value in values.items()})


class MetricsWriter:
  """Writes the metrics and samples of a run into its work directory, and shows its progress.

  Args:
    workdir: gets `metrics.jsonl` (one line per call of `write`), `samples/step_000012.jsonl` and
      `tensorboard/`. Made if it is missing.
    total_steps: steps of the whole run, for the bar.
    resume_step: the next step to run; None is 0. What an earlier process wrote for this step and
      later ones is dropped, as is a line cut short by a kill, so that no step stands twice.
    show: whether to draw the bar and print lines.

  Use as a context manager, or call `close`.
  """

  def __init__(
    self, workdir: str | Path, total_steps: int, resume_step: int | None = None, show: bool = True
  ) -> None:
    self.workdir = Path(workdir)
    self.workdir.mkdir(parents=True, exist_ok=True)
    start = resume_step or 0
    _drop_from(self.workdir, start)
    self._file = (self.workdir / METRICS).open("a", encoding="utf-8")
    self._events = Events(self.workdir / "tensorboard", start)
    self._progress = Progress(total_steps, start) if show else None

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Append the metrics of a step; NaN and infinity become null, for which JSON has no word."""
    row: dict[str, Any] = {"step": int(step)}
    for name, value in sorted(metrics.items()):
      if name == "step" or isinstance(value, str) or np.ndim(value) != 0:
        raise ValueError(f"metric {name!r} is {value!r}: a metric is one number, not named 'step'")
      if value is not None and not isinstance(value, int):
        value = float(value)
      row[name] = value if value is not None and math.isfinite(value) else None
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    self._events.write(step, {n: v for n, v in row.items() if v is not None and n != "step"})
    if self._progress:
      self._progress.update(step, {n: math.nan if v is None else v for n, v in row.items()})

  def sync(self) -> None:
    """Wait until the lines are on the disk: before a checkpoint that counts on them."""
    os.fsync(self._file.fileno())

  def write_samples(
    self, step: int, samples: Sequence[Mapping[str, Any]], kind: str = "step"
  ) -> Path:
    """Write the samples of a step, one JSON object a line; the file appears whole or not at all.

    `kind` begins the file's name: "step" for training, "eval" for evaluation.
    """
    path = self.workdir / SAMPLES / f"{kind}_{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(json.dumps(_plain(sample)) + "\n" for sample in samples))
    return path

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    """Show some samples (their `prompt`, `completion` and `reward`) above the progress bar."""
    if self._progress:
      self._progress.print_samples(samples)

  def print(self, text: str) -> None:
    """Show lines of text above the progress bar."""
    if self._progress:
      self._progress.print(text)

  def close(self) -> None:
    """Finish the bar and the files; a second call does nothing."""
    with contextlib.ExitStack() as closing:  # each, though the disk be full
      closing.callback(self._events.close)
      closing.callback(self._file.close)
      if self._progress:
        closing.callback(self._progress.close)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class NoWriter:
  """What takes the place of a `MetricsWriter` on hosts that write nothing."""

  def __init__(self, workdir: str | Path, total_steps: int, resume_step: int | None = None) -> None:
    pass

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    pass

  def sync(self) -> None:
    pass

  def write_samples(self, *arguments: Any, **options: Any) -> None:
    pass

  def print_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
    pass

  def print(self, text: str) -> None:
    pass

  def __enter__(self) -> NoWriter:
    return self

  def __exit__(self, *_: object) -> None:
    pass


def read_metrics(workdir: str | Path) -> list[dict[str, float | None]]:
  """The lines of a run's metrics.jsonl, less a last one that a kill cut short."""
  return [row for row, _ in _rows(Path(workdir) / METRICS)]


def at(workdir: str | Path, step: int, prefix: str) -> dict[str, float]:
  """The metrics of `step` whose names begin with `prefix`; empty if there are none."""
  found: dict[str, float] = {}
  for row in read_metrics(workdir):
    if row["step"] == step:
      found |= {name: value for name, value in row.items() if name.startswith(prefix)}
  return {name: math.nan if value is None else value for name, value in found.items()}


def last(workdir: str | Path, name: str, default: float) -> float:
  """The newest value of a metric, or `default` where there is none yet."""
  values = [row[name] for row in read_metrics(workdir) if row.get(name) is not None]
  return values[-1] if values else default


def curve(workdir: str | Path) -> Path:
  """Draw `curve.png`: reward and held-out accuracy, entropy, completion length, by step.

  Raises ValueError where metrics.jsonl holds nothing to draw.
  """
  from matplotlib.figure import Figure  # not pyplot: it looks for a screen, and keeps the figure

  rows = read_metrics(workdir)
  series = {
    name: np.array([(r["step"], r[name]) for r in rows if r.get(name) is not None], float)
    for name in ("reward", "eval/accuracy", "entropy", "completions/mean_length")
  }
  if not any(len(points) for points in series.values()):
    raise ValueError(f"{Path(workdir) / METRICS} holds no reward, accuracy or entropy to draw")
  below = [
    (name, label)
    for name, label in (
      ("entropy", "entropy (nats)"),
      ("completions/mean_length", "length (tokens)"),
    )
    if len(series[name])
  ]
  figure = Figure(figsize=(8, 3.6 + 1.5 * len(below)), layout="constrained")
  axes = figure.subplots(
    1 + len(below), sharex=True, squeeze=False, height_ratios=[3.0] + [1.3] * len(below)
  )[:, 0]
  _plot(axes[0], series["reward"], "C0", "reward of the sampled completions")
  held_out = series["eval/accuracy"]
  if len(held_out):
    axes[0].plot(*held_out.T, "o--", color="C3", markersize=8, label="greedy accuracy, held out")
    for step, value in (held_out[0], held_out[-1])[: len(held_out)]:
      axes[0].annotate(
        f"{value:.3f}", (step, value), (0, 9), textcoords="offset points", ha="center", color="C3"
      )
  axes[0].set_ylabel("reward, accuracy")
  axes[0].margins(y=0.12)
  axes[0].legend(loc="best", frameon=False)
  for axis, (name, label) in zip(axes[1:], below):
    _plot(axis, series[name], "C2" if name == "entropy" else "C4", None)
    axis.set_ylabel(label)
  for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel("step")
  path = Path(workdir) / "curve.png"
  figure.savefig(path, dpi=130)
  return path


def _plot(axis: Any, points: np.ndarray, color: str, label: str | None) -> None:
  """The points themselves, faint, under a centred running mean over about a tenth of the run."""
  if not len(points):
    return
  steps, values = points.T
  reach = len(values) // 20
  mean = [values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))]
  axis.plot(steps, values, ".", color=color, alpha=0.35, markersize=5)
  axis.plot(steps, mean, "-", color=color, linewidth=1.8, label=label)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
  """The lines of a metrics file, parsed and as they are."""
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):  # the process was killed while writing it
        return
      raise ValueError(f"{path}, line {number}: not a line of metrics: {line[:80]!r}") from error
    yield row, line


def _drop_from(workdir: Path, step: int) -> None:
  """Remove what an earlier process wrote for `step` and later: those steps will be run again."""
  path = workdir / METRICS
  if path.exists():
    kept = "".join(f"{line}\n" for row, line in _rows(path) if row["step"] < step)
    if kept.encode() != path.read_bytes():
      write_whole(path, kept)
  for sample in (workdir / SAMPLES).glob("*_*.jsonl"):
    number = sample.stem.rpartition("_")[2]
    if number.isdigit() and int(number) >= step:
      sample.unlink()


def _plain(value: Any) -> Any:
  """The value as JSON knows it: NumPy numbers and arrays unwrapped, NaN and infinity as null."""
  if isinstance(value, Mapping):
    return {str(name): _plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
