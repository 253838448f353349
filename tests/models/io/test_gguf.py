"""Tests that a GGUF file gives the config and tensors of its Hugging Face checkpoint."""

import struct
import time
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.config import ModelConfig, RopeScaling
from grpo_jax.models.io.gguf import undo_rope_order
from grpo_jax.models.load import load, open_weights
from tests.helpers import tiny_gguf
from tests.helpers.model_files import assert_holds

FAMILIES = Path(__file__).parents[2] / "fixtures" / "families"


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_a_gguf_file_is_in_its_place(tmp_path, tied):
  path = tmp_path / "model.gguf"
  tensors = tiny_gguf.write(path, tied=tied)  # F32, F16, Q8_0, Q4_1
  config, params = load(str(path))
  assert config == ModelConfig(
    vocab_size=264,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=96,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tied=tied,
    context=128,
  )
  assert_holds(params, tensors, 2)


def test_rope_order():
  # Two heads of four rows. GGUF stores the pairs (0, 2), (1, 3) of each head next to each other.
  stored = np.array([0, 2, 1, 3, 10, 12, 11, 13])[:, None]
  assert undo_rope_order(stored, 2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_a_gguf_file_cut_anywhere_is_named(tmp_path):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path)
  content = path.read_bytes()
  cuts = [0, 3, 4, 8, 20, 30, *range(100, len(content), len(content) // 40), len(content) - 1]
  for cut in cuts:
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError, match="GGUF file") as caught:
      load(str(path))
    assert str(path) in str(caught.value)


def test_foreign_gguf_files_are_named(tmp_path):
  path = tmp_path / "model.gguf"
  path.write_bytes(b"PK\x03\x04 a zip archive")
  with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file: it starts with b'PK"):
    load(str(path))
  tiny_gguf.write(path, architecture="mamba")
  with pytest.raises(ValueError, match="'mamba', known: llama, qwen2, qwen3, gemma3"):
    load(str(path))
  tiny_gguf.write(path, llama__rope__scaling__type="yarn")
  with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported, known: none, linear"):
    load(str(path))
  tiny_gguf.write(path, llama__feed_forward_length=None)
  with pytest.raises(ValueError, match=r"no llama\.feed_forward_length"):
    load(str(path))
  tiny_gguf.write(path, llama__feed_forward_length=128)
  with pytest.raises(
    ValueError, match=r"blk\.0\.ffn_gate\.weight: shape \[96, 64\], expected \[128"
  ):
    load(str(path))
  tiny_gguf.write(path, llama__block_count=1)
  with pytest.raises(ValueError, match=r"blk\.1\.attn_norm\.weight: unknown"):
    load(str(path))


# Metadata of each architecture beyond the entries that `convert` always writes.
GEMMA3 = {
  "attention__key_length": 8,
  "attention__sliding_window": 4,
  "rope__freq_base": 1000.0,
  "rope__freq_base_swa": 50.0,
  "rope__scaling__type": "linear",
  "rope__scaling__factor": 8.0,
  "final_logit_softcapping": 5.0,
}
LINEAR = {
  "rope__scaling__type": "linear",
  "rope__scaling__factor": 2.0,
  "rope__freq_base": 100.0,
}


@pytest.mark.parametrize(
  ("family", "architecture", "metadata", "lost"),
  [
    ("llama_linear_biases", "llama", LINEAR, {}),
    ("qwen2", "qwen2", {}, {}),
    # GGUF does not store Qwen's windows, and Gemma's scale follows from the size of the model.
    ("qwen3", "qwen3", {"attention__key_length": 12}, {"window": 0, "local_layers": ()}),
    ("gemma3", "gemma3", GEMMA3, {"attn_scale": 8**-0.5}),
  ],
)
def test_a_converted_file_is_the_same_model(tmp_path, family, architecture, metadata, lost):
  path = tmp_path / "model.gguf"
  tiny_gguf.convert(FAMILIES / family, path, architecture, **metadata)
  config, params = load(str(path))
  expected_config, expected = load(str(FAMILIES / family))
  assert vars(config) == vars(expected_config) | lost
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_llama_3_scaling_is_recovered_from_its_factors(tmp_path):
  """The converter writes the divisor of each frequency.

  With theta 10^4 and a head size of 16 the wavelengths are 6, 20, 63, 199, 628, 1987, 6283 and
  19869 tokens. Those below 8192 / 4 are unchanged, and the one above 8192 is divided by 32. In
  between, the share (8192 / wavelength - 1) / (4 - 1) of the frequency is unchanged.
  """
  share = (8192 / (2 * np.pi * 1000) - 1) / 3
  factors = np.array([1, 1, 1, 1, 1, 1, 1 / ((1 - share) / 32 + share), 32], np.float32)
  path = tmp_path / "model.gguf"
  theta = {"llama__rope__freq_base": 10000.0}
  tiny_gguf.write(path, rope_freqs=factors, **theta)
  config, _ = load(str(path))
  assert config.rope_scaling == RopeScaling("llama3", 32.0, original=8192, low=1.0, high=4.0)
  factors[3] = 2
  tiny_gguf.write(path, rope_freqs=factors, **theta)
  with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the rope scaling of Llama 3"):
    load(str(path))


def test_parameters_of_a_file_are_read_into_their_shardings(tmp_path):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, tied=False)
  weights = open_weights(str(path))
  shardings = meshes.param_shardings(meshes.make_mesh((1, 2, 4)), weights.shapes)
  jax.tree.map(np.testing.assert_array_equal, weights.read(shardings), weights.read())


