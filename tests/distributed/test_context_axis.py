"""Tests meshes whose axis `context` splits the tokens of a row, against one device.

One device computes the plain rows, in which a prompt's last token is computed once.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import config as configs
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.reduction import WithinBudget
from grpo_jax.learning.step import Batch, TrainState, make_score, make_train_step, score_batch
from grpo_jax.models import attention
from grpo_jax.models.attention import join_rows, split_rows, tiled_attention
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.plan.estimate import compile_program
from grpo_jax.plan.hardware import open_topology
from grpo_jax.plan.programs import open_programs
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tokens import ByteTokenizer
from tests.helpers.plans import load

# Layers with and without a window, and a soft cap: all that attention can have.
CONFIG = ModelConfig(
  vocab_size=264, width=16, layers=2, heads=8, kv_heads=4, head_dim=4, mlp=24, tied=False,
  local_layers=(True, False), window=5, attn_softcap=2.0,
)  # fmt: skip
MIXTURE = dataclasses.replace(
  CONFIG, experts=8, experts_per_token=3, router_normalized=True, names="qwen_moe"
)
PROMPTS, GROUP, MICRO = 4, 3, 2
EVEN, ODD = (9, 16), (6, 7)  # tokens of prompts and completions
# Each mesh with lengths that it divides (N - 1 and T), or not.
CASES = [((1, 1, 1, 1, 8), EVEN), ((1, 2, 2, 1, 2), ODD)]
SLOW = [((1, 1, 1, 1, 4), ODD), ((2, 1, 2, 1, 2), EVEN), ((2, 2, 1, 1, 2), ODD)]


@functools.cache
def init(config=CONFIG):
  return jax.tree.map(np.asarray, Decoder(config).init(jax.random.key(0)))


def make_batch(lengths, config=CONFIG):
  rng, (n, t) = np.random.default_rng(0), lengths
  rows = PROMPTS, GROUP, t
  mask = np.arange(t) < rng.integers(1, t + 1, (PROMPTS, GROUP, 1))
  routes = {}
  if config.experts:
    size = config.layers * config.experts_per_token
    per_token = {"routes": rows, "prompt_routes": (PROMPTS, n)}
    routes = {k: rng.integers(0, 8, (*v, size)).astype(np.uint8) for k, v in per_token.items()}
  return Batch(
    prompts=rng.integers(0, 257, (PROMPTS, n)).astype(np.int32),
    prompt_mask=np.arange(n) >= np.array([[0], [2], [n - 1], [3]]),
    completions=rng.integers(0, 257, rows).astype(np.int32),
    mask=mask,
    advantages=rng.normal(size=(PROMPTS, GROUP)).astype(np.float32),
    weights=np.asarray(token_weights(mask, "token")),
    sampler_logp=-rng.random(rows).astype(np.float32),
    **routes,
  )


def on_mesh(shape, config=CONFIG, **settings):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  return mesh, Decoder(
    config,
    place=meshes.placer(mesh),
    vocab_shards=meshes.vocab_shards(mesh, config.vocab_size),
    prompt_shards=meshes.prompt_shards(meshes.batch_sharding(mesh)),
    token_shards=meshes.token_shards(mesh),
    attention=meshes.over_context(mesh, tiled_attention) if len(shape) > 3 else tiled_attention,
    **settings,
  )


@functools.cache
def step_on(shape, lengths, config=CONFIG):
  """Returns (gradients, metrics, log-probs before the step, compiled step) of one SGD step."""
  mesh, model = on_mesh(shape, config)
  table = meshes.param_shardings(mesh, init(config))
  params = jax.device_put(init(config), table)
  optimizer = optax.sgd(1.0)
  step = make_train_step(
    model,
    ALGORITHMS["dapo"],
    optimizer,
    lambda count: 1.0,
    temperature=0.7,
    micro_batches=MICRO,
    balance=0.5 if config.experts else 0.0,
  )
  batch = jax.device_put(make_batch(lengths, config), meshes.batch_sharding(mesh))
  zero = jax.device_put(jnp.int32(0), meshes.replicated(mesh))
  logp = np.asarray(make_score(model, temperature=0.7)(params, batch))
  state = TrainState(zero, params, optimizer.init(params))
  compiled = step.lower(state, batch).compile()
  state, metrics = compiled(state, batch)
  for leaf, layout in zip(jax.tree.leaves(state.params), jax.tree.leaves(table), strict=True):
    assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
  gradients = jax.tree.map(lambda old, new: old - np.asarray(new), init(config), state.params)
  return gradients, jax.device_get(metrics), logp, compiled


def check(shape, lengths, config=CONFIG):
  expected, expected_metrics, expected_logp, _ = step_on((1, 1, 1), lengths, config)
  gradients, metrics, logp, _ = step_on(shape, lengths, config)
  np.testing.assert_allclose(logp, expected_logp, atol=1e-5)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
  named = jax.tree_util.tree_leaves_with_path(expected)
  for (path, leaf), other in zip(named, jax.tree.leaves(gradients), strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(other, leaf, atol=1e-5, err_msg=name)
    assert np.abs(leaf).max() > 1e-5, name


@pytest.fixture(scope="module", autouse=True)
def several_tiles():
  """Cuts even these rows into tiles of two or three queries."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "UNTILED_SCORES", 8)
    patch.setattr(attention, "TILE_SCORES", 50)
    yield


