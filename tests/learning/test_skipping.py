"""Tests that updates with non-finite numbers or a gradient-norm spike are skipped bit for bit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.learning.skipping import MEMORY, WARM_UP, History, accept_update
from grpo_jax.learning.step import TrainState, make_train_step
from tests.helpers.learning import MODEL, bits, make_batch

SPIKE = 3.0
RATE = optax.constant_schedule(1e-3)
ADAM = optax.adam(RATE)


@pytest.fixture(scope="module")
def step():
  """Returns an update step with two micro-batches, Adam and a spike limit."""
  return make_train_step(MODEL, "dapo", ADAM, RATE, temperature=0.7, micro_batches=2, spike=SPIKE)


def new_state():
  return TrainState.create(MODEL.init(jax.random.key(0)), ADAM)


def scaled(batch, factor):
  return dataclasses.replace(batch, advantages=batch.advantages * factor)


def test_a_non_finite_update_changes_nothing(step):
  good = make_batch(average="token")
  state, metrics = step(new_state(), good)
  assert float(metrics["update/skipped"]) == 0.0
  infinite = dataclasses.replace(good, advantages=good.advantages.at[1, 2].set(jnp.inf))
  overflow = scaled(good, 1e25)  # the loss and each gradient are finite, the sum of squares is not
  for number, bad in enumerate((infinite, scaled(good, jnp.nan), overflow), start=1):
    before = bits((state.step, state.params, state.opt_state))
    state, metrics = step(state, bad)
    assert bits((state.step, state.params, state.opt_state)) == before
    assert float(metrics["update/skipped"]) == 1.0
    assert int(state.history.skipped) == number
  assert math.isfinite(metrics["loss"])
  assert not math.isfinite(metrics["grad_norm"])
  before = bits(state.params)
  state, metrics = step(state, good)
  assert bits(state.params) != before
  assert (int(state.step), int(state.history.skipped)) == (2, 0)


def test_a_parameter_that_is_nan_skips_every_update(step):
  state = new_state()
  params = state.params | {"final_norm": state.params["final_norm"].at[3].set(jnp.nan)}
  before = bits((params, state.opt_state))
  state, metrics = step(dataclasses.replace(state, params=params), make_batch(average="token"))
  assert bits((state.params, state.opt_state)) == before
  assert float(metrics["update/skipped"]) == 1.0


def test_a_spike_is_skipped_after_the_warm_up(step):
  good, state, norms = make_batch(average="token"), new_state(), []
  for number in range(WARM_UP):
    state, metrics = step(state, scaled(good, 50.0 if number == 0 else 1.0))
    assert float(metrics["update/skipped"]) == 0.0
    norms.append(float(metrics["grad_norm"]))
  assert max(norms) > SPIKE * np.exp(np.mean(np.log(norms)))
  np.testing.assert_allclose(state.history.log_norm, np.mean(np.log(norms)), rtol=1e-5)
  before = bits((state.step, state.params, state.opt_state))
  log_norm, counted = float(state.history.log_norm), int(state.history.counted)
  state, metrics = step(state, scaled(good, 50.0))
  assert float(metrics["grad_norm"]) > SPIKE * np.exp(log_norm)
  assert float(metrics["update/skipped"]) == 1.0
  assert bits((state.step, state.params, state.opt_state)) == before
  assert (float(state.history.log_norm), int(state.history.counted)) == (log_norm, counted)
  state, metrics = step(state, scaled(good, 1.2))
  assert float(metrics["update/skipped"]) == 0.0


def test_the_history_by_hand():
  history = History.new()
  accept, history = accept_update(history, 1.0, jnp.float32(np.e), 2.0)
  assert (bool(accept), float(history.log_norm), int(history.counted)) == (True, 1.0, 1)
  _, history = accept_update(history, 1.0, jnp.float32(0.0), 2.0)  # no gradient: not counted
  assert (float(history.log_norm), int(history.counted)) == (1.0, 1)
  _, history = accept_update(history, 1.0, jnp.float32(np.e**4), 2.0)
  np.testing.assert_allclose(history.log_norm, 2.5, rtol=1e-6)  # (1 + 4) / 2
  long = dataclasses.replace(history, counted=jnp.int32(MEMORY), log_norm=jnp.float32(0.0))
  _, moved = accept_update(long, 1.0, jnp.float32(np.e**0.5), 2.0)
  np.testing.assert_allclose(moved.log_norm, 0.5 / MEMORY, rtol=1e-6)
  assert int(moved.counted) == MEMORY
  assert not accept_update(long, 1.0, jnp.float32(2.001), 2.0)[0]  # exp(0) = 1, times 2
  assert accept_update(long, 1.0, jnp.float32(2.001), 0.0)[0]


def test_without_a_history_only_finite_numbers_count():
  accept, history = accept_update(None, 1.0, jnp.float32(1e9), 0.0)
  assert (bool(accept), history) == (True, None)
  assert not accept_update(None, jnp.inf, jnp.float32(1), 0.0)[0]
  with pytest.raises(ValueError, match="needs a history"):
    accept_update(None, 1.0, 1.0, 2.0)
