"""Tests the statistics of a batch of groups against values worked out by hand."""

import math

import numpy as np
import pytest

from grpo_jax.statistics import has_variance, rollout_metrics

NAN = math.nan


def test_has_variance_compares_exactly_and_ignores_unscored_rewards():
  tenths = [0.1, 0.1, 0.1]
  rewards = np.array(
    [[1.0, 0.0, 1.0], tenths, [NAN, 4.0, NAN], [NAN, NAN, NAN], [0.3, 0.1 + 0.2, NAN]]
  )
  assert np.std(tenths, ddof=1) > 0  # why the standard deviation is not what is compared
  # In the last group, 0.1 + 0.2 is not 0.3.
  assert has_variance(rewards).tolist() == [True, False, False, False, True]


def test_rollout_metrics_by_hand():
  rewards = np.array([[1.0, 0.0, 2.0], [0.3, 0.3, 0.3], [NAN, 4.0, NAN], [NAN, NAN, NAN]])
  lengths = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 8], [8, 2, 2]])
  truncated = lengths == 8
  metrics = rollout_metrics(rewards, {"right": rewards, "never": rewards * NAN}, lengths, truncated)
  values = [1.0, 0.0, 2.0, 0.3, 0.3, 0.3, 4.0]  # sum 7.9
  mean = 7.9 / 7
  std = math.sqrt(sum((value - mean) ** 2 for value in values) / 6)
  expected = {
    "reward": mean,
    "reward_std": std,
    "rewards/right/mean": mean,
    "rewards/never/mean": NAN,
    "frac_reward_zero_std": 2 / 3,  # of three groups with a score, the second and the third
    "frac_unscored": 5 / 12,
    "completions/mean_length": 56 / 12,
    "completions/min_length": 1,
    "completions/max_length": 8,
    "completions/mean_terminated_length": 32 / 9,
    "completions/clipped_ratio": 3 / 12,
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, nan_ok=True), name
    assert type(metrics[name]) is float


def test_rollout_metrics_are_nan_where_nothing_is_scored_or_nothing_ends():
  ones = np.ones((2, 2), int)
  metrics = rollout_metrics(np.full((2, 2), NAN), {}, ones, ones == 1)
  assert math.isnan(metrics["reward"])
  assert math.isnan(metrics["reward_std"])
  assert math.isnan(metrics["frac_reward_zero_std"])
  assert math.isnan(metrics["completions/mean_terminated_length"])
  assert metrics["frac_unscored"] == metrics["completions/clipped_ratio"] == 1.0


def test_rollout_metrics_of_no_prompts_are_nan():
  none = np.zeros((0, 2))
  metrics = rollout_metrics(none, {"r": none}, none.astype(int), none == 1)
  assert all(math.isnan(value) for value in metrics.values())


def test_rollout_metrics_require_one_shape():
  with pytest.raises(ValueError, match=r"lengths has shape \(2,\), rewards \(1, 2\)"):
    rollout_metrics(np.zeros((1, 2)), {}, np.zeros(2, int), np.zeros((1, 2), bool))
