"""Tests that the learning curve shows what metrics.jsonl holds, and nothing else."""

import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from grpo_jax.run import plots, style
from grpo_jax.run.metrics import MetricsWriter, read_metrics
from grpo_jax.run.plots import centered_mean, draw_curve, interval, make_figure

ROOT = Path(__file__).parents[2]
EVALUATIONS = [
  {"step": step, "eval/accuracy": accuracy, "eval/n": 20.0}
  for step, accuracy in ((0, 0.0), (20, 0.5), (30, 1.0))
]


def training(steps, **metrics):
  """Returns rows of training steps; each metric is a function of the step."""
  return [{"step": step, **{name: f(step) for name, f in metrics.items()}} for step in steps]


def axis_of(rows, title):
  """Returns the panel whose title contains `title`."""
  with style.use():
    (axis,) = [axis for axis in make_figure(rows).axes if title in axis.get_title(loc="left")]
  return axis


def size_of(panels):
  """Returns (height, width) in pixels: 5.2 inches a column, 2.1 a line, 0.7 the title, 130 dpi."""
  columns, lines = min(panels, 2), math.ceil(panels / 2)
  return int((0.7 + 2.1 * lines) * 130), int(5.2 * columns * 130)


# --- the picture ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_curve_is_a_picture_with_all_its_panels(tmp_path):
  with MetricsWriter(tmp_path, 30, show=False) as writer:
    writer.write(0, {"eval/accuracy": 0.4, "eval/n": 20})
    for step in range(30):
      entropy = math.nan if step == 3 else 1 / (step + 1)
      writer.write(step, {
        "reward": step / 30, "entropy": entropy, "completions/mean_length": 5.0,
        "frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.0,
      })  # fmt: skip
    writer.write(30, {"eval/accuracy": 0.9, "eval/n": 20})
  path = draw_curve(tmp_path)
  assert path == tmp_path / "curve.png"
  picture = matplotlib.image.imread(path)
  assert picture.shape[:2] == size_of(6)
  assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
  assert sorted(p.name for p in tmp_path.glob("*curve*")) == ["curve.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
  ("rows", "panels"),
  [
    ([{"step": 0, "reward": 0.5}], 1),
    ([{"step": 0, "reward": None, "entropy": 1.5}], 1),  # the rewards never score
    ([{"step": 0, "entropy": 0.0}], 1),
    ([{"step": 0, "eval/accuracy": 1.0}], 1),  # of an unknown number of problems
    (EVALUATIONS, 1),
    (training(range(3), reward=lambda i: None if i == 1 else 1.0, entropy=lambda i: 0.0 + i), 2),
    (training(range(5000), reward=math.sin, entropy=lambda i: 1.0), 2),
    (training([0, 10**9], reward=float), 1),
  ],
)  # fmt: skip
def test_unusual_runs_are_drawn(tmp_path, rows, panels):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert matplotlib.image.imread(draw_curve(tmp_path)).shape[:2] == size_of(panels)


def test_a_curve_without_points_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": null}\n')
  with pytest.raises(ValueError, match="no reward, accuracy or entropy to draw"):
    draw_curve(tmp_path)
  assert not (tmp_path / "curve.png").exists()