@pytest.mark.parametrize(("shape", "lengths"), CASES, ids=str)
def test_a_step_is_the_same_as_on_one_device(shape, lengths):
  check(shape, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "lengths"), SLOW, ids=str)
def test_more_meshes_change_nothing(shape, lengths):
  check(shape, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4), (1, 1, 1, 2, 4)], ids=str)
def test_a_mixture_uses_the_routes_of_its_tokens(shape):
  check(shape, ODD, MIXTURE)


def test_a_step_moves_keys_and_weights_but_no_hidden_states():
  """Hidden states have D=16 numbers a token, and keys and values 4 heads of 4."""
  *_, compiled = step_on((1, 1, 1, 1, 8), EVEN)
  n, t = 8, 16
  keys = [PROMPTS // MICRO, n + GROUP * t, 4, 4]
  matrices = {(16, 32), (16, 16), (16, 24), (16, 264)}  # queries and outputs, keys, MLP, tables
  kinds = r"(all-gather|all-to-all|collective-permute)(?:-start)?\("
  moved = re.findall(rf"= (\(.*?\)|\S+) {kinds}", compiled.as_text())
  assert moved
  for result, kind in moved:
    for dims in re.findall(r"f32\[([\d,]*)\]", result):
      shape = [int(size) for size in dims.split(",")]
      is_keys = math.prod(shape) == math.prod(keys) and shape[-2:] == [4, 4]
      assert kind == "all-gather"
      assert is_keys or tuple(sorted(shape)) in matrices, shape


def test_shards_of_attention_are_parts_of_the_whole():
  rng, (n, t) = np.random.default_rng(0), (8, 12)
  prompt_mask = jnp.asarray(np.arange(n) >= np.array([[0], [3]]))

  def array(heads):
    rows = jnp.asarray(rng.normal(size=(2, n, heads, 4)), jnp.float32)
    return rows, jnp.asarray(rng.normal(size=(2, GROUP, t, heads, 4)), jnp.float32)

  parts, options = (array(4), array(2), array(2)), {"group": GROUP, "window": 5, "scale": 0.5}
  whole = tiled_attention(*(join_rows(*x) for x in parts), prompt_mask, True, **options)
  q, k, v = (join_rows(*x, 4) for x in parts)
  size = q.shape[1] // 4
  shards = [
    tiled_attention(
      q[:, i * size : (i + 1) * size], k, v, prompt_mask, True, shard=(i, 4), **options
    )
    for i in range(4)
  ]
  actual = split_rows(jnp.concatenate(shards, axis=1), n, GROUP, 4)
  for a, b in zip(actual, split_rows(whole, n, GROUP), strict=True):
    real = np.ones(a.shape[:2], bool) if a.ndim == 5 else np.asarray(prompt_mask)
    np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=1e-6)


def test_a_prompt_of_one_token_is_padded():
  batch = make_batch((1, 5))
  batch = dataclasses.replace(batch, prompt_mask=np.ones((PROMPTS, 1), bool))
  _, model = on_mesh((1, 1, 1, 1, 2))
  params = init()
  expected, _ = score_batch(Decoder(CONFIG), params, batch, 1.0)
  actual, _ = jax.jit(lambda params: score_batch(model, params, batch, 1.0))(params)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_samples_are_the_same_as_on_one_device():
  """The axis splits heads and the cache while sampling, as `tensor` does."""

  def sample(shape):
    mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
    model = Decoder(
      CONFIG,
      place=meshes.placer(mesh, sampling=True),
      vocab_shards=meshes.vocab_shards(mesh, 264, sampling=True),
    )
    sampler = Sampler(model, ByteTokenizer(), 4, 6, prompt_sharding=meshes.batch_sharding(mesh))
    apart = unstack(init())
    params = jax.device_put(apart, meshes.param_shardings(mesh, apart, sampling=True))
    prompts = [f"{i}:" for i in range(PROMPTS)]
    return sampler(params, prompts, jax.random.key(3), group=GROUP, temperature=1.0)

  np.testing.assert_array_equal(sample((1, 1, 1)).tokens, sample((2, 1, 2, 1, 2)).tokens)


