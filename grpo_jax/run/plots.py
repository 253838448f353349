"""Draws the learning curve of a run as a picture."""

import io
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grpo_jax.run import style
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.metrics import METRICS, read_metrics

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

CURVE = "curve.png"
Row = dict[str, float | None]
_Panel = tuple[str, str, Callable[["Axes", Sequence[Row], str], None]]


def draw_curve(workdir: str | Path) -> Path:
  """Draws `curve.png`: what evaluations and training steps measured, a panel for each metric.

  An evaluation is a marker with its interval; nothing is drawn between evaluations. A metric of
  training is a dot for each step and their centered mean.

  Returns:
    The path of the picture.

  Raises:
    ValueError: metrics.jsonl holds none of these metrics.
  """
  workdir = Path(workdir)
  rows = read_metrics(workdir)
  if not _panels(rows):
    raise ValueError(f"{workdir / METRICS} holds no reward, accuracy or entropy to draw")
  with style.use(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    picture = io.BytesIO()
    make_figure(rows, _title(workdir, rows)).savefig(picture, format="png")
  partial = workdir / f".{CURVE}.part"
  partial.write_bytes(picture.getvalue())
  os.replace(partial, workdir / CURVE)
  return workdir / CURVE


def make_figure(rows: Sequence[Row], title: str = "") -> "Figure":
  """Returns the figure of some rows of metrics: the panels of `_PANELS` that they have points for.

  Args:
    rows: rows as `read_metrics` returns them.
    title: text above the panels.
  """
  from matplotlib.figure import Figure  # pyplot would look for a screen and keep the figure

  panels = _panels(rows)
  columns = min(len(panels), 2)
  lines = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(5.2 * columns, 0.7 + 2.1 * lines), layout="constrained")
  figure.suptitle(title, fontsize=10, parse_math=False)
  grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
  for axis, (name, label, draw) in zip(grid.flat, panels):
    draw(axis, rows, name)
    axis.set_title(label, loc="left")
    axis.grid(alpha=0.25)
    axis.xaxis.get_major_locator().set_params(integer=True)
  for axis in grid.flat[len(panels) :]:
    axis.remove()
  for axis in grid.flat[max(len(panels) - columns, 0) : len(panels)]:  # the last of each column
    axis.set_xlabel("step")
    axis.tick_params(labelbottom=True)
  return figure


def interval(mean: float, n: float) -> tuple[float, float]:
  """Returns the 68 % interval of a share of `n` problems (Wilson's, of one standard error).

  It stays in [0, 1], and has a width also where all answers are right or all are wrong.

  Example:
    >>> [round(end, 3) for end in interval(0.5, 100)], [round(end, 3) for end in interval(0.0, 9)]
    ([0.45, 0.55], [0.0, 0.1])
  """
  center = (mean + 0.5 / n) / (1 + 1 / n)
  half = math.sqrt(max(mean * (1 - mean) / n + 0.25 / n**2, 0.0)) / (1 + 1 / n)
  return max(center - half, 0.0), min(center + half, 1.0)


