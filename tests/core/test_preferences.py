"""Tests `preference_loss` against its definition in plain Python, pair by pair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import preference_loss
from tests.helpers.arrays import float64

RNG = np.random.default_rng(0)
SHAPE = (2, 5)
CHOSEN, REJECTED = RNG.normal(scale=2, size=(2, *SHAPE)).astype(np.float32)
MARGIN = RNG.integers(0, 4, SHAPE).astype(np.float32)
WEIGHTS = np.where(RNG.random(SHAPE) < 0.7, RNG.random(SHAPE), 0.0).astype(np.float32)
REAL = WEIGHTS != 0


def plain(chosen, rejected, margin, center, weights):
  """Returns the loss as the log-likelihood of each outcome, summed up."""
  total = 0.0
  for i in np.ndindex(chosen.shape):
    c, r = float(chosen[i]), float(rejected[i])
    wins = 1 / (1 + math.exp(-(c - r - margin[i])))
    total += weights[i] * (-math.log(wins) + center * (c + r) ** 2)
  return total


def test_one_pair_by_hand():
  """exp(1) / (exp(1) + exp(0)) is the chance that the chosen text wins."""
  loss, metrics = preference_loss(np.array([1.0]), np.array([0.0]))
  assert float(loss) == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)
  assert {name: float(value) for name, value in metrics.items()} == {
    "accuracy": 1.0, "margin": 1.0, "mean_reward": 0.5,
  }  # fmt: skip


def test_equal_rewards_cost_log_2_and_count_as_half_right():
  loss, metrics = preference_loss(np.zeros(3), np.zeros(3))
  assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
  assert float(metrics["accuracy"]) == 0.5


def test_metrics_by_hand():
  chosen, rejected = np.array([3.0, 1.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0, -2.0])
  _, metrics = preference_loss(chosen, rejected)
  expected = {"accuracy": 2.5 / 4, "margin": (2 - 1 + 0 + 4) / 4, "mean_reward": 7 / 8}
  assert {name: float(value) for name, value in metrics.items()} == expected
  _, metrics = preference_loss(chosen, rejected, weights=np.array([0.5, 0.0, 0.0, 0.25]))
  expected = {"accuracy": 1.0, "margin": 3.0, "mean_reward": 1.0}  # not weighted
  assert {name: float(value) for name, value in metrics.items()} == expected


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_loss_and_gradient_by_differences(center, margin, weights):
  w = np.full(SHAPE, 1 / 10) if weights is None else weights.astype(float)
  m = np.zeros(SHAPE) if margin is None else margin.astype(float)
  c, r = CHOSEN.astype(float), REJECTED.astype(float)
  with float64():
    value, gradients = jax.value_and_grad(
      lambda *pair: preference_loss(*pair, margin=margin, center=center, weights=weights)[0], (0, 1)
    )(jnp.asarray(c), jnp.asarray(r))
  assert value.dtype == np.float64
  assert float(value) == pytest.approx(plain(c, r, m, center, w), rel=1e-9)
  for which, gradient in enumerate(gradients):
    for i in np.ndindex(SHAPE):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [c.copy(), r.copy()]
        moved[which][i] += step
        ends.append(plain(*moved, m, center, w))
      assert gradient[i] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_the_gradient_is_the_formula_of_the_docstring():
  center = 0.2
  for which, sign in ((0, 1), (1, -1)):
    gradient = jax.grad(
      lambda *pair: preference_loss(*pair, margin=MARGIN, center=center, weights=WEIGHTS)[0], which
    )(jnp.asarray(CHOSEN), jnp.asarray(REJECTED))
    d = CHOSEN - REJECTED - MARGIN
    slope = sign * (1 / (1 + np.exp(-d)) - 1) + 2 * center * (CHOSEN + REJECTED)
    np.testing.assert_allclose(gradient, WEIGHTS * slope, atol=1e-5)


def test_without_centering_only_differences_count():
  loss = float(preference_loss(CHOSEN, REJECTED)[0])
  assert float(preference_loss(CHOSEN + 7, REJECTED + 7)[0]) == pytest.approx(loss, rel=1e-5)
  assert float(preference_loss(CHOSEN + 7, REJECTED + 7, center=0.1)[0]) > loss + 1


def test_a_margin_moves_the_difference():
  shifted, _ = preference_loss(CHOSEN - MARGIN, REJECTED)
  assert float(preference_loss(CHOSEN, REJECTED, margin=MARGIN)[0]) == pytest.approx(
    float(shifted), rel=1e-6
  )


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_large_differences_stay_finite(difference):
  """The loss of a lost pair grows linearly; that of a won one is 0."""
  loss, gradient = jax.value_and_grad(lambda c: preference_loss(c, jnp.zeros(1))[0])(
    jnp.array([difference])
  )
  assert (float(loss), gradient.tolist()) == ((0.0, [0.0]) if difference > 0 else (1e4, [-1.0]))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_pairs_of_weight_0_may_hold_anything(poison):
  def everything(chosen, rejected, margin):
    def call(*pair):
      return preference_loss(*pair, margin=margin, center=0.1, weights=WEIGHTS)

    return jax.value_and_grad(call, (0, 1), has_aux=True)(
      jnp.asarray(chosen), jnp.asarray(rejected)
    )

  clean = everything(CHOSEN, REJECTED, MARGIN)
  dirty = everything(*(np.where(REAL, x, poison) for x in (CHOSEN, REJECTED, MARGIN)))
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)
  assert REAL.any()
  assert not REAL.all()
  assert not any(np.asarray(gradient)[~REAL].any() for gradient in clean[1])


def test_padding_changes_nothing():
  def padded(x, value):
    return np.pad(x, [(0, 1), (2, 0)], constant_values=value)

  small = preference_loss(CHOSEN, REJECTED, margin=MARGIN, center=0.1, weights=WEIGHTS)
  large = preference_loss(
    padded(CHOSEN, 5), padded(REJECTED, 9), margin=padded(MARGIN, 3), center=0.1,
    weights=padded(WEIGHTS, 0),
  )  # fmt: skip
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), large, small)


def test_losses_of_micro_batches_add_up():
  weights = np.full(SHAPE, 1 / 10, np.float32)
  parts = [
    preference_loss(c, r, margin=m, center=0.1, weights=w)[0]
    for c, r, m, w in zip(CHOSEN, REJECTED, MARGIN, weights)
  ]
  whole, _ = preference_loss(CHOSEN, REJECTED, margin=MARGIN, center=0.1)
  assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_no_pairs_have_no_loss():
  loss, metrics = preference_loss(np.zeros(3), np.ones(3), weights=np.zeros(3))
  assert float(loss) == 0
  assert {float(value) for value in metrics.values()} == {0.0}
  assert float(preference_loss(np.zeros(0), np.zeros(0))[0]) == 0


def test_only_rewards_receive_gradient():
  def loss(margin, weights):
    return preference_loss(CHOSEN, REJECTED, margin=margin, weights=weights)[0]

  for gradient in jax.grad(loss, (0, 1))(jnp.asarray(MARGIN), jnp.asarray(WEIGHTS)):
    assert not gradient.any()
  for name in ("accuracy", "margin", "mean_reward"):
    gradient = jax.grad(lambda c, name=name: preference_loss(c, REJECTED)[1][name])(
      jnp.asarray(CHOSEN)
    )
    assert not gradient.any()


def test_integers_and_narrow_floats_are_widened():
  loss, _ = preference_loss(np.array([1, 2]), jnp.array([0.5, 0.25], jnp.bfloat16), margin=[0, 1])
  assert loss.dtype == np.float32
  # d is 0.5 and 0.75
  expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-0.75))) / 2
  assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_center_may_be_traced():
  losses = jax.jit(lambda center: preference_loss(CHOSEN, REJECTED, center=center)[0])(0.3)
  assert float(losses) == pytest.approx(float(preference_loss(CHOSEN, REJECTED, center=0.3)[0]))


def test_errors():
  with pytest.raises(ValueError, match=r"^rejected has shape \(2, 4\), expected \(2, 5\)"):
    preference_loss(CHOSEN, REJECTED[:, 1:])
  with pytest.raises(ValueError, match=r"^margin has shape \(5,\), expected \(2, 5\)"):
    preference_loss(CHOSEN, REJECTED, margin=MARGIN[0])
  with pytest.raises(ValueError, match=r"^weights has shape \(2, 1\), expected \(2, 5\)"):
    preference_loss(CHOSEN, REJECTED, weights=WEIGHTS[:, :1])
  with pytest.raises(ValueError, match=r"^chosen must be an array of numbers"):
    preference_loss("good", "bad")
  with pytest.raises(ValueError, match=r"^rejected must be real, got dtype complex64"):
    preference_loss(CHOSEN, REJECTED * np.complex64(1j))
  for center in (-0.1, math.nan, math.inf, np.float32(-1)):
    with pytest.raises(ValueError, match=r"^center must be a finite number of at least 0, got "):
      preference_loss(CHOSEN, REJECTED, center=center)
  preference_loss(CHOSEN, REJECTED, center=0)
