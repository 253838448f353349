"""Tests sampler corrections against weights computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.corrections import CORRECTIONS
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# Ratios of trainer to sampler; their products over the sequence are 0.15 and 0.6.
LOG_RATIOS = np.log([[0.1, 0.5, 1.0, 3.0], [1.2, 0.5, 1.0, 1.0]])
WEIGHTS = {
  "none": ({}, [[1.0] * 4] * 2),
  "token_truncate": ({"correction_max": 2.0}, [[0.1, 0.5, 1.0, 2.0], [1.2, 0.5, 1.0, 1.0]]),
  "token_mask": (
    {"correction_min": 0.4, "correction_max": 2.0},
    [[0.0, 0.5, 1.0, 0.0], [1.2, 0.5, 1.0, 1.0]],
  ),
  "sequence_mask": ({"correction_min": 0.4, "correction_max": 2.0}, [[0.0] * 4, [0.6] * 4]),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights(name):
  settings, expected = WEIGHTS[name]
  weights = CORRECTIONS[name](jnp.asarray(LOG_RATIOS), jnp.ones((2, 4), bool), **settings)
  assert_close(weights, expected)


def test_sequence_mask_drops_sequences_above_the_upper_bound():
  weights = CORRECTIONS["sequence_mask"](
    jnp.log(jnp.array([[2.0, 2.0], [2.0, 0.5]])),
    jnp.ones((2, 2), bool),
    correction_min=0.5,
    correction_max=3.0,
  )
  assert_close(weights, [[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("name", ["token_mask", "sequence_mask"])
@pytest.mark.parametrize("bounds", [(1.0, 2.0), (0.5, 1.0)])
def test_a_ratio_on_the_bound_is_inside(name, bounds):
  low, high = bounds
  ones, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
  weights = CORRECTIONS[name](jnp.log(ones), mask, correction_min=low, correction_max=high)
  np.testing.assert_array_equal(weights, ones)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_log_ratios_of_100_are_finite(name):
  log_ratios = jnp.array([[100.0, -100.0], [100.0, 100.0], [-100.0, -100.0]])
  weights = CORRECTIONS[name](log_ratios, jnp.ones((3, 2), bool), **WEIGHTS[name][0])
  assert np.isfinite(weights).all()


def test_every_correction_is_tested():
  assert set(WEIGHTS) == set(CORRECTIONS)
