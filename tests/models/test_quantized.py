"""Tests matrices of 8 and 4 bits: levels by hand, products, gradients, parts, and models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.weights import Weights, shapes_of
from grpo_jax.models.quantized import (
  MATRICES,
  NF4,
  block_of,
  dequantize,
  dequantized,
  is_quantized,
  quantize,
  quantized_matmul,
  quantized_shapes,
  quantized_weights,
)

SCHEMES = ("int8", "nf4")
CONFIG = ModelConfig(vocab_size=32, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=192)


def drawn(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def test_int8_by_hand():
  """Blocks of 32 inputs: the largest magnitude is 127 steps, and a block of zeros stays one."""
  matrix = np.zeros((64, 2), np.float32)
  matrix[:3, 0] = 2.54, -1.0, 0.015  # steps of 0.02: 127, -50, and 0.75, which is rounded to 1
  small = quantize(matrix, "int8")
  assert small.values[:3, 0].tolist() == [127, -50, 1]
  assert not small.values[3:].any()
  assert not small.values[:, 1].any()
  np.testing.assert_allclose(small.scales, [[0.02, 0], [0, 0]], rtol=1e-6)
  np.testing.assert_allclose(dequantize(small)[:3, 0], [2.54, -1.0, 0.02], rtol=1e-6)
  assert (small.shape, small.ndim) == ((64, 2), 2)


def test_levels_of_nf4_are_quantiles_of_a_normal_distribution():
  """Appendix E of the paper, with the offset of its authors' code."""
  offset = 0.9677083
  above = jax.scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
  below = -jax.scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
  levels = np.sort(np.concatenate([above, below, [0.0]]))
  np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-5)


def test_nf4_takes_the_nearest_level():
  matrix = drawn(2, 128, 6)
  small = quantize(matrix, "nf4")
  assert (small.values.shape, small.values.dtype) == ((2, 64, 6), np.uint8)
  blocks = matrix.reshape(2, 2, 64, 6).astype(np.float64)
  largest = np.abs(blocks).max(2, keepdims=True)
  distance = np.abs(blocks[..., None] - largest[..., None] * NF4.astype(np.float64))
  expected = largest * NF4[distance.argmin(-1)]
  np.testing.assert_allclose(dequantize(small), expected.reshape(matrix.shape), atol=1e-6)
  assert small.shape == matrix.shape


def test_errors_of_the_schemes():
  """On normal numbers: half a step of 1 / 127 of the largest; about a tenth of the deviation."""
  matrix = drawn(512, 64)
  errors = {s: np.abs(dequantize(quantize(matrix, s)) - matrix) for s in SCHEMES}
  blocks = np.abs(matrix.reshape(16, 32, 64)).max(1, keepdims=True)
  assert (errors["int8"].reshape(16, 32, 64) <= blocks / 254 + 1e-7).all()
  relative = {s: np.sqrt((e**2).mean()) / matrix.std() for s, e in errors.items()}
  assert relative["int8"] < 0.006
  assert 0.07 < relative["nf4"] < 0.11


def test_a_q8_0_file_gives_its_own_numbers_again():
  quants = pytest.importorskip("gguf").quants
  kind = pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
  packed = quants.quantize(drawn(8, 96), kind)  # 8 outputs, 96 inputs
  small = quantize(quants.dequantize(packed, kind).T, "int8")
  blocks = packed.reshape(8, 3, 34)  # a scale in float16 and 32 numbers
  np.testing.assert_array_equal(small.values.T.reshape(8, 3, 32), blocks[..., 2:].view(np.int8))
  scales = blocks[..., :2].copy().view(np.float16)[..., 0]
  np.testing.assert_allclose(small.scales.T, scales, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_product_and_gradient_are_those_of_the_dequantized_matrix(scheme):
  small, h, dy = quantize(drawn(64, 48), scheme), drawn(3, 5, 64, seed=1), drawn(3, 5, 48, seed=2)
  wide = np.asarray(dequantize(small))
  out, pull = jax.vjp(jax.jit(lambda h: quantized_matmul(h, small)), h)
  np.testing.assert_allclose(out, h @ wide, atol=1e-5)
  np.testing.assert_allclose(pull(dy)[0], dy @ wide.T, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wide_copy_of_all_layers_never_exists(scheme):
  """Through 16 layers, forward, backward and in a loop over tokens: a few matrices at a time."""
  small, h = quantize(drawn(16, 256, 256), scheme), jnp.ones((2, 256))
  wide = 256 * 256 * 4

  def through(h, small):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(quantized_matmul(h, layer)), None), h, small)[0]

  def tokens(h, small):
    return jax.lax.fori_loop(0, 4, lambda _, h: through(h, small), h)

  gradient = jax.grad(lambda h, small: through(h, small).sum())
  for function in (through, gradient, tokens):
    plan = jax.jit(function).lower(h, small).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * wide


