"""Tests a step and a sample on every mesh of up to eight devices against one device.

The compiled programs are read as well: their all-gathers, and the sizes of their buffers.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core import tiles
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.divergences import head_divergence
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.plan.cost import Counter
from grpo_jax.plan.programs import put
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tokens import ByteTokenizer

# Every size is a multiple of eight, and no two matrices have the same shape on any mesh.
CONFIG = ModelConfig(
  vocab_size=272, width=24, layers=2, heads=8, kv_heads=8, head_dim=2, mlp=56, tied=False
)
PROMPTS, GROUP, LENGTH, MICRO = 16, 2, 4, 2
MATRICES = 7  # of a layer: query, key, value, output; gate, up, down
TILES = 3  # plus a remainder, for 272 tokens and for a half, a fourth and an eighth of them
SHAPES = [
  shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(shape) in (1, 2, 4, 8)
]
FAST = [(2, 2, 2)]


@functools.cache
def init():
  return jax.tree.map(np.asarray, Decoder(CONFIG).init(jax.random.key(0)))


def make_batch():
  rng = np.random.default_rng(0)
  mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (PROMPTS, GROUP, 1))
  return Batch(
    prompts=rng.integers(0, 272, (PROMPTS, 4)).astype(np.int32),
    prompt_mask=np.arange(4) >= rng.integers(0, 3, (PROMPTS, 1)),
    completions=rng.integers(0, 272, (PROMPTS, GROUP, LENGTH)).astype(np.int32),
    mask=mask,
    advantages=rng.normal(size=(PROMPTS, GROUP)).astype(np.float32),
    weights=np.asarray(token_weights(mask, "token")),
    sampler_logp=-rng.random((PROMPTS, GROUP, LENGTH)).astype(np.float32),
  )


def on_mesh(shape):
  """Returns (mesh, model, parameters with the shardings of the table)."""
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  params = jax.device_put(init(), meshes.param_shardings(mesh, init()))
  return mesh, model_on(mesh, CONFIG), params


def model_on(mesh, config, **settings):
  return Decoder(
    config,
    place=meshes.placer(mesh),
    vocab_shards=meshes.vocab_shards(mesh, config.vocab_size),
    prompt_shards=meshes.prompt_shards(meshes.batch_sharding(mesh)),
    **settings,
  )


def step_on(shape):
  """Returns (gradients, metrics, compiled step) of one SGD step under a transfer guard."""
  mesh, model, params = on_mesh(shape)
  optimizer = optax.sgd(1.0)
  step = make_train_step(
    model, ALGORITHMS["dapo"], optimizer, lambda count: 1.0, temperature=1.0, micro_batches=MICRO
  )
  zero = jax.device_put(jnp.int32(0), meshes.replicated(mesh))
  batch = jax.device_put(make_batch(), meshes.batch_sharding(mesh))
  state = TrainState(zero, params, optimizer.init(params))
  compiled = step.lower(state, batch).compile()
  with jax.transfer_guard("disallow"):
    state, metrics = compiled(state, batch)
  table = jax.tree.leaves(meshes.param_shardings(mesh, init()))
  for leaf, layout in zip(jax.tree.leaves(state.params), table, strict=True):
    assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
  return jax.tree.map(lambda old, new: old - new, init(), state.params), metrics, compiled


def sample_on(shape):
  mesh, model, _ = on_mesh(shape)
  sampler = Sampler(model, ByteTokenizer(), 4, LENGTH, prompt_sharding=meshes.batch_sharding(mesh))
  apart = unstack(init())
  params = jax.device_put(apart, meshes.param_shardings(mesh, apart, sampling=True))
  prompts = [f"{i}:" for i in range(PROMPTS)]
  return sampler(params, prompts, jax.random.key(3), group=GROUP, temperature=1.0)


@pytest.fixture(scope="module", autouse=True)
def several_tiles():
  """Splits even a vocabulary that would fit into one tile."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tiles, "tiles_of", lambda rows, size: (TILES, size // TILES))
    yield


@pytest.fixture(scope="module")
def one_device():
  return step_on((1, 1, 1)), sample_on((1, 1, 1))


