"""Writes config.json and safetensors files of a Hugging Face folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import families
from grpo_jax.models.io.families import FAMILIES
from grpo_jax.models.io.json_files import write_json
from grpo_jax.models.io.rope_fields import GLOBAL, LOCAL
from grpo_jax.models.io.weights import file_shape, rows_of, shapes_of
from grpo_jax.models.protocol import Params

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}
SHARD_BYTES = 5_000_000_000


# --- config.json ----------------------------------------------------------------------------------


def describe(config: ModelConfig) -> dict[str, Any]:
  """Returns a config.json of the first family that reads it back as `config`.

  Uses only fields that all versions of transformers read.

  Raises:
    ValueError: no family computes the same.

  Example:
    >>> raw = describe(ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2,
    ...                            mlp=6, biases=("q", "k", "v")))
    >>> raw["architectures"], raw["hidden_size"]
    (['Qwen2ForCausalLM'], 4)
  """
  for model_type, family in FAMILIES.items():
    architecture = family.classifier if config.labels else family.language_model
    raw = {"architectures": [architecture], "model_type": model_type}
    if family.wraps or not architecture:
      continue
    extra, raw = family.describes(config), raw | _fields(config, model_type)
    scaling = raw.get("rope_scaling", {}) | extra.pop("rope_scaling", {})
    raw |= extra | ({"rope_scaling": scaling} if scaling else {})
    if _reads_back(raw, config):
      return raw
  raise ValueError(f"no family of {', '.join(FAMILIES)} computes what {config} describes")


def _reads_back(raw: dict[str, Any], config: ModelConfig) -> bool:
  try:
    return families.parse(raw, raw["model_type"]) == config
  except ValueError:
    return False


def _fields(c: ModelConfig, model_type: str) -> dict[str, Any]:
  """Returns the fields of config.json besides the names of the family."""
  raw: dict[str, Any] = {
    "vocab_size": c.vocab_size,
    "hidden_size": c.width,
    "intermediate_size": c.mlp,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    **({"num_experts_per_tok": c.experts_per_token} if c.experts else {}),
    "max_position_embeddings": c.context,
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "tie_word_embeddings": c.tied,
    "attention_bias": "o" in c.biases,
    "mlp_bias": "up" in c.biases,
  }
  if model_type != "llama":
    raw["sliding_window"] = c.window or None
  if c.activation == "silu":
    raw["hidden_act"] = "silu"
  else:
    raw["hidden_activation"] = "gelu_pytorch_tanh"
  if c.labels:
    raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.labels)}
  if c.local_layers and model_type not in ("mistral", "phi3", "ministral3", "mixtral", "qwen3_moe"):
    raw["layer_types"] = [LOCAL if local else GLOBAL for local in c.local_layers]
  if c.local_layers and model_type.startswith("qwen"):
    raw["use_sliding_window"] = True
  if c.local_rope_theta is not None:
    raw["rope_local_base_freq"] = c.local_rope_theta
  if c.attn_scale is not None and model_type.startswith("gemma"):
    divisor = c.attn_scale**-2
    rounded = round(divisor)
    raw["query_pre_attn_scalar"] = rounded if rounded**-0.5 == c.attn_scale else divisor
    raw["attn_logit_softcapping"] = c.attn_softcap
    raw["final_logit_softcapping"] = c.softcap
  if c.rope_scaling is not None:
    raw["rope_scaling"] = _rope_scaling(c)
  return raw


def _rope_scaling(c: ModelConfig) -> dict[str, Any]:
  s = c.rope_scaling
  if s.kind == "longrope":
    return {
      "rope_type": s.kind,
      "short_factor": list(s.short),
      "long_factor": list(s.long),
      "original_max_position_embeddings": s.original,
      "attention_factor": s.amplitude,
    }
  raw: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
  if s.kind != "linear":
    raw["original_max_position_embeddings"] = s.original
  if s.kind == "llama3":
    raw |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
  if s.kind == "yarn":
    raw |= {"beta_slow": s.low, "beta_fast": s.high, "attention_factor": s.amplitude}
    raw["truncate"] = s.rounded
  return raw


# --- model.safetensors ----------------------------------------------------------------------------


def write_weights(
  config: ModelConfig, params: Params, folder: Path, dtype: str, shard_bytes: int = SHARD_BYTES
) -> list[str]:
  """Writes the decoder's parameters to safetensors under their Hugging Face names.

  The tensors of one file are in memory at a time.

  Args:
    config: shape and family of the model.
    params: parameters, layers stacked.
    folder: existing folder to write to.
    dtype: dtype of the weights, a key of DTYPES.
    shard_bytes: largest size of a file in bytes; a larger model is split into several files with an
      index.

  Returns:
    The names of the weight files.

  Raises:
    ValueError: the parameters do not fit `config`, or are not finite in `dtype`.
  """
  from safetensors.numpy import save_file

  numpy_dtype = DTYPES[dtype]
  tensors = _tensors(config, params)
  shards: list[list[_Tensor]] = [[]]
  room = shard_bytes
  for tensor in tensors:
    if shards[-1] and tensor.size * numpy_dtype.itemsize > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= tensor.size * numpy_dtype.itemsize

  files: dict[str, list[_Tensor]] = {}
  for i, shard in enumerate(shards):
    part = "" if len(shards) == 1 else f"-{i + 1:05}-of-{len(shards):05}"
    files[f"model{part}.safetensors"] = shard
  for file, shard in files.items():
    values = {tensor.name: tensor.cast(numpy_dtype) for tensor in shard}
    save_file(values, folder / file, metadata={"format": "pt"})
    (folder / file).chmod(0o644)  # safetensors makes files that only their owner may read
  if len(files) > 1:
    index = {
      "metadata": {"total_size": sum(tensor.size for tensor in tensors) * numpy_dtype.itemsize},
      "weight_map": {tensor.name: file for file, shard in files.items() for tensor in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)
  return list(files)


class _Tensor(NamedTuple):
  """Holds a tensor to write: a parameter, or one layer of a stacked one.

  Attributes:
    name: Hugging Face name.
    size: number of elements.
    parameters: the parameters in the tree that the tensor holds, one above the other.
    layer: index into stacked parameters, of the layer or of layer and expert; None for the others.
    as_is: the tensor has the axes of the tree, and its parameters take turns along the last one.
  """

  name: str
  size: int
  parameters: tuple[Array, ...]
  layer: int | tuple[int, int] | None
  as_is: bool = False

  def cast(self, dtype: np.dtype) -> np.ndarray:
    """Returns the values in `dtype`, transposed as in the files; ValueError if not finite."""
    parts = [p if self.layer is None else p[self.layer] for p in self.parameters]
    if self.layer is not None and not self.as_is:
      parts = [part.T for part in parts]
    with np.errstate(over="ignore"):
      parts = [np.asarray(part).astype(dtype) for part in parts]
    if self.as_is:
      value = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
    else:
      value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    value = np.ascontiguousarray(value)
    if not np.isfinite(value).all():
      raise ValueError(f"{self.name} holds NaN or infinity as {dtype}: train on, or use float32")
    return value


def _tensors(config: ModelConfig, params: Params) -> list[_Tensor]:
  """Returns all tensors to write; ValueError if the parameters do not fit the config."""
  expected, actual = _shapes(shapes_of(config)), _shapes(params)
  if wrong := [path for path in expected | actual if expected.get(path) != actual.get(path)]:
    shown = [f"{path}: {actual.get(path)}, expected {expected.get(path)}" for path in wrong[:20]]
    raise ValueError("parameters that do not fit the config:\n  " + "\n  ".join(shown))
  tensors, rows = [], rows_of(config)
  for row in rows:
    size = math.prod(file_shape(row, config))
    if not row.in_layer:
      tensors.append(_Tensor(row.hf, size, (params[row.path],), None))
      continue
    if row.by_expert:
      value = (params["layers"][row.path.removeprefix("layers/")],)
      tensors += [
        _Tensor(row.hf.format(*place), size, value, place)
        for place in np.ndindex(config.layers, config.experts)
      ]
      continue
    together = [other for other in rows if other.hf == row.hf]  # in the order of their places
    if row is together[0]:
      size = sum(math.prod(file_shape(part, config)) for part in together)
      stacked = tuple(params["layers"][part.path.removeprefix("layers/")] for part in together)
      tensors += [
        _Tensor(row.hf.format(i), size, stacked, i, row.as_is) for i in range(config.layers)
      ]
  return tensors


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each leaf by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): v.shape for path, v in leaves}
