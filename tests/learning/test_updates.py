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
from grpo_jax.learning.updates import (
  Learner,
  Teacher,
  UpdateConfig,
  make_gradients,
  make_scoring,
)
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


def test_ratios_to_the_sampler_need_no_old_logprobs(params):
  """Written out without scoring; the mask binds in the first update too."""
  config = UpdateConfig(mini_batches=2, seed=5)
  state, _ = learner("dppo", config)(state_of(params), batch(), 3)
  step, expected = make_train_step(MODEL, "dppo", OPTIMIZER), state_of(params)
  for part in mini_batches(batch(), 2, 1, (5, 3)):
    expected, _ = step(expected, part)
  assert bits(state) == bits(expected)
  _, first = step(state_of(params), batch())
  logp, sampler = make_score(MODEL)(params, batch()), batch().sampler_logp
  a = batch().advantages[..., None]
  stopped = (jnp.sign(a) * (jnp.exp(logp) - jnp.exp(sampler)) > 0.15)[np.asarray(batch().mask)]
  assert 0 < stopped.mean() < 1
  np.testing.assert_allclose(first["clip_ratio/region_mean"], stopped.mean(), rtol=1e-5)


def test_ratios_of_a_rollout_after_its_update(params):
  learn = learner(config=UpdateConfig(micro_batches=2))
  state, _ = learn(state_of(params), batch(), 0)
  keep = np.asarray(batch().mask)
  ratios = learn.ratios(state, batch())
  logp = make_score(MODEL)(state.params, batch())
  expected = np.exp(np.asarray(logp) - np.asarray(batch().sampler_logp))
  np.testing.assert_allclose(ratios[keep], expected[keep], rtol=1e-5)
  assert np.abs(ratios[keep] - 1).max() > 1e-3


def test_micro_batches_follow_the_budget(params):
  """One prompt at a time: the same state within rounding."""
  whole, _ = learner()(state_of(params), batch(), 0)
  parts, _ = learner(config=UpdateConfig(micro_batch_tokens=19))(state_of(params), batch(), 0)
  assert bits(whole.params) != bits(parts.params)
  assert_trees_close(parts.params, whole.params, 1e-6)
  config = UpdateConfig(micro_batch_tokens=19, sort_by_length=True)
  by_length, _ = learner(config=config)(state_of(params), batch(), 0)
  assert bits(by_length.params) != bits(parts.params)
  assert_trees_close(by_length.params, whole.params, 1e-6)


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


def test_the_log_probs_of_teachers_are_averaged(params):
  row = dataclasses.replace(ALGORITHMS["dapo"], teacher_weight=0.5)
  teachers = [Teacher(MODEL, MODEL.init(jax.random.key(seed))) for seed in (1, 2)]
  state, metrics = learner(row, teachers=teachers)(state_of(params), batch(), 0)
  logps = [np.asarray(make_score(MODEL)(teacher.params, batch())) for teacher in teachers]
  taught = dataclasses.replace(batch(), teacher_logp=jnp.asarray((logps[0] + logps[1]) / 2))
  expected, _ = make_train_step(MODEL, row, OPTIMIZER)(state_of(params), taught)
  assert_trees_close(state.params, expected.params, 1e-7)
  own, mask = np.asarray(make_score(MODEL)(params, batch())), np.asarray(batch().mask)
  gap = (own - (logps[0] + logps[1]) / 2)[mask].mean()
  np.testing.assert_allclose(metrics["teacher/kl"], gap, rtol=1e-5)


def test_a_policy_that_is_its_teacher_stays_where_it_is(params):
  """Without advantages of rewards; to the rounding of two compiled programs."""
  unrewarded = dataclasses.replace(batch(), advantages=jnp.zeros((4, 3)))
  learn = learner("opd", teachers=[Teacher(MODEL, params)])
  state, metrics = learn(state_of(params), unrewarded, 0)
  assert_trees_close(state.params, params, 1e-8)
  assert abs(float(metrics["teacher/kl"])) < 1e-6


def test_on_policy_distillation_brings_the_policy_to_its_teacher(params):
  """On fresh completions of the policy in each step, of a task without any reward."""
  teacher = MODEL.init(jax.random.key(1))
  learn = Learner(
    MODEL, "opd", optax.adam(5e-3), None, UpdateConfig(), teachers=[Teacher(MODEL, teacher)]
  )
  state, gaps = TrainState.create(params, optax.adam(5e-3)), []
  prompts = {"average": "token", "temperature": 1.0}
  for step in range(150):
    fresh = make_batch(**prompts)
    tokens = sampled(state.params, fresh, jax.random.key(step))
    fresh = dataclasses.replace(fresh, completions=tokens, advantages=jnp.zeros((4, 3)))
    state, metrics = learn(state, fresh, step)
    gaps.append(float(metrics["teacher/kl"]))
  assert np.mean(gaps[-20:]) < 0.4 * np.mean(gaps[:5])


