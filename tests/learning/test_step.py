"""One step: micro-batches and traces, and the gradient that the loss alone gives."""

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
from grpo_jax.learning.batch import Batch, mini_batches
from grpo_jax.learning.reduction import average, combine
from grpo_jax.learning.step import TrainState, make_score, make_train_step, move_reference
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from tests.helpers import plain

CONFIG = ModelConfig(vocab_size=19, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
RATE = 0.1


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def make_batch(ref=False, average="sequence"):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 6, (4, 3))
  lengths[0, 0] = 5
  mask = np.arange(5) < lengths[..., None]
  prompt_mask = np.arange(4) >= np.array([0, 1, 2, 0])[:, None]
  batch = Batch(
    prompts=jnp.asarray(rng.integers(0, 19, (4, 4)), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(rng.integers(0, 19, (4, 3, 5)), jnp.int32),
    mask=jnp.asarray(mask),
    advantages=jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    weights=token_weights(jnp.asarray(mask), average, max_length=6),
    sampler_logp=jnp.asarray(-rng.random((4, 3, 5)), jnp.float32),
  )
  if ref:
    batch = dataclasses.replace(batch, ref_logp=batch.sampler_logp - 0.3)
  return batch


def step_once(
  params, batch, algorithm, micro_batches=1, temperature=0.7, base_params=None, **options
):
  """(new params, metrics) of one plain SGD step, so that the update is the gradient."""
  step = make_train_step(
    MODEL,
    algorithm,
    optax.sgd(RATE),
    lambda count: RATE,
    temperature=temperature,
    micro_batches=micro_batches,
    **options,
  )
  optimizer_state = optax.sgd(RATE).init(params)
  copy = jax.tree.map(jnp.copy, params)  # the step takes its state over
  state, metrics = step(TrainState(jnp.int32(0), copy, optimizer_state), batch, base_params)
  assert int(state.step) == 1
  return state.params, metrics


def assert_trees_close(got, want, atol):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing(params, name, micro_batches):
  algorithm = ALGORITHMS[name]
  batch = make_batch(ref=True, average=algorithm.average)
  whole, metrics = step_once(params, batch, algorithm)
  parts, part_metrics = step_once(params, batch, algorithm, micro_batches)
  assert_trees_close(parts, whole, 1e-6)
  assert set(metrics) == set(part_metrics)
  for key, value in metrics.items():
    np.testing.assert_allclose(part_metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


def test_the_update_is_the_gradient_of_the_derivations_loss(params):
  """Against the plain row-by-row model and -(1/N) sum_i 1/|o_i| sum_t r A, written out here."""
  batch = jax.tree.map(lambda a: a[:2], make_batch())
  batch = dataclasses.replace(batch, weights=token_weights(batch.mask, "sequence"))
  lengths = np.asarray(batch.mask).sum(-1)

  def loss(params):
    total = 0.0
    for p in range(2):
      prompt = np.asarray(batch.prompts[p])[np.asarray(batch.prompt_mask[p])]
      for g in range(3):
        n = lengths[p, g]
        logp = plain.completion_logprobs(
          CONFIG, params, prompt, np.asarray(batch.completions[p, g, :n]), temperature=0.7
        )
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
        total += -(ratio * batch.advantages[p, g]).sum() / n
    return total / 6

  value, gradient = jax.value_and_grad(loss)(params)
  new, metrics = step_once(params, batch, ALGORITHMS["reinforce"])
  np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
  assert_trees_close(new, jax.tree.map(lambda p, g: p - RATE * g, params, gradient), 1e-5)


def test_what_lies_behind_the_end_of_a_completion_changes_nothing(params):
  batch = make_batch(ref=True)
  other = dataclasses.replace(
    batch,
    completions=jnp.where(batch.mask, batch.completions, 7),
    sampler_logp=jnp.where(batch.mask, batch.sampler_logp, jnp.nan),
    ref_logp=jnp.where(batch.mask, batch.ref_logp, jnp.inf),
  )
  want, metrics = step_once(params, batch, ALGORITHMS["grpo"])
  got, other_metrics = step_once(params, other, ALGORITHMS["grpo"])
  assert_trees_close(got, want, 1e-6)
  np.testing.assert_allclose(other_metrics["kl"], metrics["kl"], rtol=1e-5)


def test_a_step_traces_once(params):
  traces = []

  class Counting(Decoder):
    def score(self, *args):
      traces.append(1)
      return super().score(*args)

  optimizer = optax.adam(1e-3)
  step = make_train_step(
    Counting(CONFIG),
    ALGORITHMS["dapo"],
    optimizer,
    lambda count: 1e-3,
    temperature=1.0,
  )
  copy = jax.tree.map(jnp.copy, params)
  state = TrainState(jnp.int32(0), copy, optimizer.init(copy))
  for _ in range(3):
    state, _ = step(state, make_batch())
  assert len(traces) == 1


def test_the_reference_scorer_gives_the_plain_models_logprobs(params):
  batch = make_batch()
  logp = make_score(MODEL, temperature=0.7)(params, batch)
  prompt = np.asarray(batch.prompts[1])[1:]
  n = int(batch.mask[1, 2].sum())
  want = plain.completion_logprobs(
    CONFIG, params, prompt, np.asarray(batch.completions[1, 2, :n]), temperature=0.7
  )
  np.testing.assert_allclose(logp[1, 2, :n], want, atol=1e-5)
  assert (np.asarray(logp)[~np.asarray(batch.mask)] == 0).all()


def test_combine_weights_by_tokens():
  metrics = {
    "kl": jnp.array([1.0, 4.0]),
    "x/max": jnp.array([3.0, 2.0]),
    "x/min": jnp.array([3.0, 2.0]),
  }
  got = combine(metrics, jnp.array([0.25, 0.75]))
  assert {name: float(value) for name, value in got.items()} == {
    "kl": 3.25,
    "x/max": 3.0,
    "x/min": 2.0,
  }


# --- several updates per rollout, base_params parameters, a moving reference ---------------------------


def test_mini_batches_are_the_batch_in_a_new_order():
  batch = dataclasses.replace(make_batch(), advantages=jnp.arange(12.0).reshape(4, 3))
  parts = list(mini_batches(batch, 2, 2, (0, 7)))
  assert [part.mask.shape[0] for part in parts] == [2] * 4
  first = [np.asarray(part.advantages[:, 0] // 3).astype(int).tolist() for part in parts]
  assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == [0, 1, 2, 3]
  for part, rows in zip(parts, first):
    np.testing.assert_array_equal(part.completions, batch.completions[np.array(rows)])
    np.testing.assert_array_equal(part.weights, 2 * batch.weights[np.array(rows)])

  def orders(seed):
    return [np.asarray(p.advantages).tolist() for p in mini_batches(batch, 2, 2, seed)]

  assert orders((0, 7)) == orders((0, 7))
  assert len({str(orders((0, step))) for step in range(6)}) > 1
  assert next(mini_batches(batch, 1, 1, (0, 7))) is batch


def test_the_mean_of_the_mini_batches_is_the_update_of_the_whole(params):
  batch = make_batch(average="token")
  whole, _ = step_once(params, batch, ALGORITHMS["dapo"])
  parts = [
    step_once(params, part, ALGORITHMS["dapo"])[0] for part in mini_batches(batch, 2, 1, (0, 1))
  ]
  assert_trees_close(jax.tree.map(lambda a, b: (a + b) / 2, *parts), whole, 1e-6)


def test_the_ratio_is_to_the_old_logprobs_of_the_batch(params):
  """exp(0.5) = 1.65 is beyond 1 + clip_high: tokens with A > 0 are clipped, and only those."""
  batch = make_batch(average="token")
  logp = make_score(MODEL, temperature=0.7)(params, batch)
  batch = dataclasses.replace(batch, old_logp=logp - 0.5)
  _, metrics = step_once(params, batch, ALGORITHMS["dapo"])
  weight = np.asarray(batch.mask).sum(-1)
  want = weight[np.asarray(batch.advantages) > 0].sum() / weight.sum()
  np.testing.assert_allclose(metrics["clip_ratio/high_mean"], want, rtol=1e-6)
  assert 0.1 < want < 0.9
  assert float(metrics["clip_ratio/low_mean"]) == 0


def test_only_what_is_not_frozen_is_trained(params):
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


def test_the_reference_moves_by_its_share():
  state = TrainState(jnp.int32(3), {"a": jnp.array([1.0, 5.0])}, (), {"a": jnp.array([3.0, 1.0])})
  moved = move_reference(state, 0.25)
  np.testing.assert_array_equal(moved.reference["a"], [2.5, 2.0])
  np.testing.assert_array_equal(moved.params["a"], [1.0, 5.0])
  assert int(moved.step) == 3


def test_metrics_of_several_updates():
  got = average([{"kl": jnp.float32(1), "x/max": jnp.float32(2)}, {"kl": 3.0, "x/max": 1.0}])
  assert {name: float(value) for name, value in got.items()} == {"kl": 2.0, "x/max": 2.0}


# --- one compilation, the same layout -------------------------------------------------------------


@pytest.fixture
def compilations():
  """Programs that are compiled (or read from the cache) while the test runs."""
  seen = []

  def listen(event, *_, **__):
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(1)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1)])
def test_a_state_keeps_its_layout_so_a_batch_size_is_compiled_for_once(shape, compilations):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  config = dataclasses.replace(CONFIG, vocab_size=20)  # the table is split over both axes
  model, optimizer = Decoder(config, place=meshes.placer(mesh)), optax.adam(1e-3)

  def put(tree):
    return jax.device_put(tree, meshes.param_shardings(mesh, tree))

  params = put(model.init(jax.random.key(0)))
  step = make_train_step(
    model, ALGORITHMS["dapo"], optimizer, lambda count: 1e-3, temperature=1.0, micro_batches=2
  )
  zero = jax.device_put(jnp.int32(0), meshes.replicated(mesh))
  state = TrainState(zero, params, put(optimizer.init(params)))
  batch = jax.tree.map(lambda a: jnp.concatenate([a, a]), make_batch())
  batch = jax.device_put(batch, meshes.batch_sharding(mesh))
  layout = jax.tree.map(lambda leaf: leaf.sharding, state)
  assert len({leaf.spec for leaf in jax.tree.leaves(layout)}) > 3
  compilations.clear()
  for count in (1, 1, 1):
    state, _ = step(state, batch)
    assert len(compilations) == count
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == layout


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_the_scorer_change_nothing(params, micro_batches):
  batch = make_batch()
  whole = make_score(MODEL, temperature=0.7)(params, batch)
  parts = make_score(MODEL, temperature=0.7, micro_batches=micro_batches)(params, batch)
  np.testing.assert_allclose(parts, whole, atol=1e-6)
  assert len(np.unique(np.asarray(whole).round(3))) > 20


def test_the_scorer_needs_less_memory_in_micro_batches():
  """Four parts of a batch that is large against the model take about a quarter of the room."""
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