def test_the_title_says_model_task_algorithm_and_n(tmp_path):
  run = ROOT / "tests/data/run_0_1_0/run"
  assert plots._title(run, read_metrics(run)) == "random:tiny, letters, dr_grpo, n = 20"
  settings = {"path": "data/$q_{.jsonl"}
  config = {
    "model": {"source": "/models/$x_{/Qwen3-8B"},
    "task": {"name": "jsonl", "settings": settings},
    "algorithm": {"name": "grpo"},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert plots._title(tmp_path, EVALUATIONS) == "Qwen3-8B, jsonl: $q_{.jsonl, grpo, n = 20"
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
  draw_curve(tmp_path)  # a "$" does not start a formula
  for broken in ("{", "[]", '{"model": 3, "task": null}'):
    (tmp_path / "config.json").write_text(broken)
    assert plots._title(tmp_path, []) == tmp_path.name


def test_each_of_several_rewards_has_a_panel():
  """So that a learned reward and the true one, of weight 0, can be compared."""
  rows = training(range(30), **{
    "reward": float, "rewards/true/mean": lambda i: i / 30, "rewards/model/mean": float,
    "rewards/missing": float,
  })  # fmt: skip
  titles = [axis.get_title(loc="left") for axis in make_figure(rows).axes]
  assert titles == ["reward of the sampled completions", "reward true", "reward model"]
  for row in rows:
    del row["rewards/model/mean"]
  assert len(make_figure(rows).axes) == 1  # the only one is the first panel already


def test_a_reward_model_has_panels_of_its_own():
  rows = [*training(range(30), margin=float), {"step": 0, "eval/accuracy": 0.5, "eval/n": 20.0}]
  titles = [axis.get_title(loc="left") for axis in make_figure(rows).axes]
  assert titles == ["accuracy, held out (68 % interval)", "difference of the rewards of a pair"]


# --- evaluations ----------------------------------------------------------------------------------


def test_evaluations_are_markers_with_bars_and_no_line_between_them():
  axis = axis_of(EVALUATIONS, "accuracy")
  assert axis.get_ylim() == (0, 1)
  (container,) = axis.containers
  marker, _, (bars,) = container
  assert marker.get_linestyle() == "None"
  np.testing.assert_array_equal(marker.get_xydata(), [[0, 0], [20, 0.5], [30, 1]])
  ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
  # n = 20: the interval of 0 of 20 is [0, 1/21], that of 20 of 20 is [20/21, 1].
  np.testing.assert_allclose(ends[0], [0, 1 / 21])
  np.testing.assert_allclose(ends[2], [20 / 21, 1])
  np.testing.assert_allclose(np.ptp(ends[1]) / 2, math.sqrt(0.25 / 20 + 0.25 / 400) / (21 / 20))
  assert [text.get_text() for text in axis.texts] == ["0.000", "1.000"]
  assert not [line for line in axis.lines if line.get_linestyle() not in ("None", "")]


def test_the_interval_is_that_of_a_standard_error_for_many_problems():
  """0.285 of 200: the standard error is sqrt(0.285 * 0.715 / 200) = 0.0319."""
  low, high = interval(0.285, 200)
  assert (low, high) == pytest.approx((0.285 - 0.0319, 0.285 + 0.0319), abs=0.002)
  assert interval(0.3, math.inf) == pytest.approx((0.3, 0.3))


# --- training steps -------------------------------------------------------------------------------


def test_the_mean_does_not_tell_the_start_or_the_end_wrong():
  """A window that is cut off at one side would flatten a straight line at both ends."""
  steps = np.arange(100.0)
  means = centered_mean(steps, 2 * steps + 1)
  inside = np.isfinite(means)
  assert inside[1:-1].all()
  np.testing.assert_allclose(means[inside], (2 * steps + 1)[inside])


def test_the_mean_of_a_step_by_hand():
  """Averages 41 steps over two before, one, and two after; over fewer at the start."""
  values = np.array([3.0, 6.0, 0.0, 9.0] + [0.0] * 37)
  means = centered_mean(np.arange(41.0), values)
  np.testing.assert_allclose(means[:5], [3, (3 + 6 + 0) / 3, 18 / 5, 15 / 5, 9 / 5])


def test_the_mean_breaks_where_steps_are_missing():
  rows = training([*range(30), *range(60, 90)], reward=lambda i: 1.0)
  dots, mean = axis_of(rows, "reward").lines
  assert dots.get_linestyle() == "None"
  x = mean.get_xdata()
  assert np.isnan(x).sum() == 1
  assert np.isnan(x[30])
  # Single steps without a value do not break it.
  rows = training(range(90), reward=lambda i: None if i % 3 == 0 else 1.0)
  assert not np.isnan(axis_of(rows, "reward").lines[1].get_xdata()).any()


def test_entropy_has_a_logarithmic_axis_and_shares_have_the_unit_interval():
  names = {"entropy": 0.01, "frac_reward_zero_std": 0.5, "completions/clipped_ratio": 1.0}
  rows = training(range(5), **{name: lambda i, v=value: v for name, value in names.items()})
  assert axis_of(rows, "entropy").get_yscale() == "log"
  for title in ("zero-variance groups", "truncated completions"):
    assert axis_of(rows, title).get_ylim() == (0, 1)
  assert axis_of(training(range(5), entropy=lambda i: 0.0), "entropy").get_yscale() == "linear"


def test_steps_are_whole_numbers():
  axis = axis_of(training(range(2), reward=float), "reward")
  axis.figure.draw_without_rendering()
  ticks = [t for t in axis.get_xticks() if 0 <= t <= 1]
  assert ticks == [0, 1]


# --- one style ------------------------------------------------------------------------------------


def test_every_figure_of_the_project_has_the_style():
  """Finds no color named outside `run/style.py`, which gives everything that draws its look."""
  files = [
    path
    for folder in (
      "grpo_jax",
      "benchmarks",
      "tools",
      "examples",
      "experiments",
      "docs",
      "notebooks",
    )
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".ipynb") and "_build" not in path.parts
  ]
  drawing = [path for path in files if re.search(r"(from|import) matplotlib", path.read_text())]
  assert {path.name for path in drawing} >= {"plots.py", "cost.py", "01_grpo_from_reinforce.ipynb"}
  for path in drawing:
    if path.name != "style.py":
      text = path.read_text()
      assert "grpo_jax.run import style" in text, path
      assert not re.search(r"color=\W?[\"']C\d|rcParams\[", text), path