@pytest.mark.parametrize(
  "mix", [0.5, *(pytest.param(m, marks=pytest.mark.slow) for m in (0.0, 1.0))]
)
def test_a_divergence_to_teachers_is_a_term_of_the_loss(params, mix):
  """Compares with a loss through the whole vocabulary, without tiles and micro-batches."""
  row = dataclasses.replace(ALGORITHMS["dapo"], teacher_weight=0.5, teacher_divergence=mix)
  teachers = [Teacher(MODEL, MODEL.init(jax.random.key(seed))) for seed in (1, 2)]
  config = UpdateConfig(micro_batches=2)
  state, metrics = learner(row, config, teachers=teachers)(state_of(params), batch(), 0)

  def logps(params):
    b = batch()
    hidden = MODEL.score(params, b.prompts, b.prompt_mask, b.completions)
    return jax.nn.log_softmax(hidden @ MODEL.head(params) / 0.7)

  def divergence(p, q):
    if mix == 0:
      return (jnp.exp(q) * (q - p)).sum(-1)
    if mix == 1:
      return (jnp.exp(p) * (p - q)).sum(-1)
    m = jnp.log((jnp.exp(p) + jnp.exp(q)) / 2)
    return ((jnp.exp(p) * (p - m)).sum(-1) + (jnp.exp(q) * (q - m)).sum(-1)) / 2

  def loss(params):
    own = logps(params)
    terms = [divergence(own, logps(teacher.params)) for teacher in teachers]
    mean = jnp.where(batch().mask, sum(terms) / 2, 0.0)
    return 0.5 * (batch().weights * mean).sum(), mean

  without, _ = learner("dapo")(state_of(params), batch(), 0)
  gradient, mean = jax.grad(loss, has_aux=True)(params)
  expected = jax.tree.map(lambda p, g: p - RATE * g, without.params, gradient)
  assert_trees_close(state.params, expected, 1e-6)
  assert float(optax.tree.norm(gradient)) > 0.1
  kl = np.asarray(mean)[np.asarray(batch().mask)].mean()
  np.testing.assert_allclose(metrics["teacher/divergence"], kl, rtol=1e-4)


@jax.jit
def sampled(params, batch, key):
  """Returns completions [P, G, T] drawn from the model, token by token."""
  tokens = batch.completions
  for t in range(tokens.shape[-1]):
    hidden = MODEL.score(params, batch.prompts, batch.prompt_mask, tokens)[:, :, t]
    drawn = jax.random.categorical(jax.random.fold_in(key, t), hidden @ MODEL.head(params))
    tokens = tokens.at[:, :, t].set(drawn)
  return tokens


def shown(has_teacher=True):
  """Returns a batch in which the policy sees other prompts as its own teacher."""
  rng = np.random.default_rng(7)
  taught = np.asarray(batch().mask) & (rng.random((4, 3, 1)) < 0.6) & has_teacher
  return dataclasses.replace(
    batch(),
    advantages=jnp.zeros((4, 3)),
    teacher_prompts=jnp.asarray(rng.integers(0, 19, (4, 6)), jnp.int32),
    teacher_prompt_mask=jnp.asarray(np.arange(6) >= np.array([0, 2, 1, 0])[:, None]),
    taught=jnp.asarray(taught),
  )


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_a_policy_that_sees_other_prompts_is_its_own_teacher(params, who):
  reference = MODEL.init(jax.random.key(3))
  state = state_of(params, reference=reference)
  result, metrics = learner("opd", UpdateConfig(own_teacher=who))(state, shown(), 0)
  prompts = {"prompts": shown().teacher_prompts, "prompt_mask": shown().teacher_prompt_mask}
  teacher = params if who == "policy" else reference
  logp = np.asarray(make_score(MODEL)(teacher, dataclasses.replace(batch(), **prompts)))
  own = np.asarray(make_score(MODEL)(params, batch()))
  advantages = np.where(np.asarray(shown().taught), logp - own, 0.0)
  assert np.abs(advantages).max() > 0.1
  plain = dataclasses.replace(batch(), advantages=jnp.asarray(advantages))
  row = dataclasses.replace(ALGORITHMS["reinforce"], average="token")
  expected, _ = make_train_step(MODEL, row, OPTIMIZER)(state_of(params), plain)
  assert_trees_close(result.params, expected.params, 1e-6)
  mask = np.asarray(batch().mask)
  np.testing.assert_allclose(metrics["teacher/kl"], -advantages[mask].mean(), rtol=1e-4)


def test_without_a_solution_there_is_no_teacher_and_no_gradient(params):
  learn = learner("opd", UpdateConfig(own_teacher="policy"))
  state, metrics = learn(state_of(params), shown(has_teacher=False), 0)
  assert bits(state.params) == bits(params)
  assert float(metrics["teacher/kl"]) == 0


def test_what_a_policy_that_teaches_itself_lacks_is_named(params):
  learn = learner("opd", UpdateConfig(own_teacher="reference"))
  with pytest.raises(ValueError, match=r"own_teacher is 'reference', but there is no TrainState"):
    learn(state_of(params), shown(), 0)
  learn = learner("opd", UpdateConfig(own_teacher="policy"))
  with pytest.raises(ValueError, match=r"own_teacher is 'policy', but there is no Batch.teacher_"):
    learn(state_of(params), batch(), 0)


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
  with pytest.raises(ValueError, match="has a teacher_weight: give Learner its teachers"):
    learner("opd")(state_of(params), batch(), 0)
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
