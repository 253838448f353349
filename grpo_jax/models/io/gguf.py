"""Reads GGUF files: maps metadata to ModelConfig, and undoes the changes of llama.cpp's converter.

The gguf package reads the file format. "Block" in its names is a layer (`block_count`) or a group
of quantized numbers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax import extras
from grpo_jax.errors import first_line
from grpo_jax.models.config import MAX_LAYERS, ModelConfig, RopeScaling, check_numbers
from grpo_jax.models.io.gguf_blocks import Stored
from grpo_jax.models.io.gguf_header import check_header
from grpo_jax.models.io.safetensors import Index, Tensor
from grpo_jax.models.rope import frequencies

# ModelConfig fields in which an architecture always differs from Llama.
ARCHITECTURES: dict[str, dict[str, Any]] = {
  "llama": {},
  "qwen2": {"biases": ("q", "k", "v")},
  "qwen3": {"qk_norm": True},
  "gemma3": {
    "qk_norm": True,
    "post_norm": True,
    "names": "gemma",
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
  },
}
# Projections that may have a bias: name in the parameter tree -> name in the file.
_BIASED = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_BIASED |= {name: f"ffn_{name}" for name in ("gate", "up", "down")}
_GEMMA_PATTERN = 6  # every sixth layer is global
_GEMMA_27B_LAYERS = 62  # the one size whose attention scores are not scaled by the head size


class Gguf(NamedTuple):
  """Holds an open GGUF file.

  Attributes:
    path: the file.
    reader: `gguf.GGUFReader`, with metadata fields and tensors that are mapped from disk.
  """

  path: Path
  reader: Any

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the metadata under `key`, or `default` if there is none."""
    field = self.reader.fields.get(key)
    try:
      return default if field is None else field.contents()
    except Exception as error:  # such as text that is not UTF-8
      raise ValueError(f"{self.path}: {key} cannot be read: {first_line(error)}") from error

  def need(self, key: str) -> Any:
    """Returns the metadata under `key`; ValueError if there is none."""
    if key not in self.reader.fields:
      raise ValueError(f"{self.path}: the metadata has no {key}")
    return self.get(key)

  def integer(self, key: str, default: int | None = None) -> int:
    """Returns the positive integer under `key`; without a default, it must be there."""
    value = self.need(key) if default is None else self.get(key, default)
    if type(value) is not int or not 1 <= value < 2**31:
      raise self.wrong(key, value, "a positive integer below 2^31")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """Returns the positive, finite number under `key`; without a default, it must be there."""
    value = self.need(key) if default is None else self.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
      raise self.wrong(key, value, "a finite number above 0")
    return float(value)

  def texts(self, key: str) -> list[str]:
    """Returns the list of texts under `key`."""
    value = self.need(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
      raise self.wrong(key, value, "a list of texts")
    return value

  def wrong(self, key: str, value: Any, allowed: str) -> ValueError:
    """Returns the error for metadata of another type or range."""
    return ValueError(f"{self.path}: {key} must be {allowed}, got {str(value)[:80]!r}")


def open_gguf(path: Path) -> Gguf:
  """Opens a GGUF file.

  Raises:
    ValueError: the file is not GGUF, or is truncated or damaged.
  """
  extras.require("gguf", str(path))
  import gguf

  with path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
  try:
    check_header(path)
    return Gguf(path, gguf.GGUFReader(path))
  except Exception as error:  # reading past the end raises many unrelated types
    raise ValueError(
      f"{path} ({path.stat().st_size} bytes) is a truncated or damaged GGUF file "
      f"({first_line(error)}); fetch it again"
    ) from error


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """Opens a GGUF file, without reading the data of its tensors.

  Returns:
    The config, and the tensors by their GGUF names, with the values that the Hugging Face
    checkpoint has.

  Raises:
    ValueError: the file is damaged, or describes a model that the decoder does not compute.
  """
  file = open_gguf(path)
  architecture = file.need("general.architecture")
  if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
    raise ValueError(
      f"{path}: general.architecture is {architecture!r}, known: {', '.join(ARCHITECTURES)}"
    )
  tensors = {tensor.name: tensor for tensor in file.reader.tensors}
  config = _config(file, architecture, tensors)
  check_numbers(config, str(path))
  tensors.pop("rope_freqs.weight", None)  # is in config.rope_scaling
  return config, {name: _tensor(t, config, architecture, path) for name, t in tensors.items()}


def _config(file: Gguf, architecture: str, tensors: dict[str, Any]) -> ModelConfig:
  def get(name: str, default: Any = None) -> Any:
    return file.get(f"{architecture}.{name}", default)

  def integer(name: str, default: int | None = None) -> int:
    return file.integer(f"{architecture}.{name}", default)

  def number(name: str, default: float | None = None) -> float:
    return file.number(f"{architecture}.{name}", default)

  width, heads, layers = map(integer, ("embedding_length", "attention.head_count", "block_count"))
  if layers > MAX_LAYERS:
    raise file.wrong(f"{architecture}.block_count", layers, f"at most {MAX_LAYERS}")
  head_dim = integer("attention.key_length", max(width // heads, 1))
  if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
    raise ValueError(f"{file.path}: rope over {rotated} of {head_dim} dimensions is not supported")
  theta = number("rope.freq_base", 10_000.0)
  fields = dict(ARCHITECTURES[architecture])
  if biases := tuple(name for name, part in _BIASED.items() if f"blk.0.{part}.bias" in tensors):
    fields["biases"] = biases
  if architecture == "gemma3":
    divisor = width // heads if layers == _GEMMA_27B_LAYERS else head_dim
    pattern = get("attention.sliding_window_pattern", _GEMMA_PATTERN)
    if isinstance(pattern, list):
      local = pattern
    else:
      pattern = integer("attention.sliding_window_pattern", _GEMMA_PATTERN)
      local = [bool((i + 1) % pattern) for i in range(layers)]
    cap = "final_logit_softcapping"
    fields |= {
      "embed_scale": width**0.5,
      "attn_scale": divisor**-0.5,
      "softcap": number(cap) if get(cap) else None,
      "window": integer("attention.sliding_window"),
      "local_layers": tuple(map(bool, local)),
      "local_rope_theta": number("rope.freq_base_swa", 10_000.0),
    }
  return ModelConfig(
    vocab_size=integer("vocab_size")
    if get("vocab_size")
    else len(file.texts("tokenizer.ggml.tokens")),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=integer("attention.head_count_kv", heads),
    head_dim=head_dim,
    mlp=integer("feed_forward_length"),
    rope_theta=theta,
    rope_scaling=_rope_scaling(file, architecture, head_dim, theta, tensors),
    norm_eps=_shortest(number("attention.layer_norm_rms_epsilon")),
    tied="output.weight" not in tensors,
    context=integer("context_length"),
    **fields,
  )


def _shortest(value: float) -> float:
  """Returns the shortest decimal that rounds to the float32 `value`, so that 1e-5 stays 1e-5.

  Example:
    >>> _shortest(9.999999747378752e-06)
    1e-05
  """
  return float(str(np.float32(value)))


def _rope_scaling(
  file: Gguf, architecture: str, head_dim: int, theta: float, tensors: dict[str, Any]
) -> RopeScaling | None:
  """Returns the scaling in the metadata, or the Llama 3 scaling with the factors of a tensor."""
  kind = file.get(f"{architecture}.rope.scaling.type", "none")
  factors = tensors.get("rope_freqs.weight")
  if factors is not None:
    actual = np.array(factors.data, np.float32).ravel()
    if kind != "none" or actual.size != head_dim // 2:
      raise ValueError(f"{file.path}: rope_freqs.weight is not the rope scaling of Llama 3")
    # The converter writes the factors but not their limits; every Llama 3 has these limits.
    scaling = RopeScaling(
      "llama3", _shortest(float(actual.max())), original=8192, low=1.0, high=4.0
    )
    expected = frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)
    if not np.allclose(actual, expected, 1e-4):
      raise ValueError(f"{file.path}: rope_freqs.weight is not the rope scaling of Llama 3")
    return scaling
  if kind == "none":
    return None
  factor = _shortest(file.number(f"{architecture}.rope.scaling.factor", 1.0))
  if kind == "linear":
    return RopeScaling("linear", factor)
  raise ValueError(f"{file.path}: rope scaling {kind!r} is not supported, known: none, linear")


def _tensor(tensor: Any, config: ModelConfig, architecture: str, path: Path) -> Tensor:
  """Returns a reader of `gguf.ReaderTensor` that dequantizes it and undoes the conversion."""
  from gguf import quants

  heads = 0
  if architecture == "llama" and tensor.name.endswith((".attn_q.weight", ".attn_q.bias")):
    heads = config.heads
  elif architecture == "llama" and tensor.name.endswith((".attn_k.weight", ".attn_k.bias")):
    heads = config.kv_heads
  offset = config.norm_offset if tensor.name.endswith("norm.weight") else 0.0
  try:
    quants.dequantize(tensor.data[:1], tensor.tensor_type)
  except Exception as error:  # of a type that is not supported, or without any data
    raise ValueError(f"{path}: {tensor.name}: {first_line(error)}") from error

  def rows(part: slice) -> np.ndarray:
    # Each row is stored by itself, as a sequence of quantized blocks.
    if heads:
      return tensor.data[undo_rope_order(np.arange(len(tensor.data)), heads)[part]]
    return tensor.data[part]

  def read(index: Index) -> np.ndarray:
    values = quants.dequantize(rows(index[0]), tensor.tensor_type)
    return values[(slice(None), *index[1:])] - np.float32(offset)

  # GGUF lists dimensions from the innermost to the outermost.
  shape = tuple(int(n) for n in reversed(tensor.shape))
  return Tensor(shape, read, Stored(tensor.tensor_type.name, rows))


def undo_rope_order(kernel: np.ndarray, heads: int) -> np.ndarray:
  """Reorders the rows of a GGUF q or k matrix [heads*Dh, D] as in Hugging Face files.

  RoPE rotates pairs of rows of a head. GGUF stores the rows of a pair next to each other, (0, 1),
  (2, 3), ...; Hugging Face ("rotate half") pairs row i with row i + Dh/2.

  Example:
    >>> undo_rope_order(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
    [0, 1, 2, 3]
  """
  rows = kernel.shape[0]
  pairs = kernel.reshape(heads, rows // heads // 2, 2, *kernel.shape[1:])
  return pairs.swapaxes(1, 2).reshape(kernel.shape)
