"""The files that hold weights: Hugging Face folders (safetensors) and GGUF.

Either reader gives `(ModelConfig, {tensor name: Tensor})` with the names, shapes and row order of
Hugging Face Llama or of the GGUF file; `checkpoints` knows where each tensor goes. Nothing is read
before `Tensor.read()`, so the model is in memory once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.models.decoder import ModelConfig

# Buffers that old exports wrote beside the weights; they follow from the config.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("F32", "F16", "BF16")


class Tensor(NamedTuple):
  """A tensor in a file: its shape there, and how to read it."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


# --- Hugging Face folders -------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """A folder of config.json and safetensors; a head equal to tied embeddings is dropped."""
  config = read_config(folder)
  tensors = {name: t for name, t in _read_safetensors(folder).items() if not _COMPUTED.search(name)}
  if config.tied and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
    head = tensors.pop("lm_head.weight")
    if not np.array_equal(head.read(), tensors["model.embed_tokens.weight"].read()):
      raise ValueError(
        f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not "
        "model.embed_tokens.weight; set tie_word_embeddings to false if the head is its own"
      )
  return config, tensors


def read_config(folder: Path) -> ModelConfig:
  """The ModelConfig of `folder`/config.json; ValueError for what the decoder does not compute."""
  path = folder / "config.json"
  raw = read_json(path)
  names = raw.get("architectures") or []
  known = [name for name in names if name in _CONFIG_READERS]
  if len(known) != 1:
    raise ValueError(
      f"{path}: architectures is {names}, known: {', '.join(_CONFIG_READERS)} (exactly one)"
    )
  return _CONFIG_READERS[known[0]](raw, path)


def _llama_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
  # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
  rope = raw.get("rope_parameters") or {}
  scaling = raw.get("rope_scaling") or rope
  if scaling.get("rope_type", scaling.get("type", "default")) != "default":
    raise ValueError(f"{path}: rope scaling is not supported, got {scaling}")
  for key, allowed in (
    ("attention_bias", False),
    ("mlp_bias", False),
    ("hidden_act", "silu"),
    ("quantization_config", None),
  ):
    if raw.get(key, allowed) != allowed:
      raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only {allowed!r}")
  need = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
  if absent := [key for key in (*need, "intermediate_size") if not isinstance(raw.get(key), int)]:
    raise ValueError(f"{path}: {', '.join(absent)} must be given as integers")
  heads = raw["num_attention_heads"]
  return ModelConfig(
    vocab_size=raw["vocab_size"],
    width=raw["hidden_size"],
    layers=raw["num_hidden_layers"],
    heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
    mlp=raw["intermediate_size"],
    rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
    norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    tied=bool(raw.get("tie_word_embeddings", False)),
    context=raw.get("max_position_embeddings", 2048),
  )


_CONFIG_READERS: dict[str, Callable[[Mapping[str, Any], Path], ModelConfig]] = {
  "LlamaForCausalLM": _llama_config,
}


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
  """Every tensor of model.safetensors, or of the shards model.safetensors.index.json lists."""
  from safetensors import SafetensorError, safe_open

  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  listed: dict[str, str] = {}
  if single.is_file():
    files = [single]
  elif index.is_file():
    listed = read_json(index).get("weight_map", {})
    files = [folder / name for name in sorted(set(listed.values()))]
  else:
    have = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
      f"{folder} holds neither {single.name} nor {index.name} (other formats are not read); "
      f"it holds: {', '.join(have[:20])}"
    )
  if absent := [file.name for file in files if not file.is_file()]:
    raise FileNotFoundError(f"{index} lists files that are not there: {', '.join(absent)}")

  tensors: dict[str, Tensor] = {}
  for file in files:
    try:
      opened = safe_open(str(file), "np")
    except SafetensorError as error:
      raise ValueError(
        f"{file} ({file.stat().st_size} bytes) is truncated or is not a safetensors file: {error}"
      ) from error
    for name in opened.keys():  # noqa: SIM118 - not a mapping
      if name in tensors:
        raise ValueError(f"{folder}: tensor {name} is in {file.name} and in an earlier shard")
      part = opened.get_slice(name)
      if part.get_dtype() not in _FLOATS:
        raise ValueError(f"{file}: {name} is {part.get_dtype()}, known: {', '.join(_FLOATS)}")
      tensors[name] = Tensor(tuple(part.get_shape()), partial(opened.get_tensor, name))
  if absent := [name for name in listed if name not in tensors]:
    raise ValueError(f"{index} lists tensors that no shard holds: {', '.join(absent[:20])}")
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; errors name the file."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"no {path.name} in {path.parent}") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
  return value


