"""Tests the updates of one rollout: their log-probs, their number, the ones that are skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.learning.batch import mini_batches
from grpo_jax.learning.step import TrainState, make_score, make_train_step
from grpo_jax.learning.updates import Learner, UpdateConfig, make_gradients, make_scoring
from tests.helpers.learning import MODEL, assert_trees_close, bits, make_batch, step_once

RATE = 1e-2
OPTIMIZER = optax.sgd(RATE)
KL = dataclasses.replace(ALGORITHMS["grpo"], beta=0.1)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def batch(**options):
  return make_batch(average="token", temperature=0.7, **options)


def learner(algorithm="dapo", config=None, **options):
  return Learner(MODEL, algorithm, OPTIMIZER, None, config or UpdateConfig(), **options)


def state_of(params, **options):
  return TrainState.create(params, OPTIMIZER, **options)


def test_one_update_is_the_step(params):
  state, metrics = learner()(state_of(params), batch(), 0)
  expected, step_metrics = make_train_step(MODEL, "dapo", OPTIMIZER)(state_of(params), batch())
  assert bits(state) == bits(expected)
  assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
    {name: float(value) for name, value in step_metrics.items()}
  )


def test_several_updates_have_the_old_logprobs_of_the_first(params):
  """Written out: score once, then step over the mini-batches of (seed, rollout number)."""
  config = UpdateConfig(epochs=2, mini_batches=2, seed=5)
  state, metrics = learner(config=config)(state_of(params), batch(), 3)
  step = make_train_step(MODEL, "dapo", OPTIMIZER)
  expected, losses = state_of(params), []
  logp = make_score(MODEL, micro_batches=2)(params, batch())
  scored = dataclasses.replace(batch(), old_logp=logp)
  for part in mini_batches(scored, 2, 2, (5, 3)):
    expected, step_metrics = step(expected, part)
    losses.append(float(step_metrics["loss"]))
  assert int(state.step) == 4
  assert bits(state) == bits(expected)
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_micro_batches_follow_the_budget(params):
  """One prompt at a time: the same state within rounding."""
  whole, _ = learner()(state_of(params), batch(), 0)
  parts, _ = learner(config=UpdateConfig(micro_batch_tokens=19))(state_of(params), batch(), 0)
  assert bits(whole.params) != bits(parts.params)
  assert_trees_close(parts.params, whole.params, 1e-6)


def test_a_fixed_reference_and_one_in_the_state_are_the_same(params):
  other = jax.tree.map(lambda a: a * 1.1, params)
  fixed, metrics = learner(KL, reference=other)(state_of(params), batch(), 0)
  held, _ = learner(KL)(state_of(params, reference=other), batch(), 0)
  assert bits(fixed.params) == bits(held.params)
  assert float(metrics["kl"]) > 0
  scored = dataclasses.replace(batch(), ref_logp=make_score(MODEL)(other, batch()))
  expected, _ = make_train_step(MODEL, KL, OPTIMIZER)(state_of(params), scored)
  assert bits(fixed.params) == bits(expected.params)


def test_the_reference_moves_every_few_rollouts(params):
  config = UpdateConfig(sync_every=2, sync_share=1.0)
  learn, state = learner(KL, config), state_of(params, reference=params)
  state, _ = learn(state, batch(), 0)
  assert bits(state.reference) == bits(params) != bits(state.params)
  state, _ = learn(state, batch(), 1)
  assert bits(state.reference) == bits(state.params)


def test_the_gradient_alone_is_that_of_the_update(params):
  grads, *_ = make_gradients(MODEL, "dapo", UpdateConfig())(params, batch(), None)
  expected, _ = step_once(params, batch(), ALGORITHMS["dapo"])
  assert_trees_close(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), expected, 1e-6)


def test_scoring_in_the_micro_batches_of_the_updates(params):
  config = UpdateConfig(mini_batches=2, micro_batches=2)
  logp = make_scoring(MODEL, config)(params, batch())
  np.testing.assert_allclose(logp, make_score(MODEL)(params, batch()), rtol=1e-6, atol=1e-6)


def test_a_missing_reference_or_history_is_named(params):
  with pytest.raises(ValueError, match="has a KL term"):
    learner(KL)(state_of(params), batch(), 0)
  with pytest.raises(ValueError, match="no history"):
    learner()(dataclasses.replace(state_of(params), history=None), batch(), 0)


def test_skipped_updates_are_handed_over_and_counted(params):
  """Skips those of two updates per rollout that hold a bad prompt, and later all of them."""
  skips, config = [], UpdateConfig(mini_batches=2, max_skipped=3)
  learn, state = learner(config=config, on_skip=skips.append), state_of(params)
  bad = batch()
  bad = dataclasses.replace(bad, advantages=bad.advantages.at[1].set(jnp.inf))
  state, metrics = learn(state, bad, 7)
  (skip,) = skips
  assert (skip.step, skip.in_a_row) == (7, 1)
  assert np.isinf(np.asarray(skip.batch.advantages)).any()
  assert skip.batch.temperature == 0.7
  assert not np.isfinite(skip.metrics["loss"])
  assert float(metrics["update/skipped"]) == 1.0
  assert int(state.step) == 1
  assert learn.trouble is None

  state, _ = learn(state, batch(), 8)
  all_bad = dataclasses.replace(batch(), advantages=jnp.full((4, 3), jnp.nan))
  before = bits(state.params)
  state, metrics = learn(state, all_bad, 9)
  assert [(skip.step, skip.update, skip.in_a_row) for skip in skips[1:]] == [(9, 0, 1), (9, 1, 2)]
  assert float(metrics["update/skipped"]) == 2.0
  assert learn.trouble is None
  state, _ = learn(state, all_bad, 10)
  assert bits(state.params) == before == bits(skips[-1].state.params)
  assert "4 updates in a row were skipped (max_skipped is 3)" in learn.trouble
