"""The parts of one token's loss: KL estimators, ratios, trust regions, corrections, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import kl_k1, kl_k2, kl_k3
from grpo_jax.core import terms

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def close(got, wanted, rtol=2e-6, atol=1e-6):
  np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=rtol, atol=atol)


# --- exp that stays finite -----------------------------------------------------------------------


def test_finite_exp_is_exp_up_to_20_and_a_line_above():
  x = jnp.array([-100.0, -1.0, 0.0, 1.0, 20.0, 21.0, 100.0])
  top = np.exp(20.0)
  wanted = [np.exp(-100.0), np.exp(-1.0), 1.0, np.exp(1.0), top, 2 * top, 81 * top]
  close(terms.finite_exp(x), wanted, rtol=1e-5)
  slopes = jax.vmap(jax.grad(terms.finite_exp))(x)
  close(slopes, [np.exp(-100.0), np.exp(-1.0), 1.0, np.exp(1.0), top, top, top], rtol=1e-5)


# --- KL ------------------------------------------------------------------------------------------

LOGP, REF = np.log([0.5, 0.2, 0.9, 0.3]), np.log([0.25, 0.4, 0.9, 0.6])
# ref / policy is 1/2, 2, 1, 2
KL_VALUES = {
  "none": [0, 0, 0, 0],
  "k1": [np.log(2), -np.log(2), 0, -np.log(2)],
  "k2": [np.log(2) ** 2 / 2] * 2 + [0, np.log(2) ** 2 / 2],
  "k3": [0.5 + np.log(2) - 1, 2 - np.log(2) - 1, 0, 2 - np.log(2) - 1],
}
KL_GRADIENTS = {  # with respect to logp
  "none": [0, 0, 0, 0],
  "k1": [1, 1, 1, 1],
  "k2": [np.log(2), -np.log(2), 0, -np.log(2)],
  "k3": [1 - 0.5, 1 - 2, 0, 1 - 2],
}
RATIO = np.array([1.0, 1.0, 2.0, 0.5])  # policy / old policy
KL_VALUES["k3_k2_gradient"] = KL_VALUES["k3"]
KL_GRADIENTS["k3_k2_gradient"] = KL_GRADIENTS["k2"]
KL_VALUES["k3_ratio"] = np.array(KL_VALUES["k3"]) * RATIO
# the ratio has a gradient too: (k3 r)' = k3' r + k3 r
KL_GRADIENTS["k3_ratio"] = (np.array(KL_GRADIENTS["k3"]) + KL_VALUES["k3"]) * RATIO


@pytest.mark.parametrize("name", terms.KLS)
def test_kl(name):
  old = jnp.asarray(LOGP) - jnp.log(RATIO)

  def total(logp):
    kl = terms.KLS[name](logp, jnp.asarray(REF), jnp.exp(logp - old))
    return kl.sum(), kl

  gradient, value = jax.grad(total, has_aux=True)(jnp.asarray(LOGP))
  close(value, KL_VALUES[name])
  close(gradient, KL_GRADIENTS[name])


@pytest.mark.parametrize(("function", "name"), [(kl_k1, "k1"), (kl_k2, "k2"), (kl_k3, "k3")])
def test_public_kl(function, name):
  close(function(LOGP, REF), KL_VALUES[name])
  close(jax.jit(jax.vmap(function))(LOGP, REF), KL_VALUES[name])
  # with respect to the reference it is a gradient as well: k1 and k3 by hand
  by_ref = jax.grad(lambda ref: function(jnp.asarray(LOGP), ref).sum())(jnp.asarray(REF))
  close(by_ref, -np.array(KL_GRADIENTS[name]))
  half = function(jnp.asarray(LOGP, jnp.bfloat16), jnp.asarray(REF, jnp.float16))
  assert half.dtype == jnp.float32
  close(half, KL_VALUES[name], atol=0.01)


@pytest.mark.parametrize("function", [kl_k1, kl_k2, kl_k3])
def test_kl_of_far_apart_policies_is_finite(function):
  logp, ref = jnp.array([-100.0, 0.0]), jnp.array([0.0, -100.0])
  gradient, value = jax.grad(lambda x: (function(x, ref).sum(), function(x, ref)), has_aux=True)(
    logp
  )
  assert np.isfinite(value).all()
  assert np.isfinite(gradient).all()
  if function is kl_k3:  # the line: e^20 (1 + 80) - 101 and slope 1 - e^20; the other side is exact
    close(value, [81 * np.exp(20.0), 99.0], rtol=1e-5)
    close(gradient, [1 - np.exp(20.0), 1.0], rtol=1e-5)


def test_k3_is_never_negative_and_precise_near_zero():
  difference = np.array([1e-3, 1e-2, 0.1, -1e-3, -1e-2, -0.1, 0.0], np.float32)
  exact = np.exp(-difference.astype(float)) + difference.astype(float) - 1
  got = np.asarray(kl_k3(difference, np.zeros(7, np.float32)))
  assert (got >= 0).all()
  np.testing.assert_allclose(got, exact, rtol=2e-3)


def test_kl_in_float64(x64):
  assert kl_k3(LOGP, REF).dtype == jnp.float64
  close(kl_k3(LOGP, REF), KL_VALUES["k3"], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("function", [kl_k1, kl_k2, kl_k3])
def test_kl_names_a_bad_argument(function):
  with pytest.raises(ValueError, match=r"^ref_logp must be real, got dtype complex64"):
    function(LOGP, jnp.zeros(4, jnp.complex64))
  with pytest.raises(ValueError, match=r"^logp must be an array of numbers, got None"):
    function(None, REF)
  with pytest.raises(ValueError, match=r"^ref_logp has shape \(3,\), expected \(4,\)"):
    function(LOGP, REF[:3])


# --- ratio level ---------------------------------------------------------------------------------

RATIO_MASK = np.array([[True, True, True], [True, False, False], [False, False, False]])
LOG_RATIOS = np.array([[0.3, -0.6, 0.9], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
MEAN = np.array([[0.2] * 3, [0.5] * 3, [0.0] * 3])
COTANGENT = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
LEVELS = {
  "token": (LOG_RATIOS, COTANGENT),
  # every token of a sequence has a third (its length) of the sum of the cotangents, 7
  "sequence": (MEAN, [[7 / 3] * 3, [3.0] * 3, [0.0] * 3]),
  "sequence_token": (MEAN, COTANGENT),
}


@pytest.mark.parametrize("name", terms.RATIOS)
def test_ratio_levels(name):
  old = jnp.full((3, 3), -1.0)

  def total(logp):
    log_ratio = terms.RATIOS[name](logp, old, jnp.asarray(RATIO_MASK))
    return (log_ratio * COTANGENT).sum(), log_ratio

  gradient, value = jax.grad(total, has_aux=True)(old + LOG_RATIOS)
  close(value, LEVELS[name][0])
  close(gradient, LEVELS[name][1])


# --- trust regions -------------------------------------------------------------------------------

OLD_P = 0.2
P = np.array([0.1, 0.18, 0.2, 0.22, 0.3, 0.8])
R = np.array([0.5, 0.9, 1.0, 1.1, 1.5, 4.0])
N, Y = False, True


def sapo(tau, a):
  """Value and slope in logp of (4 / tau) sigmoid(tau (r - 1)) a."""
  s = 1 / (1 + np.exp(-tau * (R - 1)))
  return 4 / tau * s * a, 4 * s * (1 - s) * R * a


def by_logp(weight):
  """Regions of the form (weight without gradient) * logp."""
  return np.array(weight) * np.log(P), weight


# (settings, for A = 2: objective, slope, high; for A = -2: objective, slope, low)
REGIONS = {
  "none": ({}, 2 * R, 2 * R, [N] * 6, -2 * R, -2 * R, [N] * 6),
  "clip": (
    {"clip_low": 0.2, "clip_high": 0.3},
    [1.0, 1.8, 2.0, 2.2, 2.6, 2.6],
    [1.0, 1.8, 2.0, 2.2, 0.0, 0.0],
    [N, N, N, N, Y, Y],
    [-1.6, -1.8, -2.0, -2.2, -3.0, -8.0],
    [0.0, -1.8, -2.0, -2.2, -3.0, -8.0],
    [Y, N, N, N, N, N],
  ),
  "dual_clip": (
    {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0},
    [1.0, 1.8, 2.0, 2.2, 2.6, 2.6],
    [1.0, 1.8, 2.0, 2.2, 0.0, 0.0],
    [N, N, N, N, Y, Y],
    [-1.6, -1.8, -2.0, -2.2, -3.0, -6.0],
    [0.0, -1.8, -2.0, -2.2, -3.0, 0.0],
    [Y, N, N, N, N, N],
  ),
  "cispo": (
    {"ratio_min": 0.6, "ratio_max": 1.4},
    *by_logp([1.2, 1.8, 2.0, 2.2, 2.8, 2.8]),
    [N, N, N, N, Y, Y],
    *by_logp([-1.2, -1.8, -2.0, -2.2, -2.8, -2.8]),
    [Y, N, N, N, N, N],
  ),
  "sapo": (
    {"tau_positive": 0.5, "tau_negative": 2.0},
    *sapo(0.5, 2.0),
    [N] * 6,
    *sapo(2.0, -2.0),
    [N] * 6,
  ),
  "dppo_tv": (  # the probability has moved by -0.1, -0.02, 0, 0.02, 0.1, 0.6
    {"divergence": 0.05, "ratio_max": 3.0},
    *by_logp([1.0, 1.8, 2.0, 2.2, 0.0, 0.0]),
    [N, N, N, N, Y, Y],
    *by_logp([0.0, -1.8, -2.0, -2.2, -3.0, -6.0]),
    [Y, N, N, N, N, N],
  ),
}


def evaluate(name, settings, logp, old, a):
  """Objective, its slope in logp, and where the region binds."""

  def total(logp):
    objective, low, high = terms.TRUST_REGIONS[name](logp - old, logp, old, a, **settings)
    return objective.sum(), (objective, low, high)

  slope, (objective, low, high) = jax.jit(jax.grad(total, has_aux=True))(logp)
  return objective, slope, low, high


@pytest.mark.parametrize("name", terms.TRUST_REGIONS)
def test_trust_regions_by_hand(name):
  settings, up, up_slope, high, down, down_slope, low = REGIONS[name]
  logp = jnp.log(jnp.asarray(np.concatenate([P, P, P])))
  old = jnp.full(18, np.log(OLD_P))
  a = jnp.repeat(jnp.array([2.0, -2.0, 0.0]), 6)
  got = evaluate(name, settings, logp, old, a)
  nothing, never = np.zeros(6), [N] * 6
  close(got[0], np.concatenate([up, down, nothing]))
  close(got[1], np.concatenate([up_slope, down_slope, nothing]), atol=3e-6)
  assert got[2].tolist() == [*never, *low, *never]
  assert got[3].tolist() == [*high, *never, *never]


@pytest.mark.parametrize("name", ["clip", "dual_clip"])
def test_a_ratio_on_the_bound_keeps_its_gradient(name):
  """With bounds of 1 an on-policy ratio is on both; `minimum` and `clip` would halve the slope."""
  settings = {"clip_low": 0.0, "clip_high": 0.0}
  if name == "dual_clip":
    settings["clip_dual"] = 3.0
  logp = jnp.log(jnp.array([0.3, 0.3]))
  objective, slope, low, high = evaluate(name, settings, logp, logp, jnp.array([2.0, -2.0]))
  assert objective.tolist() == slope.tolist() == [2.0, -2.0]
  assert not low.any()
  assert not high.any()


@pytest.mark.parametrize("name", terms.TRUST_REGIONS)
def test_log_ratios_of_100_are_finite(name):
  logp, old = jnp.array([0.0, -100.0, 0.0, -100.0]), jnp.array([-100.0, 0.0, -100.0, 0.0])
  a = jnp.array([1.0, 1.0, -1.0, -1.0])
  objective, slope, _, _ = evaluate(name, REGIONS[name][0], logp, old, a)
  assert np.isfinite(objective).all()
  assert np.isfinite(slope).all()


# --- sampler corrections -------------------------------------------------------------------------

GAPS = np.log([[0.1, 0.5, 1.0, 3.0], [1.2, 0.5, 1.0, 1.0]])  # products 0.15 and 0.6
CORRECTED = {
  "none": ({}, [[1.0] * 4] * 2),
  "token_truncate": ({"correction_max": 2.0}, [[0.1, 0.5, 1.0, 2.0], [1.2, 0.5, 1.0, 1.0]]),
  "token_mask": (
    {"correction_min": 0.4, "correction_max": 2.0},
    [[0.0, 0.5, 1.0, 0.0], [1.2, 0.5, 1.0, 1.0]],
  ),
  "sequence_mask": ({"correction_min": 0.4, "correction_max": 2.0}, [[0.0] * 4, [0.6] * 4]),
}


@pytest.mark.parametrize("name", terms.CORRECTIONS)
def test_corrections(name):
  settings, wanted = CORRECTED[name]
  close(terms.CORRECTIONS[name](jnp.asarray(GAPS), jnp.ones((2, 4), bool), **settings), wanted)


def test_a_whole_sequence_is_dropped_above_the_bound_too():
  weight = terms.CORRECTIONS["sequence_mask"](
    jnp.log(jnp.array([[2.0, 2.0], [2.0, 0.5]])),
    jnp.ones((2, 2), bool),
    correction_min=0.5,
    correction_max=3.0,
  )
  close(weight, [[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("name", terms.CORRECTIONS)
def test_corrections_of_far_apart_samplers_are_finite(name):
  gaps = jnp.array([[100.0, -100.0], [100.0, 100.0], [-100.0, -100.0]])
  weight = terms.CORRECTIONS[name](gaps, jnp.ones((3, 2), bool), **CORRECTED[name][0])
  assert np.isfinite(weight).all()


def test_every_choice_is_tested():
  assert set(KL_VALUES) == set(KL_GRADIENTS) == set(terms.KLS)
  assert set(LEVELS) == set(terms.RATIOS)
  assert set(REGIONS) == set(terms.TRUST_REGIONS)
  assert set(CORRECTED) == set(terms.CORRECTIONS)