def gathered(compiled):
  """Returns the result shapes of a program's all-gathers, each with sorted dimensions."""
  results = re.findall(r"= (\(.*?\)|\S+) all-gather(?:-start)?\(", compiled.as_text())
  shapes = [shape for line in results for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
  return [tuple(sorted(int(n) for n in shape.split(",") if n)) for shape in shapes]


def runs(compiled):
  """Counts the collectives of each kind that run, once per iteration inside loops."""
  collectives = Counter(compiled.as_text()).cost()[0].collectives
  return {kind: int(count) for kind, (count, _) in collectives.items()}


def one_layer(mesh_shape):
  """Returns the shapes of a layer's matrices and of the tables, gathered over `fsdp` alone."""
  tensor, shapes = mesh_shape[2], set()
  for rule_path, matrix in jax.tree_util.tree_leaves_with_path(init()):
    name = jax.tree_util.keystr(rule_path, simple=True, separator="/")
    spec = next(spec for pattern, spec in meshes.RULES if re.search(pattern, name))
    spec = tuple(spec) + (None,) * (matrix.ndim - len(spec))
    sizes = [n // tensor if axis == "tensor" else n for n, axis in zip(matrix.shape, spec)]
    if "fsdp" in spec:
      shapes.add(tuple(sorted(sizes[1:] if name.startswith("layers/") else sizes)))
  return shapes


def check(shape, one_device):
  """Compares a step and a sample on a mesh with those on one device, and reads the program."""
  (expected, expected_metrics, single), sample = one_device
  gradients, metrics, compiled = step_on(shape)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)

  data, fsdp, tensor = shape
  # With `fsdp`, a program gathers the weights of one layer at a time: no stack of layers, nothing
  # over `tensor`, no prompts or hidden states of other devices. Without, it gathers nothing.
  assert set(gathered(compiled)) == (one_layer(shape) if fsdp > 1 else set())
  # Each matrix of each layer once forward and once backward; the embedding and the head once.
  most = MICRO * (2 * CONFIG.layers * MATRICES + 2)
  assert runs(compiled).get("all-gather", 0) <= (most if fsdp > 1 else 0)
  # The arguments have the sizes that the table gives, to the byte (XLA rounds buffers up to 64).
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  layouts = meshes.param_shardings(mesh, init())
  params_bytes = sum(
    math.prod(layout.shard_shape(leaf.shape)) * 4
    for leaf, layout in zip(jax.tree.leaves(init()), jax.tree.leaves(layouts))
  )
  rows = sum(leaf.nbytes for leaf in jax.tree.leaves(make_batch())) // (data * fsdp)
  memory = compiled.memory_analysis()
  buffers = len(jax.tree.leaves(init())) + len(jax.tree.leaves(make_batch())) + 1
  assert 0 <= memory.argument_size_in_bytes - params_bytes - rows <= 64 * buffers
  # Temporaries shrink with the prompts of a device; gathered activations would not.
  if tensor == 1 and data * fsdp > 1:
    assert memory.temp_size_in_bytes < single.memory_analysis().temp_size_in_bytes

  drawn = sample_on(shape)
  np.testing.assert_array_equal(drawn.tokens, sample.tokens)
  np.testing.assert_allclose(drawn.logp, sample.logp, atol=1e-5)
  assert len(np.unique(sample.tokens)) > 50


@pytest.mark.parametrize("shape", FAST, ids=str)
def test_a_mesh_changes_nothing(shape, one_device):
  check(shape, one_device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in FAST and s != (1, 1, 1)], ids=str)
def test_every_mesh_changes_nothing(shape, one_device):
  check(shape, one_device)


def test_there_are_twenty_meshes():
  assert len(SHAPES) == len(set(SHAPES)) == 20
  assert [sum(math.prod(s) == n for s in SHAPES) for n in (1, 2, 4, 8)] == [1, 3, 6, 10]


@pytest.mark.slow
def test_a_model_without_sharding_constraints_is_caught():
  """Shows that the test above can fail: without `place`, prompts are gathered on each device."""
  mesh, _, params = on_mesh((1, 2, 1))
  step = make_train_step(
    Decoder(CONFIG), ALGORITHMS["dapo"], optax.sgd(1.0), lambda count: 1.0, temperature=1.0
  )
  state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
  batch = jax.device_put(make_batch(), meshes.batch_sharding(mesh))
  assert set(gathered(step.lower(state, batch).compile())) - one_layer((1, 2, 1))


