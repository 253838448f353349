"""Tests the load-balance loss against its definition, token by token, and under any layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.balance import (
  balance_loss,
  router_sums,
  shares_of,
  tokens_read,
  with_balance,
)
from grpo_jax.learning.batch import Batch, select
from grpo_jax.learning.step import TrainState, make_loss, make_train_step
from grpo_jax.learning.updates import UpdateConfig, make_gradients
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder

CONFIG = ModelConfig(
  vocab_size=31, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, tied=False,
  experts=4, experts_per_token=2, router_normalized=True, names="qwen_moe",
)  # fmt: skip
MODEL = Decoder(CONFIG)
P, G, N, T = 4, 2, 5, 6


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  params["layers"]["router"] *= 4
  return params


def make_batch(with_routes=True, prompts=P):
  rng = np.random.default_rng(0)
  mask = np.arange(T) < rng.integers(1, T + 1, (prompts, G, 1))
  # The second half of the prompts is longer, and its routes are others: micro-batches differ.
  start = np.where(np.arange(prompts) < prompts // 2, 3, 1)[:, None]
  experts = np.stack([rng.permuted(np.arange(4))[:2] for _ in range(prompts * (N + G * T) * 2)])
  experts = experts.reshape(prompts, -1, 4)
  experts[: prompts // 2, :, :2] = 1, 3
  batch = Batch(
    prompts=rng.integers(0, 31, (prompts, N)).astype(np.int32),
    prompt_mask=np.arange(N) >= start,
    completions=rng.integers(0, 31, (prompts, G, T)).astype(np.int32),
    mask=mask,
    advantages=rng.normal(size=(prompts, G)).astype(np.float32),
    weights=np.asarray(token_weights(mask, "token")),
    sampler_logp=-rng.random((prompts, G, T)).astype(np.float32),
    routes=experts[:, N:].reshape(prompts, G, T, 4).astype(np.uint8),
    prompt_routes=experts[:, :N].astype(np.uint8),
    temperature=1.0,
  )
  if not with_routes:
    batch = dataclasses.replace(batch, routes=None, prompt_routes=None)
  return jax.tree.map(jnp.asarray, batch)


def definition(probs, chosen, batch):
  """Returns the mean over layers of `E sum_e f_e P_e`, counting real tokens one by one.

  Each layer is what `load_balancing_loss_func` of transformers computes for a model of one layer.
  """
  rows = []  # (prompt, slot of the input)
  for p in range(len(batch.prompts)):
    if not np.any(batch.mask[p]):
      continue
    rows += [(p, n) for n in range(N) if batch.prompt_mask[p, n]]
    for g in range(G):
      length = int(np.sum(batch.mask[p, g]))
      rows += [(p, N + g * (T - 1) + t) for t in range(length - 1)]
  losses = []
  for layer in range(len(probs)):
    f, mean = np.zeros(4), np.zeros(4)
    for p, s in rows:
      for e in chosen[layer, p, s]:
        f[e] += 1 / len(rows)
      mean += np.asarray(probs[layer, p, s], np.float64) / len(rows)
    losses.append(4 * (f * mean).sum())
  return np.mean(losses)


def routing_of(params, batch):
  rows = (batch.prompts, batch.prompt_mask, batch.completions)
  routes = None if batch.routes is None else (batch.prompt_routes, batch.routes)
  return jax.jit(MODEL.score_with_routing)(params, *rows, routes=routes)[1]


def balance_of(probs, chosen, batch):
  """Returns the loss and the metrics of the probabilities and experts of all layers."""
  real = tokens_read(batch)
  return balance_loss(jax.vmap(lambda *layer: router_sums(*layer, real))(probs, chosen), batch)


@pytest.mark.parametrize("with_routes", [True, False], ids=["recorded", "fresh"])
def test_the_loss_is_its_definition(params, with_routes):
  batch = make_batch(with_routes)
  batch = dataclasses.replace(batch, mask=batch.mask.at[1].set(False))  # an empty prompt
  routing = routing_of(params, batch)
  expected = definition(routing.probs, np.asarray(routing.experts), batch)
  loss, metrics = balance_of(routing.probs, routing.experts, with_balance(batch, 2, 4))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics["router/balance"], expected, rtol=1e-6)
  if with_routes:
    chosen = np.moveaxis(np.asarray(batch.prompt_routes).reshape(P, N, 2, 2), 2, 0)
    np.testing.assert_array_equal(routing.experts[:, :, :N], chosen)
  assert balance_of(routing.probs, routing.experts, batch)[0] is None


def test_a_layer_is_that_of_transformers():
  """Printed by `load_balancing_loss_func` of Qwen3-MoE, transformers 5.23, layer by layer."""
  rng = np.random.default_rng(0)
  logits = [rng.normal(size=(12, 4)) * 2 for _ in range(3)]
  mask = rng.random((3, 4)) < 0.7
  expected = [2.2982583, 2.1132865, 2.1959803]
  completions = np.zeros((3, 1, 1), np.int32)
  batch = Batch(
    np.zeros((3, 4), np.int32), mask, completions, completions == 0, advantages=None,
    weights=None, sampler_logp=None,
  )  # fmt: skip
  probs = jax.nn.softmax(jnp.float32(np.stack(logits))).reshape(3, 3, 4, 4)
  chosen = jax.lax.top_k(probs, 2)[1]
  for layer in range(3):
    own = probs[layer : layer + 1], chosen[layer : layer + 1]
    loss, _ = balance_of(*own, with_balance(batch, layers=1, experts=4))
    np.testing.assert_allclose(loss, expected[layer], rtol=1e-6)
  loss, _ = balance_of(probs, chosen, with_balance(batch, layers=3, experts=4))
  np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)


def test_even_and_uneven_routers_by_hand():
  """Checks 4 experts, 2 a token: k = 2 where all is even, E = 4 where two experts get all."""
  batch = make_batch()
  even = jnp.full((1, P, N + G * (T - 1), 4), 0.25)
  chosen = jnp.broadcast_to(jnp.array([0, 1]), (1, P, even.shape[2], 2))
  loss, metrics = balance_of(even, chosen, dataclasses.replace(batch, balance=None))
  assert loss is None
  np.testing.assert_allclose(metrics["router/balance"], 2, rtol=1e-6)
  np.testing.assert_allclose(metrics["router/entropy"], np.log(4), rtol=1e-6)
  sure = jnp.broadcast_to(jnp.array([0.5, 0.5, 0, 0]), even.shape)
  _, metrics = balance_of(sure, chosen, batch)
  np.testing.assert_allclose(metrics["router/balance"], 4, rtol=1e-6)
  np.testing.assert_allclose(metrics["router/entropy"], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(shares_of(chosen, jnp.ones(even.shape[1:3], bool), 4), [[1, 1, 0, 0]])


def test_padding_may_hold_anything(params):
  batch = with_balance(make_batch(), 2, 4)
  routing = routing_of(params, batch)
  shift = np.asarray(batch.mask[..., 1:]).reshape(P, -1)
  real = np.concatenate([batch.prompt_mask, shift], 1)
  spoiled = jnp.where(real[..., None], routing.probs, jnp.nan)
  chosen = jnp.where(real[..., None], routing.experts, 3)

  def loss(probs, chosen):
    return balance_of(probs, chosen, batch)[0]

  expected, gradient = jax.value_and_grad(loss)(routing.probs, routing.experts)
  actual, spoiled_gradient = jax.value_and_grad(loss)(spoiled, chosen)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  np.testing.assert_allclose(spoiled_gradient, gradient, atol=1e-7)


def step(params, batch, micro_batches=1, model=MODEL, balance=0.5):
  optimizer = optax.sgd(1.0)
  update = make_train_step(model, "dapo", optimizer, micro_batches=micro_batches, balance=balance)
  state, metrics = update(TrainState.create(params, optimizer), batch)
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params), metrics


@pytest.fixture(scope="module")
def expected_step(params):
  return step(params, make_batch())


def assert_same(actual, expected):
  (change, metrics), (expected_change, expected_metrics) = actual, expected
  np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), change, expected_change)


def test_the_loss_and_gradient_of_a_step_hold_it(params, expected_step):
  batch = make_batch()
  routing = routing_of(params, batch)
  expected = definition(routing.probs, np.asarray(routing.experts), batch)
  _, metrics = step(params, batch, balance=0.0)
  without = float(metrics["loss"])
  np.testing.assert_allclose(expected_step[1]["loss"], without + 0.5 * expected, rtol=1e-5)
  gradients = make_gradients(MODEL, "dapo", UpdateConfig(balance=0.5, micro_batches=2))
  grads, *_ = gradients(params, batch, None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, expected_step[0])
  plain, _ = step(params, batch, balance=0.0)
  moved = plain["layers"]["router"] - expected_step[0]["layers"]["router"]
  assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_do_not_change_a_step(params, expected_step, micro_batches):
  assert_same(step(params, make_batch(), micro_batches), expected_step)


def test_empty_prompts_and_wider_padding_do_not_change_a_step(params, expected_step):
  batch = make_batch()
  padded = select(batch, np.arange(P), 8)
  wide = {
    name: jnp.pad(a, [(0, 0), (0, 0), (0, 3)] + [(0, 0)] * (a.ndim - 3))
    for name, a in padded.arrays().items()
    if a.ndim >= 3 and name != "prompt_routes"
  }
  assert_same(step(params, dataclasses.replace(padded, **wide)), expected_step)


def test_devices_do_not_change_a_step(params, expected_step):
  shape = (2, 1, 1, 2)
  mesh = meshes.make_mesh(shape, jax.devices()[:4])
  model = dataclasses.replace(MODEL, place=meshes.placer(mesh), prompt_shards=4)
  laid_out = jax.device_put(params, meshes.param_shardings(mesh, params))
  batch = jax.device_put(make_batch(), meshes.batch_sharding(mesh))
  assert_same(step(laid_out, batch, model=model), expected_step)


def test_it_spreads_the_tokens_of_a_router_that_prefers_two_experts(params):
  """With fresh routes, and no other loss: all advantages are 0."""
  layers = params["layers"] | {"router": params["layers"]["router"].at[:, :, :2].add(0.3)}
  skewed = params | {"embed": params["embed"] + 1, "layers": layers}
  batch = make_batch(with_routes=False)
  batch = dataclasses.replace(batch, advantages=jnp.zeros((P, G)))
  optimizer = optax.adam(0.05)
  update = make_train_step(MODEL, "dapo", optimizer, balance=1.0)
  state, values = TrainState.create(skewed, optimizer), []
  for _ in range(30):
    state, metrics = update(state, batch)
    values.append(float(metrics["router/balance"]))
  assert values[0] > 3
  assert values[-1] < 2.5


def test_no_array_has_all_layers_tokens_and_experts(params):
  """Its size is that of the activations of all layers for a model with many experts."""
  batch, tokens = make_batch(), N + G * (T - 1)
  shapes = [f"f32[2,{P},{tokens},4]", f"f32[2,{P * tokens},4]"]
  rows = (batch.prompts, batch.prompt_mask, batch.completions)
  whole = str(jax.make_jaxpr(MODEL.score_with_routing)(params, *rows))
  assert any(shape in whole for shape in shapes)
  text = str(jax.make_jaxpr(make_loss(MODEL, "dapo"))(params, batch, None))
  assert not any(shape in text for shape in shapes)


def test_a_model_without_experts_is_refused():
  dense = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6)
  with pytest.raises(ValueError, match=r"balance is 0\.1, and the model is not a mixture"):
    make_train_step(Decoder(dense), "dapo", optax.sgd(1.0), balance=0.1)
  assert make_loss(Decoder(dense), "dapo") is not None
