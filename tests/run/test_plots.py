"""Tests that the learning curve is drawn from what metrics.jsonl holds."""

import math

import matplotlib.image
import numpy as np
import pytest

from grpo_jax.run.metrics import MetricsWriter
from grpo_jax.run.plots import draw_curve


def test_the_curve_is_a_picture_with_all_its_panels(tmp_path):
  with MetricsWriter(tmp_path, 30, show=False) as writer:
    writer.write(0, {"eval/accuracy": 0.4})
    for step in range(30):
      entropy = math.nan if step == 3 else 1 / (step + 1)
      writer.write(step, {"reward": step / 30, "entropy": entropy})
    writer.write(30, {"eval/accuracy": 0.9})
  path = draw_curve(tmp_path)
  assert path == tmp_path / "curve.png"
  picture = matplotlib.image.imread(path)
  # 8 by 3.6 inches and 1.5 for the panel of the entropy, at 130 dots per inch
  assert picture.shape[:2] == (663, 1040)
  assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_the_curve_of_one_step_has_no_panel_below(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
  assert matplotlib.image.imread(draw_curve(tmp_path)).shape[:2] == (468, 1040)


@pytest.mark.filterwarnings("error")
def test_a_run_whose_rewards_never_score_still_has_its_entropy(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": null, "entropy": 1.5}\n')
  assert matplotlib.image.imread(draw_curve(tmp_path)).shape[:2] == (663, 1040)


def test_a_curve_without_points_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": null}\n')
  with pytest.raises(ValueError, match="no reward, accuracy or entropy to draw"):
    draw_curve(tmp_path)
  assert not (tmp_path / "curve.png").exists()
