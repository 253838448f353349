"""Draws the learning curve of a run as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from grpo_jax.run.metrics import METRICS, read_metrics

if TYPE_CHECKING:
  from matplotlib.axes import Axes

CURVE = "curve.png"
# Panels below the one of rewards: metric, label of its axis, color.
_PANELS = (
  ("entropy", "entropy (nats)", "C2"),
  ("completions/mean_length", "length (tokens)", "C4"),
)


def draw_curve(workdir: str | Path) -> Path:
  """Draws `curve.png`: reward, held-out accuracy, entropy and completion length by step.

  Returns:
    The path of the picture.

  Raises:
    ValueError: metrics.jsonl holds none of these metrics.
  """
  from matplotlib.figure import Figure  # pyplot would look for a screen and keep the figure

  workdir = Path(workdir)
  rows = read_metrics(workdir)
  series = {
    name: np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float)
    for name in ("reward", "eval/accuracy", *(name for name, *_ in _PANELS))
  }
  if not any(len(points) for points in series.values()):
    raise ValueError(f"{workdir / METRICS} holds no reward, accuracy or entropy to draw")
  panels = [panel for panel in _PANELS if len(series[panel[0]])]
  figure = Figure(figsize=(8, 3.6 + 1.5 * len(panels)), layout="constrained")
  axes = figure.subplots(
    1 + len(panels), sharex=True, squeeze=False, height_ratios=[3.0] + [1.3] * len(panels)
  )[:, 0]
  _draw_rewards(axes[0], series["reward"], series["eval/accuracy"])
  for axis, (name, label, color) in zip(axes[1:], panels):
    _draw_points(axis, series[name], color)
    axis.set_ylabel(label)
  for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel("step")
  axes[-1].xaxis.get_major_locator().set_params(integer=True)
  figure.savefig(workdir / CURVE, dpi=130)
  return workdir / CURVE


def _draw_rewards(
  axis: "Axes", rewards: Float[np.ndarray, "steps 2"], accuracies: Float[np.ndarray, "steps 2"]
) -> None:
  """Draws the reward of training and the held-out accuracy; labels its first and last value."""
  _draw_points(axis, rewards, "C0", "reward of the sampled completions")
  if len(accuracies):
    label = "greedy accuracy, held out"
    axis.plot(*accuracies.T, "o--", color="C3", markersize=8, label=label)
    for step, value in (accuracies[0], accuracies[-1])[: len(accuracies)]:
      axis.annotate(
        f"{value:.3f}", (step, value), (0, 9), textcoords="offset points", ha="center", color="C3"
      )
  axis.set_ylabel("reward, accuracy")
  axis.margins(y=0.12)
  if len(rewards) or len(accuracies):
    axis.legend(loc="best", frameon=False)
  else:
    axis.text(0.5, 0.5, "no reward so far", transform=axis.transAxes, ha="center", color="gray")


def _draw_points(
  axis: "Axes", points: Float[np.ndarray, "steps 2"], color: str, label: str | None = None
) -> None:
  """Draws faint points under their centered running mean over about a tenth of the run."""
  if not len(points):
    return
  steps, values = points.T
  radius = len(values) // 20
  means = [values[max(i - radius, 0) : i + radius + 1].mean() for i in range(len(values))]
  axis.plot(steps, values, ".", color=color, alpha=0.35, markersize=5)
  axis.plot(steps, means, "-", color=color, linewidth=1.8, label=label)
