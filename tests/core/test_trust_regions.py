"""Tests trust regions against objectives, gradients and bounds computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.trust_regions import TRUST_REGIONS
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

OLD_P = 0.2
P = np.array([0.1, 0.18, 0.2, 0.22, 0.3, 0.8])
R = np.array([0.5, 0.9, 1.0, 1.1, 1.5, 4.0])
N, Y = False, True


def sapo(tau, a):
  """Returns the value of (4 / tau) sigmoid(tau (r - 1)) a and its slope in logp."""
  s = 1 / (1 + np.exp(-tau * (R - 1)))
  return 4 / tau * s * a, 4 * s * (1 - s) * R * a


def by_logp(weights):
  """Returns value and slope of a region of the form `stop_gradient(weights) * logp`."""
  return np.array(weights) * np.log(P), weights


NEVER = [N] * 6
# Settings; for A = 2 and for A = -2: objective, slope, low, high. At A = 0 all of them are 0.
REGIONS = {
  "none": ({}, (2 * R, 2 * R, NEVER, NEVER), (-2 * R, -2 * R, NEVER, NEVER)),
  "clip": (
    {"clip_low": 0.2, "clip_high": 0.3},
    ([1.0, 1.8, 2.0, 2.2, 2.6, 2.6], [1.0, 1.8, 2.0, 2.2, 0.0, 0.0], NEVER, [N, N, N, N, Y, Y]),
    (
      [-1.6, -1.8, -2.0, -2.2, -3.0, -8.0],
      [0.0, -1.8, -2.0, -2.2, -3.0, -8.0],
      [Y, N, N, N, N, N],
      NEVER,
    ),
  ),
  "dual_clip": (  # above 3, a token with A < 0 has no gradient either
    {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0},
    ([1.0, 1.8, 2.0, 2.2, 2.6, 2.6], [1.0, 1.8, 2.0, 2.2, 0.0, 0.0], NEVER, [N, N, N, N, Y, Y]),
    (
      [-1.6, -1.8, -2.0, -2.2, -3.0, -6.0],
      [0.0, -1.8, -2.0, -2.2, -3.0, 0.0],
      [Y, N, N, N, N, N],
      [N, N, N, N, N, Y],
    ),
  ),
  "cispo": (  # both bounds hold for both signs of A
    {"ratio_min": 0.6, "ratio_max": 1.4},
    (*by_logp([1.2, 1.8, 2.0, 2.2, 2.8, 2.8]), [Y, N, N, N, N, N], [N, N, N, N, Y, Y]),
    (*by_logp([-1.2, -1.8, -2.0, -2.2, -2.8, -2.8]), [Y, N, N, N, N, N], [N, N, N, N, Y, Y]),
  ),
  "sapo": (
    {"tau_positive": 0.5, "tau_negative": 2.0},
    (*sapo(0.5, 2.0), NEVER, NEVER),
    (*sapo(2.0, -2.0), NEVER, NEVER),
  ),
  "dppo_tv": (  # the probability has moved by -0.1, -0.02, 0, 0.02, 0.1, 0.6
    {"divergence": 0.05, "ratio_max": 3.0},
    (*by_logp([1.0, 1.8, 2.0, 2.2, 0.0, 0.0]), NEVER, [N, N, N, N, Y, Y]),
    (
      *by_logp([0.0, -1.8, -2.0, -2.2, -3.0, -6.0]),
      [Y, N, N, N, N, N],
      [N, N, N, N, N, Y],  # the ratio of 4 counts as 3
    ),
  ),
}


def evaluate(name, settings, logp, old, a):
  """Returns the objective, its slope in logp, and where the region binds."""

  def total(logp):
    objective, low, high = TRUST_REGIONS[name](logp - old, logp, old, a, **settings)
    return objective.sum(), (objective, low, high)

  slope, (objective, low, high) = jax.jit(jax.grad(total, has_aux=True))(logp)
  return objective, slope, low, high


@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_objective_slope_and_bounds(name):
  settings, up, down = REGIONS[name]
  logp = jnp.log(jnp.asarray(np.concatenate([P, P, P])))
  old = jnp.full(18, np.log(OLD_P))
  a = jnp.repeat(jnp.array([2.0, -2.0, 0.0]), 6)
  objective, slope, low, high = evaluate(name, settings, logp, old, a)
  zero = np.zeros(6)
  assert_close(objective, np.concatenate([up[0], down[0], zero]))
  assert_close(slope, np.concatenate([up[1], down[1], zero]), atol=3e-6)
  assert low.tolist() == [*up[2], *down[2], *NEVER]
  assert high.tolist() == [*up[3], *down[3], *NEVER]


@pytest.mark.parametrize("name", sorted(set(TRUST_REGIONS) - {"sapo"}))
def test_a_bound_counts_where_it_changes_the_gradient(name):
  """The gradient is `ratio * A` at every other token; the shares follow from that alone."""
  settings, *_ = REGIONS[name]
  logp, old = jnp.log(jnp.asarray(np.concatenate([P, P]))), jnp.full(12, np.log(OLD_P))
  a = jnp.repeat(jnp.array([2.0, -2.0]), 6)
  _, slope, low, high = evaluate(name, settings, logp, old, a)
  free = np.concatenate([2 * R, -2 * R])
  changed = np.abs(np.asarray(slope) - free) > 1e-4
  np.testing.assert_array_equal(np.asarray(low | high), changed)
  np.testing.assert_array_equal(np.asarray(low), changed & (np.concatenate([R, R]) < 1))
  assert not (low & high).any()


def test_a_token_below_one_bound_and_above_another_counts_once():
  """The ratio of a sequence, 9, is above the cap; this token's probability fell from 0.5 to 0.1."""
  logp, old = jnp.log(jnp.array([0.1])), jnp.log(jnp.array([0.5]))
  settings = {"divergence": 0.15, "ratio_max": 3.0}
  log_ratio = jnp.log(jnp.array([9.0]))
  for sign, expected in ((-1.0, (True, False)), (1.0, (False, True))):
    _, low, high = TRUST_REGIONS["dppo_tv"](log_ratio, logp, old, jnp.array([sign]), **settings)
    assert (bool(low[0]), bool(high[0])) == expected


