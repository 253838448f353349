"""Parameters back into a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import families
from grpo_jax.models.io.families import FAMILIES, GLOBAL, LOCAL
from grpo_jax.models.io.json_files import write_json
from grpo_jax.models.io.weights import file_shape, rows_of, shapes_of

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}
SHARD_BYTES = 5_000_000_000


# --- config.json ----------------------------------------------------------------------------------


def describe(config: ModelConfig) -> dict[str, Any]:
  """A config.json that reads back as `config`; the first family that it does in.

  Written in the fields that all versions of transformers read. ValueError if no family fits.

  >>> raw = describe(ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2,
  ...                            mlp=6, biases=("q", "k", "v")))
  >>> raw["architectures"], raw["hidden_size"]
  (['Qwen2ForCausalLM'], 4)
  """
  for model_type, family in FAMILIES.items():
    architecture = family.classifier if config.labels else family.language_model
    raw = {"architectures": [architecture], "model_type": model_type}
    raw |= _fields(config, model_type)
    if not family.wraps and _reads_back(raw, config):
      return raw
  raise ValueError(f"no family of {', '.join(FAMILIES)} computes what {config} says")


def _reads_back(raw: dict[str, Any], config: ModelConfig) -> bool:
  try:
    return families.parse(raw, raw["model_type"]) == config
  except ValueError:
    return False


def _fields(c: ModelConfig, model_type: str) -> dict[str, Any]:
  raw: dict[str, Any] = {
    "vocab_size": c.vocab_size,
    "hidden_size": c.width,
    "intermediate_size": c.mlp,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
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
  if c.local_layers and model_type != "mistral":
    raw["layer_types"] = [LOCAL if local else GLOBAL for local in c.local_layers]
  if c.local_layers and model_type.startswith("qwen"):
    raw["use_sliding_window"] = True
  if c.local_rope_theta is not None:
    raw["rope_local_base_freq"] = c.local_rope_theta
  if c.attn_scale is not None:
    divisor = c.attn_scale**-2
    whole = round(divisor)
    raw["query_pre_attn_scalar"] = whole if whole**-0.5 == c.attn_scale else divisor
    raw["attn_logit_softcapping"] = c.attn_softcap
    raw["final_logit_softcapping"] = c.softcap
  if c.rope_scaling is not None:
    raw["rope_scaling"] = _rope_scaling(c)
  return raw


def _rope_scaling(c: ModelConfig) -> dict[str, Any]:
  s = c.rope_scaling
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
  config: ModelConfig, params: Any, folder: Path, dtype: str, shard_bytes: int = SHARD_BYTES
) -> list[str]:
  """Writes the decoder's parameters to safetensors under their Hugging Face names.

  One file, or several of up to `shard_bytes` with an index. One file's tensors are in memory at a
  time. ValueError for parameters of another shape, and for numbers that `dtype` cannot hold.

  Returns:
    The names of the files.
  """
  from safetensors.numpy import save_file

  kind = DTYPES[dtype]
  tensors = _tensors(config, params)
  shards: list[list[_Tensor]] = [[]]
  room = shard_bytes
  for tensor in tensors:
    if shards[-1] and tensor.size * kind.itemsize > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= tensor.size * kind.itemsize

  files: dict[str, list[_Tensor]] = {}
  for i, shard in enumerate(shards):
    part = "" if len(shards) == 1 else f"-{i + 1:05}-of-{len(shards):05}"
    files[f"model{part}.safetensors"] = shard
  for file, shard in files.items():
    values = {tensor.name: tensor.cast(kind) for tensor in shard}
    save_file(values, folder / file, metadata={"format": "pt"})
    (folder / file).chmod(0o644)  # it makes files that nobody else may read
  if len(files) > 1:
    index = {
      "metadata": {"total_size": sum(tensor.size for tensor in tensors) * kind.itemsize},
      "weight_map": {tensor.name: file for file, shard in files.items() for tensor in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)
  return list(files)


class _Tensor(NamedTuple):
  """A parameter, or one layer of it, under the name and in the order of Hugging Face files."""

  name: str
  size: int
  parameter: Any
  layer: int | None

  def cast(self, kind: np.dtype) -> np.ndarray:
    value = self.parameter if self.layer is None else self.parameter[self.layer].T
    with np.errstate(over="ignore"):
      value = np.ascontiguousarray(np.asarray(value).astype(kind))
    if not np.isfinite(value).all():
      raise ValueError(f"{self.name} holds NaN or infinity as {kind}: train on, or use float32")
    return value


def _tensors(config: ModelConfig, params: Any) -> list[_Tensor]:
  """Everything to be written; ValueError if the parameters are not those of the config."""
  expected, given = _shapes(shapes_of(config)), _shapes(params)
  if wrong := [path for path in expected | given if expected.get(path) != given.get(path)]:
    shown = [f"{path}: {given.get(path)}, expected {expected.get(path)}" for path in wrong[:20]]
    raise ValueError("parameters that do not fit the config:\n  " + "\n  ".join(shown))
  found = []
  for row in rows_of(config):
    size = math.prod(file_shape(row, config))
    if not row.in_layer:
      found.append(_Tensor(row.hf, size, params[row.path], None))
      continue
    stacked = params["layers"][row.path.removeprefix("layers/")]
    found += [_Tensor(row.hf.format(i), size, stacked, i) for i in range(config.layers)]
  return found


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): v.shape for path, v in leaves}