# --- quantized blocks, as documented by ggml ------------------------------------------------------


def halves(rng, count):
  """Returns small float16 numbers and their bytes."""
  values = (rng.integers(1, 64, count) / 1024).astype(np.float16)
  return values.astype(np.float64), values.view(np.uint8).reshape(count, 2)


def q4_0(rng, blocks):
  """Makes blocks of 32 numbers d * (nibble - 8): d, then numbers i and i + 16 in byte i."""
  d, d_bytes = halves(rng, blocks)
  packed = rng.integers(0, 256, (blocks, 16))
  numbers = np.concatenate([packed % 16, packed // 16], axis=1) - 8
  return np.hstack([d_bytes, packed]), d[:, None] * numbers


def q4_k(rng, blocks):
  """Makes blocks of 256 numbers in 8 groups, d * scale * nibble - dmin * minimum.

  Stored as d, dmin, 8 scales and 8 minima of 6 bits each in 12 bytes, and the nibbles. The low
  nibbles of 32 bytes are one group, their high nibbles are the next.
  """
  d, d_bytes = halves(rng, blocks)
  dmin, dmin_bytes = halves(rng, blocks)
  scales, minima = rng.integers(0, 64, (2, blocks, 8))
  small = np.zeros((blocks, 12), np.int64)
  small[:, 0:4] = scales[:, :4] + (scales[:, 4:] // 16) * 64
  small[:, 4:8] = minima[:, :4] + (minima[:, 4:] // 16) * 64
  small[:, 8:12] = scales[:, 4:] % 16 + (minima[:, 4:] % 16) * 16
  nibbles = rng.integers(0, 16, (blocks, 8, 32))
  packed = nibbles[:, 0::2] + 16 * nibbles[:, 1::2]
  numbers = (d[:, None] * scales)[..., None] * nibbles - (dmin[:, None] * minima)[..., None]
  return np.hstack([d_bytes, dmin_bytes, small, packed.reshape(blocks, 128)]), numbers


def q6_k(rng, blocks):
  """Makes blocks of 256 numbers in 16 groups, d * scale * (q - 32).

  Stored as 4 low bits and 2 high bits of each q, 16 signed scales, and d. In each half of 128
  numbers, byte l of the 64 low bytes holds numbers l and l + 64; byte l of the 32 high bytes holds
  numbers l, l + 32, l + 64 and l + 96.
  """
  d, d_bytes = halves(rng, blocks)
  scales = rng.integers(-60, 60, (blocks, 16))
  q = rng.integers(0, 64, (blocks, 2, 4, 32))
  low = np.concatenate([q[:, :, 0] % 16, q[:, :, 1] % 16], axis=2)
  low += 16 * np.concatenate([q[:, :, 2] % 16, q[:, :, 3] % 16], axis=2)
  high = sum((q[:, :, i] // 16) * 4**i for i in range(4))
  signed = scales.astype(np.int8).view(np.uint8)
  packed = np.hstack([low.reshape(blocks, 128), high.reshape(blocks, 64), signed, d_bytes])
  return packed, (d[:, None] * scales)[..., None] * (q.reshape(blocks, 16, 16) - 32)


@pytest.mark.parametrize(("kind", "make"), [("Q4_0", q4_0), ("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_quantized_blocks_are_decoded(tmp_path, kind, make):
  """The embedding has 264 rows of 256 numbers; reads all of it, and a part."""
  rng = np.random.default_rng(0)
  size = 32 if kind == "Q4_0" else 256
  packed, values = make(rng, 264 * 256 // size)
  packed, values = packed.astype(np.uint8).reshape(264, -1), values.reshape(264, 256)
  path = tmp_path / "model.gguf"
  embed = packed, gguf.GGMLQuantizationType[kind]
  tiny_gguf.write(path, width=256, embed=embed, llama__attention__key_length=16)
  weights = open_weights(str(path))
  np.testing.assert_allclose(weights.read()["embed"], values, rtol=1e-6, atol=1e-7)
  part = weights.parts["embed"]((slice(5, 9), slice(40, 72)))
  np.testing.assert_allclose(part, values[5:9, 40:72], rtol=1e-6, atol=1e-7)


# --- numbers out of range -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"llama__block_count": 10**9}, r"llama\.block_count must be at most 10000, got '1000000000'"),
    ({"llama__attention__head_count": 0}, r"head_count must be a positive integer .*, got '0'"),
    ({"llama__attention__head_count": "4"}, "head_count must be a positive integer"),
    ({"llama__attention__head_count": [4, 4]}, "head_count must be a positive integer"),
    ({"llama__attention__head_count_kv": 3}, "must divide that of heads"),
    ({"llama__rope__freq_base": float("nan")}, "freq_base must be a finite number above 0"),
    ({"llama__attention__layer_norm_rms_epsilon": -1.0}, "rms_epsilon must be a finite number"),
    ({"tokenizer__ggml__tokens": "abc", "llama__vocab_size": None}, "must be a list of texts"),
  ],
)
def test_metadata_out_of_range_is_named(tmp_path, entry, message):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, **entry)
  with pytest.raises(ValueError, match=message) as caught:
    load(str(path))
  assert str(path) in str(caught.value)


def header(*fields, tensors=0):
  """Returns a GGUF file of version 3 with fields (key, type, bytes of the value) and no data."""
  content = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields))
  for key, kind, value in fields:
    content += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
  return content


@pytest.mark.parametrize(
  "content",
  [
    header(("a", 9, struct.pack("<IQ", 0, 10**12))),  # a list of bytes beyond the file
    header(("a", 9, struct.pack("<IQ", 0, 10**7)) , tensors=0) + bytes(10**7),  # and within it
    header(("a", 9, struct.pack("<IQ", 9, 2**20) * 9)),  # lists of lists
    header(("a", 8, struct.pack("<Q", 2**63))),  # a text
    header(("a", 77, b"")),
    header(tensors=2**40),
    header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31),  # dimensions
    b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
  ],
)  # fmt: skip
def test_a_hostile_header_is_refused_at_once(tmp_path, content):
  path = tmp_path / "model.gguf"
  path.write_bytes(content)
  began = time.monotonic()
  with pytest.raises(ValueError, match="truncated or damaged GGUF file"):
    load(str(path))
  assert time.monotonic() - began < 2
