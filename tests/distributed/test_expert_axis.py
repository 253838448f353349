"""Tests a step and a sample of a mixture of experts on meshes with an expert axis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import config as configs
from grpo_jax import misfits
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models import experts
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tokens import ByteTokenizer
from tests.helpers.dense_experts import dense

CONFIG = ModelConfig(
  vocab_size=264, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, tied=False,
  experts=8, experts_per_token=3, router_normalized=True, names="qwen_moe",
)  # fmt: skip
PROMPTS, GROUP, LENGTH = 8, 2, 4
MESHES = [(1, 1, 1, 8), (2, 1, 1, 4), (1, 2, 2, 2)]


@functools.cache
def init():
  return jax.tree.map(np.asarray, Decoder(CONFIG).init(jax.random.key(0)))


def on_mesh(shape, form):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  model = Decoder(
    CONFIG,
    place=meshes.placer(mesh),
    vocab_shards=meshes.vocab_shards(mesh, CONFIG.vocab_size),
    prompt_shards=meshes.prompt_shards(meshes.batch_sharding(mesh)),
    form=form,
  )
  return mesh, model


@functools.cache
def step_on(shape, form):
  """Returns the change of the parameters by one SGD step, and its metrics."""
  mesh, model = on_mesh(shape, form)
  params = jax.device_put(init(), meshes.param_shardings(mesh, init()))
  rng = np.random.default_rng(0)
  mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (PROMPTS, GROUP, 1))
  batch = Batch(
    prompts=rng.integers(0, 257, (PROMPTS, 4)).astype(np.int32),
    prompt_mask=np.arange(4) >= rng.integers(0, 3, (PROMPTS, 1)),
    completions=rng.integers(0, 257, (PROMPTS, GROUP, LENGTH)).astype(np.int32),
    mask=mask,
    advantages=rng.normal(size=(PROMPTS, GROUP)).astype(np.float32),
    weights=np.asarray(token_weights(mask, "token")),
    sampler_logp=-rng.random((PROMPTS, GROUP, LENGTH)).astype(np.float32),
  )
  optimizer = optax.sgd(1.0)
  step = make_train_step(model, ALGORITHMS["dapo"], optimizer, lambda count: 1.0, temperature=1.0)
  state = TrainState(
    jax.device_put(jnp.int32(0), meshes.replicated(mesh)), params, optimizer.init(params)
  )
  state, metrics = step(state, jax.device_put(batch, meshes.batch_sharding(mesh)))
  table = meshes.param_shardings(mesh, init())
  for leaf, layout in zip(jax.tree.leaves(state.params), jax.tree.leaves(table), strict=True):
    assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
  return jax.tree.map(lambda old, new: old - new, init(), state.params), metrics


@pytest.mark.parametrize("form", [experts.blocked, experts.ragged], ids=lambda form: form.__name__)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_step_is_the_same_as_on_one_device(shape, form):
  expected, expected_metrics = step_on((1, 1, 1), dense)
  actual, metrics = step_on(shape, form)
  np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], atol=1e-5)
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
    name = jax.tree_util.keystr(path)
    other = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
    np.testing.assert_allclose(other, leaf, atol=2e-5, err_msg=name)
    assert np.abs(leaf).max() > 1e-6, name


def test_samples_are_the_same_as_on_one_device():
  def sample(shape):
    mesh, model = on_mesh(shape, experts.blocked)
    sampler = Sampler(
      model, ByteTokenizer(), 4, LENGTH, prompt_sharding=meshes.batch_sharding(mesh)
    )
    apart = unstack(init())
    params = jax.device_put(apart, meshes.param_shardings(mesh, apart, sampling=True))
    prompts = [f"{i}:" for i in range(PROMPTS)]
    return sampler(params, prompts, jax.random.key(3), group=GROUP, temperature=1.0)

  one, several = sample((1, 1, 1)), sample((2, 1, 1, 4))
  np.testing.assert_array_equal(one.tokens, several.tokens)


def test_experts_and_prompts_are_split_over_the_axis():
  mesh = meshes.make_mesh((2, 1, 1, 4))
  layout = meshes.param_shardings(mesh, init())["layers"]
  assert layout["experts_up"].shard_shape((2, 8, 16, 24)) == (2, 2, 16, 24)
  assert layout["experts_down"].shard_shape((2, 8, 24, 16)) == (2, 2, 24, 16)
  assert layout["router"].is_fully_replicated
  assert layout["q"].is_fully_replicated
  assert meshes.batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)
  # Without the axis, every spec is what it was.
  plain = meshes.make_mesh((2, 2, 2))
  assert meshes.batch_sharding(plain).spec == jax.sharding.PartitionSpec(("data", "fsdp"))
  assert meshes.param_shardings(plain, init())["layers"]["experts_up"].shard_shape(
    (2, 8, 16, 24)
  ) == (2, 8, 8, 12)


def test_the_axis_must_divide_the_experts():
  c = configs.default_config()
  dense_model = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6)
  assert misfits.expert_misfits(c, dense_model) == []
  c.mesh.expert, c.model.source = 3, "a/b"
  assert misfits.expert_misfits(c, CONFIG) == [
    "mesh.expert is 3, and a/b has 8 experts, which that does not divide: set it to a divisor of 8"
  ]
  assert misfits.expert_misfits(c, dense_model) == [
    "mesh.expert is 3, and a/b has no experts: set it to 1, and use mesh.fsdp or mesh.data"
  ]
  c.train.freeze_router = True
  assert misfits.expert_misfits(c, dense_model) == [
    "train.freeze_router is true, and a/b has no router: set it to false"
  ]
  c.train.freeze_router, c.train.balance = False, 0.01
  assert misfits.expert_misfits(c, dense_model) == [
    "train.balance is 0.01, and a/b has no router: set it to 0"
  ]
  c.train.freeze_router = True
  assert misfits.expert_misfits(c, CONFIG) == [
    "train.balance is 0.01, and train.freeze_router is true: the router that it would balance "
    "stays as it is; set it to 0"
  ]
  c.train.freeze_router, c.train.balance = False, 0.0
  c.mesh.expert = 4
  assert misfits.expert_misfits(c, CONFIG) == []
  assert configs.mesh_shape(c.mesh, 8) == (2, 1, 1, 4)
  c.mesh.data = 1
  with pytest.raises(ValueError, match="expert=4: that does not divide the 8 device"):
    configs.mesh_shape(c.mesh, 8)