# `data` or `fsdp` alone, `tensor` alone, and both kinds
SPLITS = [(1, 8, 1), (8, 1, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize("shape", SPLITS, ids=str)
def test_devices_exchange_nothing_per_tile_of_the_head(shape):
  """The head is gathered over `fsdp` once and its gradient summed once, forward and backward."""
  mesh = meshes.make_mesh(shape, jax.devices()[:8])
  data, fsdp, tensor = shape
  model = model_on(mesh, dataclasses.replace(CONFIG, vocab_size=4096))
  assert (model.vocab_shards, model.prompt_shards) == (tensor, data * fsdp)
  head = {"head": jax.ShapeDtypeStruct((4096, 24), jnp.float32)}
  table = meshes.param_shardings(mesh, head)
  rows = jax.ShapeDtypeStruct((8, 3, 24), jnp.float32), jax.ShapeDtypeStruct((8, 3), jnp.int32)

  def loss(params, hidden, tokens):
    shards = {"vocab_shards": model.vocab_shards, "row_shards": model.prompt_shards}
    return head_logprobs(hidden, model.head(params), tokens, **shards)[0].sum()

  batch = meshes.batch_sharding(mesh)
  gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(table, batch))
  compiled = gradient.lower(put(head, table), *put(rows, batch)).compile()
  assert gathered(compiled) == ([(24, 4096 // tensor)] if fsdp > 1 else [])
  collectives = runs(compiled)
  assert collectives.pop("all-gather", 0) == (fsdp > 1)
  # Over `tensor`: the largest logits, sums over the vocabulary, the gradient of the rows. Over the
  # other axes: the gradient of the head. The compiler may combine reductions.
  assert 0 < sum(collectives.values()) <= 3 * (tensor > 1) + (data * fsdp > 1)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_a_divergence_exchanges_nothing_per_tile(shape, monkeypatch):
  """Twice as many tiles need as many collectives."""
  mesh = meshes.make_mesh(shape, jax.devices()[:8])
  model = model_on(mesh, dataclasses.replace(CONFIG, vocab_size=4096))
  heads = {name: {"head": jax.ShapeDtypeStruct((4096, 24), jnp.float32)} for name in ("own", "his")}
  tables = {name: meshes.param_shardings(mesh, head) for name, head in heads.items()}
  batch, rows = meshes.batch_sharding(mesh), jax.ShapeDtypeStruct((8, 3, 24), jnp.float32)

  def loss(own, hidden, his, teacher_hidden):
    shards = {"vocab_shards": model.vocab_shards, "row_shards": model.prompt_shards}
    models = hidden, model.head(own), teacher_hidden, model.head(his)
    return head_divergence(*models, beta=0.5, **shards).sum()

  counts = []
  for factor in (1, 2):
    count = factor * TILES
    monkeypatch.setattr(tiles, "tiles_of", lambda rows, size, n=count: (n, size // n))
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(tables["own"], batch))
    own, his = (put(heads[name], tables[name]) for name in ("own", "his"))
    compiled = gradient.lower(own, put(rows, batch), his, put(rows, batch)).compile()
    counts.append(runs(compiled))
  assert counts[0] == counts[1]
  assert 0 < sum(counts[0].values()) <= 12


@pytest.mark.parametrize("shape", [(1, 8, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow)])
def test_an_update_gathers_a_matrix_three_times(shape):
  """Counts one gather each in the forward pass, rematerialization and the backward pass."""
  mesh = meshes.make_mesh(shape, jax.devices()[:8])
  model = model_on(mesh, dataclasses.replace(CONFIG, tied=True), remat="layers")

  def shapes(tree):
    return put(tree, meshes.param_shardings(mesh, tree))

  optimizer, params = optax.adam(1.0), shapes(jax.eval_shape(model.init, jax.random.key(0)))
  zero = shapes(jax.ShapeDtypeStruct((), jnp.int32))
  state = TrainState(zero, params, shapes(jax.eval_shape(optimizer.init, params)))
  batch = put(make_batch(), meshes.batch_sharding(mesh))
  step = make_train_step(
    model, ALGORITHMS["dapo"], optimizer, lambda count: 1.0, temperature=1.0, micro_batches=MICRO
  )
  collectives = runs(step.lower(state, batch).compile())
  assert 0 < collectives["all-gather"] <= MICRO * (3 * CONFIG.layers * MATRICES + 1)
