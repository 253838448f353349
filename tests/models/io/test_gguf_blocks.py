"""Tests that blocks of GGUF files are kept with the numbers that the gguf package gives."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.gguf_blocks import TYPES, Stored, stacked
from grpo_jax.models.load import open_weights
from grpo_jax.models.quantized import (
  Quantized,
  dequantize,
  dequantized,
  quantized_matmul,
  quantized_weights,
)
from tests.helpers import tiny_gguf

KINDS = gguf.GGMLQuantizationType
HALVES = {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}  # bytes of float16 numbers
OUTPUTS = 6


def drawn(kind, inputs, seed=0):
  """Returns random bytes of a matrix [OUTPUTS, inputs], whose float16 numbers are finite."""
  rng = np.random.default_rng(seed)
  per, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
  blocks = rng.integers(0, 256, (OUTPUTS * inputs // per, size), dtype=np.uint8)
  for at in HALVES.get(kind, [0, 2]):
    numbers = rng.normal(0, 0.3, (len(blocks), 1)).astype(np.float16)
    blocks[:, at : at + 2] = numbers.view(np.uint8)
  return blocks.reshape(OUTPUTS, -1)


def kept(*layers, inputs=512):
  """Returns the layers (type, bytes) as one matrix, and what gguf makes of them, [L, in, out]."""
  tensors = [Stored(kind, lambda part, data=data: data[part]) for kind, data in layers]
  matrix = stacked("down", tensors, (len(layers), inputs, OUTPUTS))
  whole = (slice(None),) * 3
  fields = {name: matrix.read(name, whole) for name in matrix.fields}
  expected = [gguf.dequantize(data, KINDS[kind]).T for kind, data in layers]
  return Quantized(scheme=matrix.scheme, **fields), np.stack(expected)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_gguf_package_bit_for_bit(kind):
  assert gguf.GGML_QUANT_SIZES[KINDS[kind]] == (TYPES[kind].inputs, TYPES[kind].size)
  small, expected = kept((kind, drawn(kind, 512)), (kind, drawn(kind, 512, seed=1)))
  np.testing.assert_array_equal(jax.jit(dequantize)(small), expected)
  bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(small)) / expected.size
  per, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
  five = 3 if kind.startswith("Q5") else 2 if kind == "Q6_K" else 0  # held in 8 bits
  assert bits <= 8 * size / per + five + 0.2


@pytest.mark.parametrize(
  ("kinds", "scheme"),
  [
    (("Q4_K", "Q6_K"), "int8"),  # of "Q4_K_M" files
    (("Q5_0", "Q8_0"), "int8"),
    (("Q4_1", "Q4_K"), "uint4"),
    (("Q4_0", "Q4_1", "Q6_K"), "int8"),
  ],
)
def test_layers_of_several_types_have_a_common_form(kinds, scheme):
  small, expected = kept(*((kind, drawn(kind, 512, seed)) for seed, kind in enumerate(kinds)))
  assert small.scheme == scheme
  np.testing.assert_array_equal(jax.jit(dequantize)(small), expected)


def test_a_block_by_hand():
  """Q4_1: 0.5 times 0 to 15 and again, minus 2; numbers i and i + 16 share byte i."""
  block = np.zeros((1, 20), np.uint8)
  block[0, :4] = np.array([0.5, -2], np.float16).view(np.uint8)
  block[0, 4:] = np.arange(16) * 17
  matrix = stacked("q", [Stored("Q4_1", lambda part: block[part])], (1, 32, 1))
  whole = (slice(None),) * 3
  values = matrix.read("values", whole)[0, :, 0]
  assert values[:3].tolist() == [0x10, 0x32, 0x54]  # inputs 0 and 1, 2 and 3, 4 and 5
  assert matrix.read("scales", whole).tolist() == [[[0.5]]]
  assert matrix.read("minimums", whole).tolist() == [[[-2.0]]]


def test_types_that_are_not_kept():
  def tensor(kind):
    return Stored(kind, lambda part: None)

  assert stacked("q", [tensor("Q8_0"), tensor("F16")], (2, 64, 1)) is None
  with pytest.raises(ValueError, match=r"layers/q of layer 1 is of type IQ4_XS, .*known: Q4_0"):
    stacked("q", [tensor("Q8_0"), tensor("IQ4_XS")], (2, 64, 1))


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [None, (1, 8, 1), (1, 2, 4)])
def test_a_file_keeps_its_blocks(tmp_path, mesh):
  """Also the rows of q, which the file has in another order, and on several devices.

  The file has q, o, gate and down in Q4_1, up in Q8_0, k in float16 and v in float32.
  """
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path)
  weights = open_weights(str(path))
  small, layout = quantized_weights(weights, "file"), None
  if mesh is not None:
    layout = meshes.param_shardings(meshes.make_mesh(mesh), small.shapes)
  params = small.read(layout)
  for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(small.shapes), strict=True):
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
  forms = {
    name: leaf.scheme for name, leaf in params["layers"].items() if isinstance(leaf, Quantized)
  }
  assert forms == {"q": "uint4", "o": "uint4", "gate": "uint4", "up": "int8", "down": "uint4"}
  jax.tree.map(np.testing.assert_array_equal, dequantized(params), weights.read())


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_product_and_gradient_are_those_of_the_wide_matrix(kind):
  small, (wide,) = kept((kind, drawn(kind, 256)), inputs=256)
  small = jax.tree.map(lambda leaf: leaf[0], small)
  rng = np.random.default_rng(0)
  h, dy = (rng.normal(size=(3, 5, n)).astype(np.float32) for n in (256, OUTPUTS))
  out, pull = jax.vjp(jax.jit(lambda h: quantized_matmul(h, small)), h)
  np.testing.assert_allclose(out, h @ wide, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(pull(dy)[0], dy @ wide.T, rtol=1e-4, atol=1e-3)


def test_a_model_computes_what_its_wide_weights_do(tmp_path):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path)
  weights = open_weights(str(path))
  base = jax.tree.map(jnp.asarray, quantized_weights(weights, "file").read())
  adapters = lora.init(jax.random.key(0), weights.shapes, "q|down", rank=3)
  model, prompts = Decoder(weights.config), jnp.array([[3, 4, 5]])
  completions = jnp.arange(8).reshape(1, 2, 4)

  def score(adapters, base):
    params = lora.with_adapters(base, adapters)
    return model.score(params, prompts, prompts > 0, completions)

  np.testing.assert_allclose(
    jax.jit(score)(adapters, base), jax.jit(score)(adapters, weights.read()), rtol=1e-3, atol=1e-3
  )


def test_models_without_blocks_are_refused():
  with pytest.raises(ValueError, match=r"no matrix of the layers is quantized .* needs a GGUF"):
    quantized_weights(open_weights("random:tiny"), "file")