@pytest.mark.parametrize("name", ["clip", "dual_clip"])
def test_a_ratio_on_the_bound_keeps_its_gradient(name):
  """With all bounds at 1, `minimum` and `clip` would halve the on-policy gradient."""
  settings = {"clip_low": 0.0, "clip_high": 0.0}
  if name == "dual_clip":
    settings["clip_dual"] = 1.0
  logp = jnp.log(jnp.array([0.3, 0.3]))
  objective, slope, low, high = evaluate(name, settings, logp, logp, jnp.array([2.0, -2.0]))
  assert objective.tolist() == slope.tolist() == [2.0, -2.0]
  assert not low.any()
  assert not high.any()


def one_token(name, ratio, advantage, old=0.25, **settings):
  """Returns (objective, low, high) of a single token whose old probability is `old`."""
  log_ratio = jnp.log(jnp.array([ratio]))
  old = jnp.log(jnp.array([old]))
  result = TRUST_REGIONS[name](log_ratio, log_ratio + old, old, jnp.array([advantage]), **settings)
  return [float(x[0]) for x in result]


@pytest.mark.parametrize("a", [0.5, -0.5])
def test_small_advantages_have_a_sign_too(a):
  """The regions depend on the sign of the advantage, not on a threshold such as 1."""
  clip = {"clip_low": 0.25, "clip_high": 0.5}
  too_high, too_low = [2.0, a], [0.5, a]
  np.testing.assert_allclose(
    one_token("clip", *too_high, **clip), [1.5 * a, 0, 1] if a > 0 else [2 * a, 0, 0]
  )
  np.testing.assert_allclose(
    one_token("clip", *too_low, **clip), [0.5 * a, 0, 0] if a > 0 else [0.75 * a, 1, 0]
  )
  np.testing.assert_allclose(
    one_token("dual_clip", 8.0, a, **clip, clip_dual=3.0),
    [1.5 * a, 0, 1] if a > 0 else [3 * a, 0, 1],
  )
  cispo = {"ratio_min": 0.75, "ratio_max": 1.5}
  logp = np.log(0.25 * 2), np.log(0.25 * 0.5)
  np.testing.assert_allclose(one_token("cispo", *too_high, **cispo), [1.5 * a * logp[0], 0, 1])
  np.testing.assert_allclose(one_token("cispo", *too_low, **cispo), [0.75 * a * logp[1], 1, 0])
  # At ratio 1 + 1 / tau the gate is 4 / tau * sigmoid(1).
  tau = 2.0 if a > 0 else 4.0
  gate = 4 / tau / (1 + np.exp(-1))
  sapo_result = one_token("sapo", 1 + 1 / tau, a, tau_positive=2.0, tau_negative=4.0)
  np.testing.assert_allclose(sapo_result, [gate * a, 0, 0], rtol=1e-6)
  dppo = {"divergence": 0.1, "ratio_max": 9.0}
  up, down = 2 * a * logp[0], 0.5 * a * logp[1]
  np.testing.assert_allclose(
    one_token("dppo_tv", *too_high, **dppo), [0, 0, 1] if a > 0 else [up, 0, 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    one_token("dppo_tv", *too_low, **dppo), [down, 0, 0] if a > 0 else [0, 1, 0], rtol=1e-6
  )


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_a_ratio_on_the_bound_is_inside(a):
  """The ratio is exactly 1, and the regions end there."""
  inside = [a * np.log(0.25), 0.0, 0.0]
  on_bound = one_token("cispo", 1.0, a, ratio_min=1.0, ratio_max=1.0)
  np.testing.assert_allclose(on_bound, inside, rtol=1e-6)
  unmoved = one_token("dppo_tv", 1.0, a, divergence=0.0, ratio_max=1.0)
  np.testing.assert_allclose(unmoved, inside, rtol=1e-6)


@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_log_ratios_of_100_are_finite(name):
  logp, old = jnp.array([0.0, -100.0, 0.0, -100.0]), jnp.array([-100.0, 0.0, -100.0, 0.0])
  a = jnp.array([1.0, 1.0, -1.0, -1.0])
  objective, slope, _, _ = evaluate(name, REGIONS[name][0], logp, old, a)
  assert np.isfinite(objective).all()
  assert np.isfinite(slope).all()


def test_every_trust_region_is_tested():
  assert set(REGIONS) == set(TRUST_REGIONS)