def test_the_axis_splits_weights_and_never_prompts():
  mesh = meshes.make_mesh((1, 2, 1, 1, 4))
  layers = {"q": (2, 16, 32), "o": (2, 32, 16), "down": (2, 24, 16)}
  tree = {"layers": {name: np.zeros(shape) for name, shape in layers.items()}}
  learning = meshes.param_shardings(mesh, tree)["layers"]
  sampling = meshes.param_shardings(mesh, tree, sampling=True)["layers"]
  assert learning["q"].shard_shape((2, 16, 32)) == (2, 2, 32)
  assert learning["down"].shard_shape((2, 24, 16)) == (2, 24, 2)
  # Where both do not divide a dimension, fsdp alone splits it.
  narrow = {"layers": {"q": np.zeros((2, 6, 32))}}
  assert meshes.param_shardings(mesh, narrow)["layers"]["q"].shard_shape((2, 6, 32)) == (2, 3, 32)
  assert sampling["q"].shard_shape((2, 16, 32)) == (2, 16, 8)
  assert sampling["o"].shard_shape((2, 32, 16)) == (2, 8, 16)
  assert meshes.batch_sharding(mesh).shard_shape((16, 3)) == (8, 3)
  assert meshes.cache_shards(mesh, 8) == 4
  assert meshes.cache_shards(mesh, 2) == 1


def test_micro_batches_count_the_tokens_of_a_device():
  counts = []
  batch = make_batch((8, 8))  # rows of 32 tokens, 8 on each of 4 devices
  for shards in (1, 4):
    options = {"budget": 16, "prompt_shards": 1, "token_shards": shards}
    WithinBudget(lambda count: lambda *_: counts.append(count), **options)(None, batch)
  assert counts == [4, 2]


@pytest.mark.slow
def test_the_plan_divides_the_work_of_a_row():
  """Compares 8 devices that share one prompt with one device."""
  compiled = {}
  for devices in (1, 8):
    c = load(
      "model.remat=layers", "rollout.prompts_per_step=1", "mesh.data=1", f"mesh.context={devices}",
      "rollout.completion_length=256",
    )  # fmt: skip
    c.rollout.prompt_length = 257
    programs = open_programs(c, open_topology(f"cpu:{devices}"))
    compiled[devices] = compile_program(programs, "update")
  (one, one_parts), (eight, eight_parts) = compiled.values()
  (one_cost, *_), (cost, excess, _) = one_parts["update"], eight_parts["update"]
  # A prompt's last token is computed with each of its completions, and nothing else twice.
  assert 1 / 8 <= cost.flops / one_cost.flops < 1.05 / 8
  assert excess < 1.05
  assert eight.by_purpose["optimizer"] < 0.2 * one.by_purpose["optimizer"]
  assert eight.by_purpose["temporaries"] < 0.3 * one.by_purpose["temporaries"]


def test_what_does_not_fit_is_named():
  c = configs.load("experiments/tiny.py", ["--config.mesh.context=3"])
  assert configs.check(c, 8) == [
    "mesh is data=-1, fsdp=1, tensor=1, context=3: that does not divide the 8 device(s) there are"
  ]
  c.mesh.context = 0
  assert "sizes must be at least 1" in configs.check(c, 8)[0]
  c.mesh.context = 4
  assert configs.check(c, 8) == []
  assert configs.mesh_shape(c.mesh, 8) == (2, 1, 1, 1, 4)
  for name, value, problem in (
    ("model.attention", "splash", "model.attention is 'splash', it must be 'auto' or 'tiled' with "
     "mesh.context=4"),
    ("train.reduction", "deterministic", "mesh.context is 4, it must be 1 with train.reduction"),
    ("mesh.rollout_devices", 4, "mesh.rollout_devices is 4, but mesh.context is 4"),
  ):  # fmt: skip
    changed = load("mesh.context=4", f"{name}={value}", "rollout.ahead=1")
    assert problem in "\n".join(configs.check(changed, 8)), name
