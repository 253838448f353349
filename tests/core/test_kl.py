"""Tests KL estimators against values and gradients computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import kl_k1, kl_k2, kl_k3
from grpo_jax.core.kl import KLS
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

LOGP, REF = np.log([0.5, 0.2, 0.9, 0.3]), np.log([0.25, 0.4, 0.9, 0.6])
# reference / policy is 1/2, 2, 1, 2
VALUES = {
  "none": [0, 0, 0, 0],
  "k1": [np.log(2), -np.log(2), 0, -np.log(2)],
  "k2": [np.log(2) ** 2 / 2] * 2 + [0, np.log(2) ** 2 / 2],
  "k3": [0.5 + np.log(2) - 1, 2 - np.log(2) - 1, 0, 2 - np.log(2) - 1],
}
GRADIENTS = {  # with respect to logp
  "none": [0, 0, 0, 0],
  "k1": [1, 1, 1, 1],
  "k2": [np.log(2), -np.log(2), 0, -np.log(2)],
  "k3": [1 - 0.5, 1 - 2, 0, 1 - 2],
}
RATIO = np.array([1.0, 1.0, 2.0, 0.5])  # policy / old policy
VALUES["k3_k2_gradient"] = VALUES["k3"]
GRADIENTS["k3_k2_gradient"] = GRADIENTS["k2"]
VALUES["k3_ratio"] = np.array(VALUES["k3"]) * RATIO
# The ratio has a gradient too: (k3 r)' = k3' r + k3 r.
GRADIENTS["k3_ratio"] = (np.array(GRADIENTS["k3"]) + VALUES["k3"]) * RATIO
PUBLIC = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@pytest.mark.parametrize("name", KLS)
def test_values_and_gradients(name):
  old = jnp.asarray(LOGP) - jnp.log(RATIO)

  def total(logp):
    kl = KLS[name](logp, jnp.asarray(REF), jnp.exp(logp - old))
    return kl.sum(), kl

  gradient, value = jax.grad(total, has_aux=True)(jnp.asarray(LOGP))
  assert_close(value, VALUES[name])
  assert_close(gradient, GRADIENTS[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_estimators(name):
  function = PUBLIC[name]
  assert_close(function(LOGP, REF), VALUES[name])
  assert_close(jax.jit(jax.vmap(function))(LOGP, REF), VALUES[name])
  # All three depend on logp - ref_logp only, so the gradients are opposite.
  by_ref = jax.grad(lambda ref: function(jnp.asarray(LOGP), ref).sum())(jnp.asarray(REF))
  assert_close(by_ref, -np.array(GRADIENTS[name]))
  narrow = function(jnp.asarray(LOGP, jnp.bfloat16), jnp.asarray(REF, jnp.float16))
  assert narrow.dtype == jnp.float32
  assert_close(narrow, VALUES[name], atol=0.01)


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
def test_log_ratios_of_100_are_finite(function):
  logp, ref = jnp.array([-100.0, 0.0]), jnp.array([0.0, -100.0])
  gradient, value = jax.grad(lambda x: (function(x, ref).sum(), function(x, ref)), has_aux=True)(
    logp
  )
  assert np.isfinite(value).all()
  assert np.isfinite(gradient).all()
  if function is kl_k3:  # the line: e^20 (1 + 80) - 101, slope 1 - e^20; the other side is exact
    assert_close(value, [81 * np.exp(20.0), 99.0], rtol=1e-5)
    assert_close(gradient, [1 - np.exp(20.0), 1.0], rtol=1e-5)


def test_k3_on_the_straight_line(x64):
  """At -D = 21: exp(20) - 1 - 20 at the joint plus one step of its slope, exp(20) - 1."""
  e20 = 485165195.40979028
  np.testing.assert_allclose(kl_k3(jnp.array(-21.0), jnp.array(0.0)), 2 * e20 - 22, rtol=1e-13)


def test_k3_is_never_negative_and_precise_near_zero():
  difference = np.array([1e-3, 1e-2, 0.1, -1e-3, -1e-2, -0.1, 0.0], np.float32)
  exact = np.exp(-difference.astype(float)) + difference.astype(float) - 1
  actual = np.asarray(kl_k3(difference, np.zeros(7, np.float32)))
  assert (actual >= 0).all()
  np.testing.assert_allclose(actual, exact, rtol=2e-3)


def test_float64_stays(x64):
  assert kl_k3(LOGP, REF).dtype == jnp.float64
  assert_close(kl_k3(LOGP, REF), VALUES["k3"], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
def test_errors_name_the_argument(function):
  with pytest.raises(ValueError, match=r"^ref_logp must be real, got dtype complex64"):
    function(LOGP, jnp.zeros(4, jnp.complex64))
  with pytest.raises(ValueError, match=r"^logp must be an array of numbers, got None"):
    function(None, REF)
  with pytest.raises(ValueError, match=r"^ref_logp has shape \(3,\), expected \(4,\)"):
    function(LOGP, REF[:3])


def test_every_estimator_is_tested():
  assert set(VALUES) == set(GRADIENTS) == set(KLS)
