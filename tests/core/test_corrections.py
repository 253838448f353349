"""Tests sampler corrections against weights computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.corrections import (
  CORRECTIONS,
  correction_weights,
  effective_sample_size,
  lookup_correction,
)
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
  # Fourth roots: 0.622 and 0.880.
  "geometric_mask": ({"geometric_min": 0.7, "geometric_max": 1.1}, [[0.0] * 4, [1.0] * 4]),
  # Both sequences are less probable now, by 0.6 and 0.4 nats a token.
  "off_policy_mask": (
    {
      "off_policy_max": 0.5,
      "advantages": -np.ones((2, 4)),
      "drift": np.array([[-1.2, 0.0, -0.6, -0.6], [-0.4] * 4]),
    },
    [[0.0] * 4, [1.0] * 4],
  ),
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


def test_the_geometric_mask_has_two_bounds_and_ignores_padding():
  """Geometric means 2, 0.5, 1, and 2 over the one token that is there."""
  log_ratio = jnp.log(jnp.array([[2.0, 2.0], [0.5, 0.5], [2.0, 0.5], [2.0, 1.0]]))
  mask = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)
  weights = CORRECTIONS["geometric_mask"](log_ratio, mask, geometric_min=0.8, geometric_max=1.8)
  assert weights[:, 0].tolist() == [0.0, 0.0, 1.0, 0.0]
  on_bound = CORRECTIONS["geometric_mask"](
    jnp.zeros((1, 2)), jnp.ones((1, 2), bool), geometric_min=1.0, geometric_max=1.0
  )
  assert on_bound.tolist() == [[1.0, 1.0]]
  empty = CORRECTIONS["geometric_mask"](
    jnp.zeros((1, 2)), jnp.zeros((1, 2), bool), geometric_min=0.9, geometric_max=1.1
  )
  assert np.isfinite(empty).all()


def test_the_off_policy_mask_drops_sequences_by_sign_and_mean():
  """Mean drops of 0.6, 0.6, 0.6, 0.5 (on the bound), -0.6, and 0.6 over the one token there."""
  drift = jnp.array([[-1.2, 0], [-1.2, 0], [-1.2, 0], [-0.5, -0.5], [1.2, 0], [-0.6, 0]])
  mask = jnp.array([[1, 1]] * 5 + [[1, 0]], bool)
  sign = jnp.array([-0.1, 0.0, 3.0, -1.0, -1.0, -1.0])
  weights = CORRECTIONS["off_policy_mask"](
    jnp.zeros((6, 2)),
    mask,
    advantages=jnp.broadcast_to(sign[:, None], (6, 2)),
    drift=drift,
    off_policy_max=0.5,
  )
  assert weights.tolist() == [[0.0] * 2, [1.0] * 2, [1.0] * 2, [1.0] * 2, [1.0] * 2, [0.0] * 2]


def test_a_chain_multiplies_and_passes_on_what_each_names():
  log_ratio, mask = jnp.asarray(LOG_RATIOS), jnp.ones((2, 4), bool)
  available = {"geometric_min": 0.7, "geometric_max": 1.1, "correction_max": 1.0, "drift": None}
  actual = correction_weights("geometric_mask+token_truncate", log_ratio, mask, **available)
  assert_close(actual, [[0.0] * 4, [1.0, 0.5, 1.0, 1.0]])
  same = correction_weights("token_truncate+geometric_mask", log_ratio, mask, **available)
  assert_close(same, actual)
  assert_close(correction_weights("token_truncate", log_ratio, mask, **available)[0, 0], 0.1)

  def twice(log_ratio, mask, *, correction_max):
    return jnp.full(log_ratio.shape, 2 * correction_max)

  assert_close(correction_weights(twice, log_ratio, mask, **available), np.full((2, 4), 2.0))


def test_errors_of_a_chain():
  with pytest.raises(ValueError, match=r"^unknown correction 'mask'; known: geometric_mask, none"):
    lookup_correction("geometric_mask+mask")
  with pytest.raises(ValueError, match=r"^unknown correction ''; known"):
    lookup_correction("geometric_mask+")
  with pytest.raises(ValueError, match=r"^unknown correction None; known"):
    lookup_correction(None)


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
  settings = dict(WEIGHTS[name][0])
  settings |= {array: log_ratios for array in ("advantages", "drift") if array in settings}
  weights = CORRECTIONS[name](log_ratios, jnp.ones((3, 2), bool), **settings)
  assert np.isfinite(weights).all()


def test_every_correction_is_tested():
  assert set(WEIGHTS) == set(CORRECTIONS)


def test_effective_sample_size_by_hand():
  """Products 0.15 and 0.6: (0.75)^2 / (2 (0.0225 + 0.36)); a third completion has no token."""
  log_ratio = jnp.concatenate([jnp.asarray(LOG_RATIOS), jnp.full((1, 4), jnp.nan)])
  mask = jnp.array([[True], [True], [False]]) & jnp.ones((3, 4), bool)
  assert_close(effective_sample_size(log_ratio, mask), 0.5625 / 0.765)
  assert_close(effective_sample_size(jnp.zeros((2, 4)), jnp.ones((2, 4), bool)), 1.0)
  assert_close(effective_sample_size(log_ratio, jnp.zeros((3, 4), bool)), 1.0)
  far = jnp.array([[[500.0, 500.0]], [[0.0, -400.0]]])  # [P, G, T]; one has all the weight
  assert_close(effective_sample_size(far, jnp.ones((2, 1, 2), bool)), 0.5)
