"""Tests the bias of learning from rollouts of earlier policies, exactly by enumeration.

A rollout is 1 or 2 updates old, each a step of gradient ascent. The bias of a row is what staleness
adds: the expected gradient is compared with that of the same row on a rollout of its own.
"""

import dataclasses

import numpy as np
import pytest

from grpo_jax import ALGORITHMS
from tests.helpers import enumeration_plain as plain
from tests.helpers import estimators as cases
from tests.helpers.arrays import float64
from tests.helpers.enumeration import compare

replace = dataclasses.replace
TRUNCATED = {"correction": "token_truncate", "correction_max": 2.0}
# Rows that make up for staleness, and the row that does not with the same advantage and average.
ROWS = {
  "dppo": (ALGORITHMS["dppo"], "dr_grpo"),
  "dr_grpo, token_truncate": (replace(ALGORITHMS["dr_grpo"], **TRUNCATED), "dr_grpo"),
  "dapo, token_truncate": (replace(ALGORITHMS["dapo"], **TRUNCATED), "dapo"),
  "cispo, anchor sampler": (replace(ALGORITHMS["cispo"], anchor="sampler"), "cispo"),
  "scale_rl, anchor sampler": (replace(ALGORITHMS["scale_rl"], anchor="sampler"), "scale_rl"),
  "gspo_token, token_truncate": (replace(ALGORITHMS["gspo_token"], **TRUNCATED), "gspo_token"),
}


@pytest.fixture(autouse=True, scope="module")
def x64():
  with float64():
    yield


def bias(row, updates):
  return compare(cases.stale_gradient(row, updates), cases.stale_gradient(row, 0)).bias


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ["none", "token_truncate at 2", "sequence_mask, no bounds"])
def test_stale_gradients_by_hand(name, updates):
  actual = cases.stale_gradient(cases.CORRECTIONS[name], updates)
  slope = plain.CORRECTION_SLOPES[name]
  expected = plain.off_policy_of(slope, cases.policy_before(updates))
  np.testing.assert_allclose(-plain.BUDGET * actual, expected, atol=1e-12)


@pytest.mark.parametrize("updates", [1, 2])
def test_weights_of_whole_completions_leave_no_bias(updates):
  row = cases.CORRECTIONS["sequence_mask, no bounds"]
  case = compare(cases.ascent_of(cases.stale_gradient(row, updates)), cases.reward_gradient())
  assert case.bias < 1e-12
  assert case.scale == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_rows_meant_for_it_have_less_bias_than_the_same_row_without(name):
  row, without = ROWS[name]
  for updates in (1, 2):
    assert 0.005 < bias(row, updates) < 0.75 * bias(ALGORITHMS[without], updates)
  assert bias(row, 2) == pytest.approx(2 * bias(row, 1), rel=0.25)


def test_a_clip_around_the_sampler_binds_once_the_policy_has_moved():
  """The clip of 0.2 stops tokens whose ratio has left it, for and against: more bias than none."""
  row = replace(ALGORITHMS["dr_grpo"], anchor="sampler")
  assert bias(row, 1) < 0.02
  assert bias(row, 2) > 0.3 > bias(ALGORITHMS["dr_grpo"], 2)
