"""Tests that every parameter has a sharding, and that no sharding changes a result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.run.compilation import Watch

CONFIG = ModelConfig(
  vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, tied=False
)


Chip = dataclasses.make_dataclass("Chip", ["id", "slice_index"])


def test_slices_are_outermost_and_keep_the_order_within_each():
  chips = [Chip(0, 1), Chip(1, 0), Chip(2, 1), Chip(3, 0)]
  assert [chip.id for chip in meshes.in_slices(chips, 2)] == [1, 3, 0, 2]


def test_devices_that_know_no_slice_are_taken_as_equal_parts():
  devices = jax.devices()
  assert meshes.in_slices(devices, 2) == devices
  mesh = meshes.make_mesh((4, 2, 1), slices=2)
  assert mesh.devices.tolist() == meshes.make_mesh((4, 2, 1)).devices.tolist()


@pytest.mark.parametrize(
  ("indices", "slices", "message"),
  [
    ((0, 0, 1, 1), 4, "mesh.slices is 4, and the devices are of 2 slices of 2, 2 devices"),
    ((0, 0, 0, 1), 2, "the devices are of 2 slices of 3, 1 devices"),
    ((0, 0, 0), 2, "mesh.slices is 2, it must divide the 3 devices"),
  ],
)
def test_slices_that_are_not_there_are_refused(indices, slices, message):
  with pytest.raises(ValueError, match=message):
    meshes.in_slices([Chip(i, index) for i, index in enumerate(indices)], slices)


def test_slices_that_nobody_asked_for_give_a_warning():
  chips = [Chip(0, 1), Chip(1, 0)]
  with pytest.warns(RuntimeWarning, match="of 2 slices, and mesh.slices is 1: set mesh.slices=2"):
    assert meshes.in_slices(chips, 1) == chips


def test_rules_cover_parameters_and_optimizer_state():
  params = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0))
  mesh = meshes.make_mesh((2, 2, 2))
  layout = meshes.param_shardings(mesh, params)
  assert layout["embed"].spec == P("tensor", "fsdp")
  assert layout["layers"]["q"].spec == P(None, "fsdp", "tensor")
  assert layout["layers"]["down"].spec == P(None, "tensor", "fsdp")
  assert layout["layers"]["attn_norm"].spec == P(None, None)
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  moments = meshes.param_shardings(mesh, state)[0]
  assert moments.mu["layers"]["q"].spec == P(None, "fsdp", "tensor")
  assert moments.count.spec == P()
  apart = meshes.param_shardings(mesh, jax.eval_shape(unstack, params), sampling=True)
  assert apart["layers"][1]["q"].spec == P(None, "tensor")


def test_rules_cover_the_parameters_of_families_and_adapters():
  config = dataclasses.replace(
    CONFIG, qk_norm=True, post_norm=True, biases=("q", "k", "v", "o", "gate", "up", "down")
  )
  mesh = meshes.make_mesh((2, 2, 2))
  params = jax.eval_shape(Decoder(config).init, jax.random.key(0))
  layout = meshes.param_shardings(mesh, params)["layers"]
  assert layout["q_bias"].spec == P(None, "tensor")
  for name in ("o_bias", "q_norm", "attn_post_norm", "mlp_post_norm"):
    assert layout[name].is_fully_replicated, name
  scored = jax.eval_shape(Decoder(dataclasses.replace(CONFIG, labels=1)).init, jax.random.key(0))
  assert meshes.param_shardings(mesh, scored)["score"].is_fully_replicated
  adapters = jax.eval_shape(
    lambda key: lora.init(key, params, "q|k|v|o|gate|up|down", 2), jax.random.key(0)
  )
  layout = meshes.param_shardings(mesh, adapters)["layers"]
  # Each is split like its matrix, and replicated along the rank.
  assert layout["up_lora_a"].spec == P(None, "fsdp", None)
  assert layout["up_lora_b"].spec == P(None, None, "tensor")
  assert layout["down_lora_a"].spec == P(None, "tensor", None)
  assert layout["down_lora_b"].spec == P(None, None, "fsdp")


def test_a_parameter_without_a_rule_is_named():
  tree = {"layers": {"conv": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)}}
  with pytest.raises(ValueError, match="'layers/conv'"):
    meshes.param_shardings(meshes.make_mesh((8, 1, 1)), tree)


def test_an_axis_that_does_not_divide_a_dimension_does_not_split_it():
  mesh = meshes.make_mesh((1, 1, 8))
  tree = {"embed": jax.ShapeDtypeStruct((33, 16), jnp.float32)}
  assert meshes.param_shardings(mesh, tree)["embed"].spec == P(None, "fsdp")


def test_jitted_results_are_passed_back_in_without_recompiling():
  """The loop of a train step: the result keeps the sharding of the parameters that went in."""
  mesh = meshes.make_mesh((8, 1, 1))
  params = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("fsdp", "tensor")))
  batch = jax.device_put(jnp.arange(16.0), meshes.batch_sharding(mesh))

  def add(params, batch):
    return params + batch[:, None], batch.sum()

  jitted = meshes.Jitted(add, lambda params, batch: (meshes.layout_of(params), None))
  with Watch() as watch:
    first, total = jitted(params, batch)
    second, _ = jitted(first, batch)
  assert watch.programs == 1
  assert first.sharding == second.sharding == params.sharding
  assert float(total) == 120.0
  np.testing.assert_array_equal(second[:, 0], 1 + 2 * np.arange(16.0))
  assert jitted.lower(params, batch).compile()(params, batch)[1] == 120.0
  # `jax.jit` alone lets XLA choose the sharding, and compiles for it once more.
  plain = jax.jit(add)
  with Watch() as watch:
    plain(plain(params, batch)[0], batch)
  assert watch.programs == 2


def test_arrays_without_a_mesh_leave_the_sharding_open():
  assert meshes.layout_of({"a": np.zeros(2), "b": jnp.zeros(2)}) == {"a": None, "b": None}


def test_shards_are_counted_along_the_axes_of_a_batch_and_of_the_vocabulary():
  mesh = meshes.make_mesh((2, 2, 2))
  assert meshes.prompt_shards(meshes.batch_sharding(mesh)) == 4  # data times fsdp
  assert meshes.prompt_shards(None) == 1
  assert meshes.vocab_shards(mesh, 32) == 2
  assert meshes.vocab_shards(mesh, 33) == 1  # `tensor` does not divide it


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_step_on_eight_devices_equals_the_step_on_one(shape):
  model = Decoder(CONFIG)
  params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  batch = Batch(
    prompts=rng.integers(0, 32, (8, 4)).astype(np.int32),
    prompt_mask=np.arange(4) >= rng.integers(0, 3, (8, 1)),
    completions=rng.integers(0, 32, (8, 2, 3)).astype(np.int32),
    mask=np.arange(3) < rng.integers(1, 4, (8, 2, 1)),
    advantages=rng.normal(size=(8, 2)).astype(np.float32),
    weights=np.full((8, 2, 3), 1 / 32, np.float32),
    sampler_logp=-rng.random((8, 2, 3)).astype(np.float32),
  )
  algorithm = dataclasses.replace(ALGORITHMS["dapo"])
  optimizer = optax.sgd(0.1)
  results = []
  for mesh_shape, devices in (((1, 1, 1), jax.devices()[:1]), (shape, jax.devices())):
    mesh = meshes.make_mesh(mesh_shape, devices)
    step = make_train_step(model, algorithm, optimizer, lambda count: 0.1, temperature=1.0)
    placed = jax.device_put(params, meshes.param_shardings(mesh, params))
    state = TrainState(
      jax.device_put(jnp.int32(0), meshes.replicated(mesh)), placed, optimizer.init(placed)
    )
    results.append(step(state, jax.device_put(batch, meshes.batch_sharding(mesh))))
  (one, one_metrics), (many, many_metrics) = results
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for name, value in one_metrics.items():
    np.testing.assert_allclose(many_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  spec = many.params["layers"]["q"].sharding.spec
  assert spec == (P(None, "fsdp", "tensor") if shape == (2, 2, 2) else spec)
