"""Tests importance ratios against values and gradients computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.ratios import ANCHORS, RATIOS, finite_exp
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

MASK = np.array([[True, True, True], [True, False, False], [False, False, False]])
LOG_RATIOS = np.array([[0.3, -0.6, 0.9], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
MEAN = np.array([[0.2] * 3, [0.5] * 3, [0.0] * 3])
COTANGENT = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
VALUES_AND_GRADIENTS = {
  "token": (LOG_RATIOS, COTANGENT),
  # Each token of a sequence gets a third (1 / length) of the sum of the cotangents, 7.
  "sequence": (MEAN, [[7 / 3] * 3, [3.0] * 3, [0.0] * 3]),
  "sequence_token": (MEAN, COTANGENT),
}


@pytest.mark.parametrize("name", RATIOS)
def test_values_and_gradients(name):
  old = jnp.full((3, 3), -1.0)

  def total(logp):
    log_ratio = RATIOS[name](logp, old, jnp.asarray(MASK))
    return (log_ratio * COTANGENT).sum(), log_ratio

  gradient, value = jax.grad(total, has_aux=True)(old + LOG_RATIOS)
  assert_close(value, VALUES_AND_GRADIENTS[name][0])
  assert_close(gradient, VALUES_AND_GRADIENTS[name][1])


def test_finite_exp_is_exp_up_to_20_and_a_line_above():
  x = jnp.array([-100.0, -1.0, 0.0, 1.0, 20.0, 21.0, 100.0])
  top = np.exp(20.0)
  expected = [np.exp(-100.0), np.exp(-1.0), 1.0, np.exp(1.0), top, 2 * top, 81 * top]
  assert_close(finite_exp(x), expected, rtol=1e-5)
  slopes = jax.vmap(jax.grad(finite_exp))(x)
  expected = [np.exp(-100.0), np.exp(-1.0), 1.0, np.exp(1.0), top, top, top]
  assert_close(slopes, expected, rtol=1e-5)


def test_anchors():
  old, sampler = jnp.array([-1.0]), jnp.array([-2.0])
  assert {name: anchor(old, sampler).tolist() for name, anchor in ANCHORS.items()} == {
    "old": [-1.0],
    "sampler": [-2.0],
  }


def test_every_ratio_is_tested():
  assert set(VALUES_AND_GRADIENTS) == set(RATIOS)
