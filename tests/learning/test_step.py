"""Tests one step: its gradient, its temperature, its traces, and the state before it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.skipping import History
from grpo_jax.learning.step import (
  TrainState,
  make_score,
  make_train_step,
  move_reference,
  score_batch,
)
from grpo_jax.models.decoder import Decoder
from tests.helpers import plain
from tests.helpers.learning import (
  CONFIG,
  MODEL,
  RATE,
  assert_trees_close,
  bits,
  make_batch,
  step_once,
)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


# --- the gradient ---------------------------------------------------------------------------------


def test_the_update_is_the_gradient_of_the_derivations_loss(params):
  """Compares with the plain row-by-row model and -(1/N) sum_i 1/|o_i| sum_t r A."""
  batch = jax.tree.map(lambda a: a[:2], make_batch())
  batch = dataclasses.replace(batch, weights=token_weights(batch.mask, "sequence"))
  host = jax.tree.map(np.asarray, batch)
  lengths = host.mask.sum(-1)

  def loss(params):
    total = 0.0
    for p in range(2):
      prompt = host.prompts[p][host.prompt_mask[p]]
      for g in range(3):
        n = lengths[p, g]
        logp = plain.completion_logprobs(
          CONFIG, params, prompt, host.completions[p, g, :n], temperature=0.7
        )
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
        total += -(ratio * host.advantages[p, g]).sum() / n
    return total / 6

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  updated, metrics = step_once(params, batch, ALGORITHMS["reinforce"])
  np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
  assert_trees_close(updated, jax.tree.map(lambda p, g: p - RATE * g, params, gradient), 1e-5)


def test_masked_tokens_change_nothing(params):
  """Changes their ids, and stores NaN and infinity in their recorded log-probs."""
  batch = make_batch(ref=True)
  other = dataclasses.replace(
    batch,
    completions=jnp.where(batch.mask, batch.completions, 7),
    sampler_logp=jnp.where(batch.mask, batch.sampler_logp, jnp.nan),
    ref_logp=jnp.where(batch.mask, batch.ref_logp, jnp.inf),
  )
  expected, metrics = step_once(params, batch, ALGORITHMS["grpo"])
  updated, other_metrics = step_once(params, other, ALGORITHMS["grpo"])
  assert_trees_close(updated, expected, 1e-6)
  np.testing.assert_allclose(other_metrics["kl"], metrics["kl"], rtol=1e-5)


def test_the_ratio_is_to_the_old_logprobs_of_the_batch(params):
  """exp(0.5) = 1.65 is beyond 1 + clip_high: tokens with A > 0 are clipped, and only those."""
  batch = make_batch(average="token")
  logp = make_score(MODEL, temperature=0.7)(params, batch)
  batch = dataclasses.replace(batch, old_logp=logp - 0.5)
  _, metrics = step_once(params, batch, ALGORITHMS["dapo"])
  tokens = np.asarray(batch.mask).sum(-1)
  expected = tokens[np.asarray(batch.advantages) > 0].sum() / tokens.sum()
  np.testing.assert_allclose(metrics["clip_ratio/high_mean"], expected, rtol=1e-6)
  assert 0.1 < expected < 0.9
  assert float(metrics["clip_ratio/low_mean"]) == 0


def test_base_params_are_not_trained(params):
  batch = make_batch(average="token")
  whole, _ = step_once(params, batch, ALGORITHMS["dapo"])
  base_params = {name: leaf for name, leaf in params.items() if name != "final_norm"}
  trained, metrics = step_once(
    {"final_norm": params["final_norm"]},
    batch,
    ALGORITHMS["dapo"],
    base_params=base_params,
    with_adapters=lambda base_params, trained: base_params | trained,
  )
  assert set(trained) == {"final_norm"}
  np.testing.assert_allclose(trained["final_norm"], whole["final_norm"], atol=1e-6)
  change = (params["final_norm"] - trained["final_norm"]) / RATE
  np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(change), rtol=1e-3)


def test_an_algorithm_by_name_and_no_schedule(params):
  batch = make_batch(average="token", temperature=0.7)
  expected, metrics = step_once(params, batch, ALGORITHMS["dapo"])
  optimizer = optax.sgd(RATE)
  step = make_train_step(MODEL, "dapo", optimizer)
  state, plain_metrics = step(TrainState.create(params, optimizer), batch)
  assert bits(state.params) == bits(expected)
  assert set(metrics) - set(plain_metrics) == {"learning_rate"}
  with pytest.raises(ValueError, match="dapoo"):
    make_train_step(MODEL, "dapoo", optimizer)(TrainState.create(params, optimizer), batch)


# --- log-probs and the temperature ----------------------------------------------------------------


def test_the_scorer_gives_the_plain_models_logprobs(params):
  batch = make_batch()
  logp = make_score(MODEL, temperature=0.7)(params, batch)
  prompt = np.asarray(batch.prompts[1])[1:]
  n = int(batch.mask[1, 2].sum())
  expected = plain.completion_logprobs(
    CONFIG, params, prompt, np.asarray(batch.completions[1, 2, :n]), temperature=0.7
  )
  np.testing.assert_allclose(logp[1, 2, :n], expected, atol=1e-5)
  assert (np.asarray(logp)[~np.asarray(batch.mask)] == 0).all()


def test_the_temperature_of_the_batch_is_the_one_that_counts(params):
  """Passed, recorded, or both, one temperature gives the same log-probs; another differs."""
  recorded, unknown = make_batch(temperature=0.7), make_batch()
  expected = bits(score_batch(MODEL, params, unknown, 0.7))
  assert bits(score_batch(MODEL, params, recorded)) == expected
  assert bits(score_batch(MODEL, params, recorded, 0.7)) == expected
  assert bits(score_batch(MODEL, params, unknown, 1.0)) != expected


def test_a_temperature_that_differs_is_an_error_when_the_step_is_traced(params):
  optimizer = optax.sgd(RATE)
  step = make_train_step(MODEL, "dapo", optimizer, temperature=1.0)
  message = "temperature is 1.0, but the batch was sampled at 0.7"
  with pytest.raises(ValueError, match=message):
    step.trace(TrainState.shapes(params, optimizer), make_batch(temperature=0.7))
  with pytest.raises(ValueError, match=message):
    make_score(MODEL, temperature=1.0)(params, make_batch(temperature=0.7))
  with pytest.raises(ValueError, match="sampling temperature is unknown"):
    make_score(MODEL)(params, make_batch())


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_the_scorer_change_nothing(params, micro_batches):
  batch = make_batch()
  whole = make_score(MODEL, temperature=0.7)(params, batch)
  parts = make_score(MODEL, temperature=0.7, micro_batches=micro_batches)(params, batch)
  np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
  assert len(np.unique(np.asarray(whole).round(3))) > 20


def test_the_scorer_needs_less_memory_in_micro_batches():
  """Four micro-batches of a batch that is large against the model take about a quarter."""
  batch = jax.tree.map(lambda a: jnp.tile(a, (8,) + (1,) * (a.ndim - 1)), make_batch())
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
  sizes = [
    make_score(MODEL, temperature=0.7, micro_batches=count)
    .lower(shapes, batch)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for count in (1, 4)
  ]
  assert sizes[1] < 0.4 * sizes[0]


# --- the state ------------------------------------------------------------------------------------


def test_the_first_state_by_hand():
  params = {"w": jnp.array([1.0, 2.0])}
  optimizer = optax.adam(0.1)
  state = TrainState.create(params, optimizer)
  assert int(state.step) == 0
  assert bits(state.opt_state) == bits(optimizer.init(params))
  assert bits(state.history) == bits(History.new())
  assert state.reference is None
  shapes = TrainState.shapes(params, optimizer)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
    lambda a: (a.shape, a.dtype), state
  )


def test_a_step_deletes_nothing_that_was_passed_to_create(params):
  """`reference=params` once read a donated buffer at the second step."""
  optimizer, batch = optax.sgd(RATE), make_batch(ref=True, temperature=0.7)
  state = TrainState.create(params, optimizer, reference=params)
  before = bits(params)
  step = make_train_step(MODEL, "grpo", optimizer)
  for _ in range(2):
    state, _ = step(state, batch)
  assert bits(params) == bits(state.reference) == before != bits(state.params)
  own = jax.tree.map(jnp.copy, params)
  step(TrainState.create(own, optimizer, copy=False), batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own))


def test_an_optimizer_that_keeps_the_parameters_keeps_its_own_copy(params):
  """One array must not be donated twice."""
  keeps = optax.GradientTransformation(lambda params: params, lambda g, kept, _: (g, kept))
  optimizer, batch = optax.chain(keeps, optax.sgd(RATE)), make_batch(temperature=0.7)
  state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer, copy=False)
  before = bits(state.opt_state)
  state, _ = make_train_step(MODEL, "dapo", optimizer)(state, batch)
  assert bits(state.opt_state) == before


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
def test_the_optimizer_state_lies_as_the_table_of_shardings_has_it(shape):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
  params = jax.jit(MODEL.init, out_shardings=meshes.param_shardings(mesh, shapes))(
    jax.random.key(0)
  )
  state = TrainState.create(params, optax.adam(0.1), reference=params)
  shardings = jax.tree.map(lambda a: a.sharding, state)
  assert shardings.opt_state == meshes.param_shardings(mesh, state.opt_state)
  assert shardings.params == shardings.reference == meshes.param_shardings(mesh, params)
  assert {shardings.step, *jax.tree.leaves(shardings.history)} == {meshes.replicated(mesh)}
  shapes = TrainState.shapes(params, optax.adam(0.1), reference=params)
  assert jax.tree.map(lambda a: a.sharding, shapes) == shardings


def test_a_state_and_its_dict():
  params = {"w": jnp.ones(2)}
  state = TrainState.create(params, optax.sgd(0.1), reference=params)
  tree = state.to_dict()
  assert list(tree) == ["step", "params", "opt_state", "reference", "history"]
  assert set(tree["history"]) == {"log_norm", "counted", "skipped"}
  assert jax.tree.structure(TrainState.from_dict(tree)) == jax.tree.structure(state)
  assert bits(TrainState.from_dict(tree)) == bits(state)
  bare = dataclasses.replace(state, reference=None, history=None)
  assert set(bare.to_dict()) == {"step", "params", "opt_state"}
  assert TrainState.from_dict(bare.to_dict()).history is None


def test_the_reference_moves_by_its_share():
  state = TrainState(jnp.int32(3), {"a": jnp.array([1.0, 5.0])}, (), {"a": jnp.array([3.0, 1.0])})
  moved = move_reference(state, 0.25)
  np.testing.assert_array_equal(moved.reference["a"], [2.5, 2.0])
  np.testing.assert_array_equal(moved.params["a"], [1.0, 5.0])
  assert int(moved.step) == 3


# --- one compilation, the same sharding -----------------------------------------------------------


def test_a_step_traces_once(params):
  traces = []

  class Counting(Decoder):
    def score(self, *args):
      traces.append(1)
      return super().score(*args)

  optimizer = optax.adam(1e-3)
  step = make_train_step(
    Counting(CONFIG), ALGORITHMS["dapo"], optimizer, lambda count: 1e-3, temperature=1.0
  )
  state = TrainState.create(params, optimizer)
  for _ in range(3):
    state, _ = step(state, make_batch())
  assert len(traces) == 1


@pytest.fixture
def compilations():
  """Records one event for each program compiled, or read from the cache, during the test."""
  events = []

  def listen(event, *_, **__):
    if event == "/jax/core/compile/backend_compile_duration":
      events.append(1)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
def test_a_state_keeps_its_sharding_so_each_batch_size_compiles_once(shape, compilations):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  config = dataclasses.replace(CONFIG, vocab_size=20)  # the table is split over both axes
  model, optimizer = Decoder(config, place=meshes.placer(mesh)), optax.adam(1e-3)
  params = model.init(jax.random.key(0))
  params = jax.device_put(params, meshes.param_shardings(mesh, params))
  step = make_train_step(
    model, ALGORITHMS["dapo"], optimizer, lambda count: 1e-3, temperature=1.0, micro_batches=2
  )
  state = TrainState.create(params, optimizer)
  batch = jax.tree.map(lambda a: jnp.concatenate([a, a]), make_batch())
  batch = jax.device_put(batch, meshes.batch_sharding(mesh))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  assert len({leaf.spec for leaf in jax.tree.leaves(shardings)}) > 3
  compilations.clear()
  for count in (1, 1, 1):
    state, _ = step(state, batch)
    assert len(compilations) == count
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