def first_line(error: Exception) -> str:
  """The first line of an error's text, to quote it in another."""
  return str(error).strip().split("\n")[0]


# --- GGUF files -----------------------------------------------------------------------------------


class Gguf(NamedTuple):
  """An open GGUF file: metadata by key, and its tensors (named, quantized, mapped from disk)."""

  path: Path
  reader: Any

  def get(self, key: str, default: Any = None) -> Any:
    field = self.reader.fields.get(key)
    return default if field is None else field.contents()

  def need(self, key: str) -> Any:
    if key not in self.reader.fields:
      raise ValueError(f"{self.path}: the metadata has no {key}")
    return self.get(key)


def open_gguf(path: Path) -> Gguf:
  """Opens a GGUF file; ValueError with its name when it is truncated or something else."""
  import gguf

  with path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
  try:
    return Gguf(path, gguf.GGUFReader(path))
  except Exception as error:  # reading past the end surfaces as many types
    raise ValueError(
      f"{path} ({path.stat().st_size} bytes) is a truncated or damaged GGUF file "
      f"({type(error).__name__}: {first_line(error)}); fetch it again"
    ) from error


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """A llama GGUF file, with its q and k rows put back in Hugging Face order."""
  file = open_gguf(path)
  architecture = file.need("general.architecture")
  if architecture != "llama":
    raise ValueError(f"{path}: general.architecture is {architecture!r}, known: llama")
  config = _gguf_config(file)
  tensors = {tensor.name: _gguf_tensor(tensor, config, path) for tensor in file.reader.tensors}
  return config, tensors


def _gguf_config(file: Gguf) -> ModelConfig:
  names = {tensor.name for tensor in file.reader.tensors}
  scaling = file.get("llama.rope.scaling.type", "none")
  if scaling != "none" or "rope_freqs.weight" in names:
    raise ValueError(f"{file.path}: rope scaling ({scaling}) is not supported")
  width, heads = file.need("llama.embedding_length"), file.need("llama.attention.head_count")
  head_dim = file.get("llama.attention.key_length", width // heads)
  if (rotated := file.get("llama.rope.dimension_count", head_dim)) != head_dim:
    raise ValueError(f"{file.path}: rope over {rotated} of {head_dim} dimensions is not supported")
  epsilon = np.float32(file.need("llama.attention.layer_norm_rms_epsilon"))
  vocab = file.get("llama.vocab_size") or len(file.need("tokenizer.ggml.tokens"))
  return ModelConfig(
    vocab_size=vocab,
    width=width,
    layers=file.need("llama.block_count"),
    heads=heads,
    kv_heads=file.get("llama.attention.head_count_kv", heads),
    head_dim=head_dim,
    mlp=file.need("llama.feed_forward_length"),
    rope_theta=float(file.get("llama.rope.freq_base", 10_000.0)),
    norm_eps=float(str(epsilon)),  # 1e-5 as float32 reads back as 1e-5
    tied="output.weight" not in names,
    context=file.need("llama.context_length"),
  )


def _gguf_tensor(tensor: Any, config: ModelConfig, path: Path) -> Tensor:
  import gguf

  heads = None
  if tensor.name.endswith(".attn_q.weight"):
    heads = config.heads
  elif tensor.name.endswith(".attn_k.weight"):
    heads = config.kv_heads

  def read() -> np.ndarray:
    try:
      values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f"{path}: {tensor.name}: {error}") from error
    return values if heads is None else undo_rope_order(values, heads)

  # GGUF counts dimensions from the innermost.
  shape = tuple(int(n) for n in reversed(tensor.shape))
  return Tensor(shape, read)


def undo_rope_order(kernel: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a GGUF q or k kernel [heads*Dh, D] back in the order of Hugging Face files.

  RoPE turns pairs of rows of a head. GGUF puts the two of a pair side by side (0, 1), (2, 3), ...;
  Hugging Face ("rotate half") pairs row i with row i + Dh/2.

  >>> undo_rope_order(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
  [0, 1, 2, 3]
  """
  rows, columns = kernel.shape
  pairs = kernel.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)
