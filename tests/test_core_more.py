"""Details of core that a mutant (`mutants.py`) got past the other tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.core.advantages import ADVANTAGES

NAN = float("nan")


def test_max_rl_divides_by_the_mean_of_the_scored():
  got = grpo_jax.max_rl(jnp.array([[1.0, 0.0, NAN, NAN]]))
  np.testing.assert_array_equal(got, [[1.0, -1.0, 0.0, 0.0]])  # mean 1/2, not 1/4 or 3/4


@pytest.mark.parametrize("name", ADVANTAGES)
def test_constant_group_with_unscored_entries_is_exactly_zero(name):
  """The mean of seven 0.1 is not 0.1 in float32; of seven zeros it is 0."""
  rewards = jnp.array([[0.1] * 7 + [NAN], [0.1, NAN] + [0.1] * 6])
  np.testing.assert_array_equal(ADVANTAGES[name](rewards), jnp.zeros((2, 8)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_nan_is_made_on_the_way(name):
  """So that `jax_debug_nans` can be on: not even one that a `where` hides."""
  rewards = jnp.array([[NAN, NAN, NAN], [NAN, 1.0, NAN], [0.5, 0.5, 0.5], [0.0, 0.0, NAN]])
  with jax.debug_nans(True):
    assert not ADVANTAGES[name](rewards).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_slope_in_the_rewards_is_finite_for_a_constant_group(name):
  """For rewards that are themselves computed from parameters."""
  slope = jax.jacobian(ADVANTAGES[name])(jnp.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]))
  assert jnp.isfinite(slope).all()