def centered_mean(
  steps: Float[np.ndarray, "n"], values: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
  """Returns the mean of the values around each step, over about a tenth of the run.

  The window is as wide before a step as after it, so it shrinks towards both ends, and a trend is
  neither delayed nor flattened there. Where less than a quarter of it is left, the mean would be
  noise, and is NaN.

  Args:
    steps: in ascending order.

  Example:
    >>> steps = np.arange(101.0)
    >>> centered_mean(steps, 3 * steps)[[0, 1, 50, 99, 100]].tolist()
    [nan, 3.0, 150.0, 297.0, nan]
  """
  widest = _radius(steps)
  radius = np.minimum(widest, np.minimum(steps - steps[0], steps[-1] - steps))
  first = np.searchsorted(steps, steps - radius, side="left")
  end = np.searchsorted(steps, steps + radius, side="right")
  total = np.concatenate([[0.0], np.cumsum(values)])
  means = (total[end] - total[first]) / (end - first)
  return np.where(radius < widest // 4, np.nan, means)


def _radius(steps: Float[np.ndarray, "n"]) -> float:
  """Returns half the width of the window of a centered mean, in steps."""
  return (steps[-1] - steps[0]) // 20


# --- panels ---------------------------------------------------------------------------------------


def _points(rows: Sequence[Row], name: str) -> Float[np.ndarray, "n 2"]:
  """Returns (step, value) of a metric, without the rows that do not have it."""
  points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
  points = np.array(points, float).reshape(-1, 2)
  return points[np.argsort(points[:, 0], kind="stable")]


def _draw_evaluations(axis: "Axes", rows: Sequence[Row], name: str) -> None:
  """Draws the accuracy of each evaluation with its interval; names the first and the last value."""
  points = [
    (row["step"], row[name], *interval(row[name], row.get("eval/n") or math.inf))
    for row in rows
    if row.get(name) is not None
  ]
  steps, means, low, high = np.array(points, float).T
  errors = np.maximum([means - low, high - means], 0.0)
  drawn = axis.errorbar(steps, means, errors, fmt="o", color=style.RED, capsize=3, markersize=5)
  for artist in drawn.get_children():
    artist.set_clip_on(False)
  for step, value in dict([(steps[0], means[0]), (steps[-1], means[-1])]).items():
    inwards = 7 if value < 0.05 else -7 if value > 0.95 else 0
    axis.annotate(
      f"{value:.3f}",
      (step, value),
      (7, inwards),
      textcoords="offset points",
      va="center",
      fontsize=9,
    )
  _unit_interval(axis)


def _draw_steps(axis: "Axes", rows: Sequence[Row], name: str) -> None:
  """Draws a faint dot for each step, and their centered mean, which breaks at long gaps."""
  steps, values = _points(rows, name).T
  size = 8 if len(steps) < 300 else 4 if len(steps) < 3000 else 1.5
  alpha = 0.35 if len(steps) > 1 else 1
  axis.plot(steps, values, ".", color=style.BLUE, alpha=alpha, markersize=size, markeredgewidth=0)
  gaps = np.flatnonzero(np.diff(steps) > 1 + _radius(steps)) + 1
  means = np.insert(centered_mean(steps, values), gaps, np.nan)
  axis.plot(np.insert(steps, gaps, np.nan), means, "-", color=style.BLUE, linewidth=1.8)


def _draw_log_steps(axis: "Axes", rows: Sequence[Row], name: str) -> None:
  """Draws as `_draw_steps` does, on a logarithmic axis, which leaves out values of 0."""
  from matplotlib import ticker

  values = _points(rows, name)[:, 1]
  values = values[values > 0]
  if not len(values):
    _draw_steps(axis, rows, name)
    return
  axis.set_yscale("log", nonpositive="mask")
  _draw_steps(axis, rows, name)
  if values.max() < 10 * values.min():  # powers of ten would leave such an axis without numbers
    axis.yaxis.set_major_locator(ticker.MaxNLocator(5))
  axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
  axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_shares(axis: "Axes", rows: Sequence[Row], name: str) -> None:
  _draw_steps(axis, rows, name)
  for line in axis.lines:
    line.set_clip_on(False)
  _unit_interval(axis)


def _unit_interval(axis: "Axes") -> None:
  axis.set_ylim(0, 1)
  axis.set_yticks([0, 0.25, 0.5, 0.75, 1])


# Metric, title and drawing of each panel.
_PANELS: tuple[_Panel, ...] = (
  ("eval/accuracy", "accuracy, held out (68 % interval)", _draw_evaluations),
  ("margin", "difference of the rewards of a pair", _draw_steps),
  ("reward", "reward of the sampled completions", _draw_steps),
  ("entropy", "entropy, nats", _draw_log_steps),
  ("completions/mean_length", "length of completions, tokens", _draw_steps),
  ("frac_reward_zero_std", "share of zero-variance groups", _draw_shares),
  ("completions/clipped_ratio", "share of truncated completions", _draw_shares),
)


# The mean of one of several rewards, before its weight.
_REWARD = re.compile(r"rewards/(.+)/mean")


def _panels(rows: Sequence[Row]) -> list[_Panel]:
  """Returns the panels that some rows have points for, and one per reward if there are several."""
  names = {name: None for row in rows for name in row if _REWARD.fullmatch(name)}
  rewards = [(name, f"reward {_REWARD.fullmatch(name)[1]}", _draw_steps) for name in names]
  panels = [*_PANELS, *(rewards if len(rewards) > 1 else [])]
  return [panel for panel in panels if len(_points(rows, panel[0]))]


def _title(workdir: Path, rows: Sequence[Row]) -> str:
  """Returns model, task, algorithm and number of held-out problems, as far as they are known.

  Without a config, it starts with the name of the work directory.
  """
  try:
    config = workdirs.read_config(workdir) or {}
  except workdirs.WorkdirError:
    config = {}

  def field(*path: str) -> str:
    value: Any = config
    for name in path:
      value = value.get(name) if isinstance(value, dict) else None
    return Path(value).name if isinstance(value, str) else ""

  task = ": ".join(filter(None, (field("task", "name"), _data_of(field))))
  parts = [field("model", "source"), task, field("algorithm", "name")]
  parts = parts if any(parts) else [workdir.resolve().name]
  counts = [row["eval/n"] for row in rows if row.get("eval/n")]
  parts += [f"n = {counts[-1]:.0f}"] if counts else []
  return ", ".join(textwrap.shorten(part, 60, placeholder="…") for part in parts if part)


def _data_of(field: Callable[..., str]) -> str:
  return field("task", "settings", "dataset") or field("task", "settings", "path")