# --- whole models ---------------------------------------------------------------------------------


def held(seed=0):
  """Returns the weights of a model as a file would give them: functions that read a part."""
  shapes = shapes_of(CONFIG)
  leaves, tree = jax.tree.flatten(shapes)
  arrays = [drawn(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
  parts = [lambda index, array=array: array[index] for array in arrays]
  return Weights(CONFIG, shapes, tree.unflatten(parts)), tree.unflatten(arrays)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mesh", [None, (1, 8, 1), (1, 2, 4)])
def test_matrices_are_quantized_part_by_part(scheme, mesh):
  """Shards that cut through blocks hold their part of what the whole matrix gives."""
  weights, arrays = held()
  small, layout = quantized_weights(weights, scheme), None
  if mesh is not None:
    layout = meshes.param_shardings(meshes.make_mesh(mesh), small.shapes)
  params = small.read(layout)
  for name, leaf in params["layers"].items():
    if name not in MATRICES:
      np.testing.assert_array_equal(leaf, arrays["layers"][name])
      continue
    whole, shape = quantize(arrays["layers"][name], scheme), small.shapes["layers"][name]
    for field in ("values", "scales"):
      actual, expected = getattr(leaf, field), getattr(whole, field)
      np.testing.assert_array_equal(actual, expected)
      assert getattr(shape, field).shape == expected.shape
      assert getattr(shape, field).dtype == expected.dtype
  np.testing.assert_array_equal(params["embed"], arrays["embed"])
  assert is_quantized(params)
  assert not is_quantized(arrays)
  if mesh == (1, 8, 1):
    values = params["layers"]["q"].values
    assert values.addressable_shards[0].data.shape[1] == values.shape[1] // 8


def test_nan_is_refused():
  weights, arrays = held()
  arrays["layers"]["k"][1, 70, 3] = np.nan
  with pytest.raises(ValueError, match="the weights of layers/k/scales hold NaN"):
    quantized_weights(weights, "int8").read()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_computes_what_its_dequantized_weights_do(scheme):
  weights, _ = held()
  base = jax.tree.map(jnp.asarray, quantized_weights(weights, scheme).read())
  adapters = lora.init(jax.random.key(0), weights.shapes, "q|down", rank=3)
  adapters = jax.tree.map(lambda leaf: leaf + 0.05, adapters)
  model = Decoder(CONFIG, lora_scale=0.5)
  prompts, mask = jnp.array([[0, 3, 4], [5, 6, 7]]), jnp.array([[0, 1, 1], [1, 1, 1]], bool)
  completions = jnp.arange(2 * 2 * 4).reshape(2, 2, 4)

  def score(adapters, base):
    params = lora.with_adapters(base, adapters)
    return jnp.tanh(model.score(params, prompts, mask, completions)).sum()

  for function in (score, jax.grad(score)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
      jax.jit(function)(adapters, base),
      jax.jit(function)(adapters, dequantized(base)),
    )
  merged = lora.merge(base, adapters, 0.5)
  assert not is_quantized(merged)
  np.testing.assert_allclose(
    model.score(lora.with_adapters(base, adapters), prompts, mask, completions),
    model.score(merged, prompts, mask, completions),
    atol=2e-4,
  )


def test_wrong_schemes_and_shapes_are_refused():
  with pytest.raises(ValueError, match="unknown scheme 'int4'; known: int8, nf4"):
    block_of(64, "int4")
  odd = dataclasses.replace(CONFIG, mlp=191)
  with pytest.raises(ValueError, match=r"^layers/down: nf4 packs two .* 191 inputs; use int8"):
    quantized_shapes(shapes_of(odd), "nf4")
  assert quantized_shapes(shapes_of(odd), "int8")["layers"]["down"].scales.shape == (2, 191, 128)


def test_quantized_layers_stay_stacked_while_decoding():
  """XLA:CPU would hold all wide matrices of straight-line code at once."""
  weights, _ = held()
  model, base = Decoder(CONFIG), quantized_weights(weights, "int8").read()
  assert model.for_decoding(base, "cpu") is base
  assert isinstance(model.for_decoding(dequantized(base), "cpu")["layers"], tuple)
