"""Reads GGUF files: maps metadata to ModelConfig, and undoes the changes of llama.cpp's converter.

The gguf package reads the file format. "Block" in its names is a layer (`block_count`) or a group
of quantized numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax import extras
from grpo_jax.errors import first_line
from grpo_jax.models.config import ModelConfig, RopeScaling
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
    return default if field is None else field.contents()

  def need(self, key: str) -> Any:
    """Returns the metadata under `key`; ValueError if there is none."""
    if key not in self.reader.fields:
      raise ValueError(f"{self.path}: the metadata has no {key}")
    return self.get(key)


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
  if architecture not in ARCHITECTURES:
    raise ValueError(
      f"{path}: general.architecture is {architecture!r}, known: {', '.join(ARCHITECTURES)}"
    )
  tensors = {tensor.name: tensor for tensor in file.reader.tensors}
  config = _config(file, architecture, tensors)
  tensors.pop("rope_freqs.weight", None)  # is in config.rope_scaling
  return config, {name: _tensor(t, config, architecture, path) for name, t in tensors.items()}


def _config(file: Gguf, architecture: str, tensors: dict[str, Any]) -> ModelConfig:
  def need(name: str) -> Any:
    return file.need(f"{architecture}.{name}")

  def get(name: str, default: Any = None) -> Any:
    return file.get(f"{architecture}.{name}", default)

  width, heads, layers = (
    need("embedding_length"),
    need("attention.head_count"),
    need("block_count"),
  )
  head_dim = get("attention.key_length", width // heads)
  if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
    raise ValueError(f"{file.path}: rope over {rotated} of {head_dim} dimensions is not supported")
  theta = float(get("rope.freq_base", 10_000.0))
  fields = dict(ARCHITECTURES[architecture])
  if biases := tuple(name for name, part in _BIASED.items() if f"blk.0.{part}.bias" in tensors):
    fields["biases"] = biases
  if architecture == "gemma3":
    divisor = width // heads if layers == _GEMMA_27B_LAYERS else head_dim
    pattern = get("attention.sliding_window_pattern", _GEMMA_PATTERN)
    local = (
      [bool((i + 1) % pattern) for i in range(layers)] if isinstance(pattern, int) else pattern
    )
    fields |= {
      "embed_scale": width**0.5,
      "attn_scale": divisor**-0.5,
      "softcap": get("final_logit_softcapping") or None,
      "window": need("attention.sliding_window"),
      "local_layers": tuple(map(bool, local)),
      "local_rope_theta": float(get("rope.freq_base_swa", 10_000.0)),
    }
  return ModelConfig(
    vocab_size=get("vocab_size") or len(file.need("tokenizer.ggml.tokens")),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=get("attention.head_count_kv", heads),
    head_dim=head_dim,
    mlp=need("feed_forward_length"),
    rope_theta=theta,
    rope_scaling=_rope_scaling(file, get, head_dim, theta, tensors.get("rope_freqs.weight")),
    norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
    tied="output.weight" not in tensors,
    context=need("context_length"),
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
  file: Gguf, get: Callable[..., Any], head_dim: int, theta: float, factors: Any
) -> RopeScaling | None:
  """Returns the scaling in the metadata, or the Llama 3 scaling that gives the tensor `factors`."""
  kind = get("rope.scaling.type", "none")
  if factors is not None:
    actual = np.array(factors.data, np.float32).ravel()
    # The converter writes the factors but not their limits; every Llama 3 has these limits.
    scaling = RopeScaling(
      "llama3", _shortest(float(actual.max())), original=8192, low=1.0, high=4.0
    )
    expected = frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)
    if kind != "none" or actual.shape != expected.shape or not np.allclose(actual, expected, 1e-4):
      raise ValueError(f"{file.path}: rope_freqs.weight is not the rope scaling of Llama 3")
    return scaling
  if kind == "none":
    return None
  factor = _shortest(get("rope.scaling.factor", 1.0))
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
  except NotImplementedError as error:
    raise ValueError(f"{path}: {tensor.name}: {error}") from error

  def read(index: Index) -> np.ndarray:
    if heads:
      values = quants.dequantize(tensor.data, tensor.tensor_type)
      return undo_rope_order(values, heads)[index]
    # Each row is stored by itself, as a sequence of quantized blocks.
    values = quants.dequantize(tensor.data[index[0]], tensor.tensor_type)
    return values[(slice(None), *index[1:])] - np.float32(offset)

  # GGUF lists dimensions from the innermost to the outermost.
  return Tensor(tuple(int(n) for n in reversed(tensor.shape)), read)


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
