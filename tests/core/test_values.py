"""Tests `gae`, its whitened form and `value_loss` against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import gae, value_loss
from grpo_jax.core.values import gae_advantages, gae_whitened, returns_whitened
from tests.helpers.arrays import float64

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 7)
# The policy's own tokens: with observations between them, padding after them, and an empty row.
MASK = np.array(
  [
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]],
    [[1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0]],
  ],
  bool,
)
REWARDS, VALUES = RNG.normal(size=(2, *SHAPE)).astype(np.float32)


def plain_gae(rewards, values, mask, gamma, lam):
  """Returns `sum_k (gamma lam)^k delta_(t+k)` over the dense row of own tokens."""
  advantages, returns = np.zeros((2, *mask.shape))
  for row in np.ndindex(mask.shape[:-1]):
    own = np.flatnonzero(mask[row])
    r, v = rewards[row][own].astype(float), np.append(values[row][own], 0.0)
    deltas = r + gamma * v[1:] - v[:-1]
    for i, slot in enumerate(own):
      advantages[row][slot] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
      returns[row][slot] = advantages[row][slot] + v[i]
  return advantages, returns


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_is_the_sum_of_its_definition(gamma, lam):
  actual = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
  for a, b in zip(actual, plain_gae(REWARDS, VALUES, MASK, gamma, lam)):
    np.testing.assert_allclose(a, b, atol=2e-6)
  np.testing.assert_array_equal(
    gae_advantages(REWARDS, VALUES, MASK, gamma=gamma, lam=lam), actual[0]
  )


def test_defaults_are_gamma_1_and_lambda_095():
  for a, b in zip(gae(REWARDS, VALUES, MASK), gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)):
    np.testing.assert_array_equal(a, b)
  alone = gae_advantages(REWARDS, VALUES, MASK)
  np.testing.assert_array_equal(alone, gae(REWARDS, VALUES, MASK)[0])


def test_with_gamma_and_lambda_1_returns_are_rewards_to_go():
  _, returns = gae(REWARDS, VALUES, np.ones(SHAPE, bool), lam=1.0)
  to_go = np.flip(np.cumsum(np.flip(REWARDS, -1), -1), -1)
  np.testing.assert_allclose(returns, to_go, atol=1e-5)


def test_gae_of_long_rows():
  rewards, values = RNG.normal(size=(2, 1, 3000))
  mask = RNG.random((1, 3000)) < 0.7
  with float64():
    actual = gae(rewards, values, mask, gamma=0.999, lam=0.97)
  for a, b in zip(actual, plain_gae(rewards, values, mask, 0.999, 0.97)):
    np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_slots_of_gae_may_hold_anything(poison):
  rewards, values = (np.where(MASK, x, poison).astype(np.float32) for x in (REWARDS, VALUES))
  for function in (gae, lambda *a: (gae_whitened(*a),)):
    for a, b in zip(function(rewards, values, MASK), function(REWARDS, VALUES, MASK)):
      np.testing.assert_array_equal(a, b)
      assert not a[~MASK].any()


def test_padding_rows_and_columns_change_nothing():
  pad = [(0, 1), (0, 0), (2, 3)]
  padded = [
    np.pad(x, pad, constant_values=c) for x, c in ((REWARDS, 5), (VALUES, 5), (MASK, False))
  ]
  for function in (gae, lambda *a: (gae_whitened(*a),)):
    for a, b in zip(function(*padded), function(REWARDS, VALUES, MASK)):
      np.testing.assert_allclose(a[:2, :, 2:-3], b, atol=1e-6)


def test_a_sequence_that_was_not_scored_has_no_advantage_and_keeps_its_values():
  rewards = REWARDS.copy()
  rewards[0, 0, -1] = np.nan
  advantages, returns = gae(rewards, VALUES, MASK)
  others = np.ones(SHAPE[:2], bool)
  others[0, 0] = False
  for a, b in zip((advantages, returns), gae(REWARDS, VALUES, MASK)):
    np.testing.assert_array_equal(a[others], b[others])
  assert not advantages[0, 0].any()
  np.testing.assert_array_equal(returns[0, 0], VALUES[0, 0])
  white = gae_whitened(rewards, VALUES, MASK)
  assert not white[0, 0].any()
  scored = MASK.copy()
  scored[0, 0] = False
  np.testing.assert_array_equal(white, gae_whitened(REWARDS, VALUES, scored))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_whitened_advantages_have_mean_0_and_deviation_1(gamma):
  white = np.asarray(gae_whitened(REWARDS, VALUES, MASK, gamma=gamma, lam=0.8))
  plain, _ = plain_gae(REWARDS, VALUES, MASK, gamma, 0.8)
  own = plain[MASK]
  np.testing.assert_allclose(white[MASK], (own - own.mean()) / own.std(ddof=1), atol=1e-5)


def test_equal_advantages_and_single_tokens_are_whitened_to_0():
  ones = np.ones((2, 1, 1), np.float32)
  np.testing.assert_array_equal(gae_whitened(ones, 0 * ones, ones.astype(bool)), 0 * ones)
  np.testing.assert_array_equal(gae_whitened(ones[:1], 0 * ones[:1], ones[:1].astype(bool)), 0.0)
  assert gae_whitened(ones, 0 * ones, np.zeros((2, 1, 1), bool)).sum() == 0


def test_eps_of_whitening():
  rewards = np.array([[[3.0], [1.0]]], np.float32)
  white = gae_whitened(rewards, 0 * rewards, np.ones((1, 2, 1), bool), eps=1.0)
  np.testing.assert_allclose(white[0, :, 0], np.array([1, -1]) / (2**0.5 + 1), rtol=1e-6)
  returns = returns_whitened(rewards, np.ones((1, 2, 1), bool), eps=1.0)
  np.testing.assert_allclose(returns, white, rtol=1e-6)
  # By default it is 1e-8, which counts beside a deviation of the root of 2e-16.
  small = [1e-8 * rewards, 0 * rewards, np.ones((1, 2, 1), bool)]
  expected = np.array([1, -1]) / (2**0.5 + 1)
  for white in (gae_whitened(*small), returns_whitened(small[0], small[2])):
    np.testing.assert_allclose(white[0, :, 0], expected, rtol=1e-5)


def test_advantages_and_returns_carry_no_gradient():
  def total(rewards, values):
    advantages, returns = gae(rewards, values, MASK)
    return (advantages**2 + returns**2 + gae_whitened(rewards, values, MASK) ** 3).sum()

  for gradient in jax.grad(total, (0, 1))(jnp.asarray(REWARDS), jnp.asarray(VALUES)):
    assert not gradient.any()


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), np.float32(2)])
def test_gamma_and_lambda_outside_0_and_1(name, value):
  with pytest.raises(ValueError, match=rf"^{name} must lie in \[0, 1\], got "):
    gae(REWARDS, VALUES, MASK, **{name: value})
  gae(REWARDS, VALUES, MASK, **{name: 0.0})
  gae(REWARDS, VALUES, MASK, **{name: 1})


def test_shapes_of_gae():
  with pytest.raises(ValueError, match=r"^rewards has shape \(2, 3\), expected \(2, 3, 7\)"):
    gae(REWARDS[..., 0], VALUES, MASK)
  with pytest.raises(ValueError, match=r"^mask has shape \(2, 3\), expected \(2, 3, 7\)"):
    gae(REWARDS, VALUES, MASK[..., 0])
  with pytest.raises(ValueError, match=r"^values has shape \(\), expected at least one axis"):
    gae(1.0, 1.0, True)


# --- value_loss ----------------------------------------------------------------------------------

RETURNS, OLD = RNG.normal(size=(2, *SHAPE)).astype(np.float32)


def plain_value_loss(values, returns, weights, old=None, clip=None):
  error = (values - returns) ** 2
  if clip is not None:
    held = np.minimum(np.maximum(values, old - clip), old + clip)
    error = np.maximum(error, (held - returns) ** 2)
  return (weights * error).sum() / 2


@pytest.mark.parametrize("clip", [None, 0.1, 0.5, 100.0])
def test_value_loss_and_its_gradient_by_differences(clip):
  old = None if clip is None else OLD
  weights = np.where(MASK, RNG.random(SHAPE), 0.0)
  with float64():
    loss = lambda v: value_loss(v, RETURNS, MASK, old_values=old, clip=clip, weights=weights)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(VALUES, float))
  plain = lambda v: plain_value_loss(v, RETURNS.astype(float), weights, OLD, clip)  # noqa: E731
  assert float(value) == pytest.approx(plain(VALUES.astype(float)), abs=1e-9)
  expected = np.zeros(SHAPE)
  for i in np.ndindex(SHAPE):
    up, down = VALUES.astype(float), VALUES.astype(float)
    up[i] += 1e-6
    down[i] -= 1e-6
    expected[i] = (plain(up) - plain(down)) / 2e-6
  np.testing.assert_allclose(gradient, expected, atol=1e-7)
  assert clip not in (0.1,) or (np.asarray(gradient)[MASK] == 0).any()


def test_weights_default_to_one_over_the_tokens_of_the_batch():
  loss, _ = value_loss(VALUES, RETURNS, MASK)
  error = ((VALUES - RETURNS)[MASK] ** 2).mean() / 2
  assert float(loss) == pytest.approx(error, rel=1e-5)


def test_losses_of_micro_batches_add_up():
  weights = np.where(MASK, 1 / MASK.sum(), 0.0).astype(np.float32)
  arguments = (VALUES, RETURNS, MASK, OLD, weights)
  parts = [
    value_loss(v, r, m, old_values=o, clip=0.2, weights=w)[0] for v, r, m, o, w in zip(*arguments)
  ]
  whole, _ = value_loss(VALUES, RETURNS, MASK, old_values=OLD, clip=0.2)
  assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_slots_of_value_loss_may_hold_anything(poison):
  def both(values, returns, old, weights):
    call = lambda v: value_loss(v, returns, MASK, old_values=old, clip=0.2, weights=weights)  # noqa: E731
    (loss, metrics), gradient = jax.value_and_grad(call, has_aux=True)(jnp.asarray(values))
    return loss, metrics, gradient

  arrays = (VALUES, RETURNS, OLD, np.abs(OLD))
  clean = both(*arrays)
  poisoned = both(*(np.where(MASK, x, poison).astype(np.float32) for x in arrays))
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  assert not clean[2][~MASK].any()


def test_only_values_receive_gradient():
  def loss(returns, old, weights):
    return value_loss(VALUES, returns, MASK, old_values=old, clip=0.2, weights=weights)[0]

  for gradient in jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, (RETURNS, OLD, OLD))):
    assert not gradient.any()


def test_metrics_of_the_critic_by_hand():
  values, returns = np.array([[0.0, 2.0, 7.0]]), np.array([[1.0, 2.5, 7.0]])
  mask = np.array([[True, True, False]])
  # The first is held at 0.9 - 0.5 = 0.4, closer to its target than 0: no effect. The second is
  # held at 1.5, further away: no gradient.
  old = np.array([[0.9, 1.0, 0.0]])
  _, metrics = value_loss(values, returns, mask, old_values=old, clip=0.5)
  expected = {"critic/values_mean": 1.0, "critic/error": 0.75, "critic/clip_ratio": 0.5}
  assert {name: float(value) for name, value in metrics.items()} == expected
  _, metrics = value_loss(values, returns, mask)
  assert {name: float(value) for name, value in metrics.items()} == expected | {
    "critic/clip_ratio": 0.0
  }
  for name in expected:
    slope = jax.grad(lambda v, name=name: value_loss(v, returns, mask)[1][name])(values)
    assert not slope.any()


def test_errors_of_value_loss():
  with pytest.raises(ValueError, match=r"^clip=0.2 needs old_values, the values before"):
    value_loss(VALUES, RETURNS, MASK, clip=0.2)
  with pytest.raises(ValueError, match=r"^clip must be a finite number above 0, got 0"):
    value_loss(VALUES, RETURNS, MASK, old_values=OLD, clip=0)
  with pytest.raises(ValueError, match=r"^returns has shape \(2, 3\), expected \(2, 3, 7\)"):
    value_loss(VALUES, RETURNS[..., 0], MASK)
  with pytest.raises(ValueError, match=r"^weights has shape \(2, 3\), expected \(2, 3, 7\)"):
    value_loss(VALUES, RETURNS, MASK, weights=np.ones((2, 3)))
  with pytest.raises(ValueError, match=r"^old_values has shape"):
    value_loss(VALUES, RETURNS, MASK, old_values=OLD[0], clip=0.1)
  with pytest.raises(ValueError, match=r"^values has shape \(\), expected at least one axis"):
    value_loss(1.0, 1.0, True)
