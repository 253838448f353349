"""Shapes of models without their weights: from a config.json alone, or from a small table.

For planning: a model is described by the fields of its Hugging Face config.json, a file of a few
hundred bytes, and nothing else of it has to be on this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.errors import first_line
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import families
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.sources import RANDOM_MODELS, SOURCES, resolve
from grpo_jax.models.io.weights import open_files

_QWEN3 = {
  "architectures": ["Qwen3ForCausalLM"],
  "vocab_size": 151936,
  "head_dim": 128,
  "num_key_value_heads": 8,
  "max_position_embeddings": 40960,
  "rope_theta": 1_000_000,
  "rms_norm_eps": 1e-6,
}

# Fields of the config.json of well-known models, by hub id.
# fmt: off
KNOWN: dict[str, dict[str, Any]] = {
  "HuggingFaceTB/SmolLM2-135M-Instruct": {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "tie_word_embeddings": True, "rope_theta": 100_000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
  "Qwen/Qwen3-0.6B": _QWEN3 | {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "intermediate_size": 3072, "tie_word_embeddings": True},
  "Qwen/Qwen3-1.7B": _QWEN3 | {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
    "intermediate_size": 6144, "tie_word_embeddings": True},
  "Qwen/Qwen3-8B": _QWEN3 | {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "intermediate_size": 12288, "tie_word_embeddings": False},
  "Qwen/Qwen2.5-7B-Instruct": {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "tie_word_embeddings": False, "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}
# fmt: on


def config_of(source: str) -> ModelConfig:
  """The ModelConfig of any `model.source`; of a folder or a hub id only config.json is read.

  Raises as `open_weights` does, and FileNotFoundError where config.json is missing.

  >>> config_of("Qwen/Qwen3-0.6B").width
  1024
  """
  if source in KNOWN:
    return families.parse(KNOWN[source], source)
  path = Path(source).expanduser()
  if path.is_dir():
    return _read(path / "config.json")
  if path.exists() or ":" in source or source.count("/") != 1:
    found = resolve(source)
    return RANDOM_MODELS[found.location] if found.kind == "random" else open_files(found).config
  return _read(_fetch(source))


def _read(path: Path) -> ModelConfig:
  if not path.is_file():
    raise FileNotFoundError(f"no {path}: a model is planned from its config.json")
  return families.parse(read_json(path), str(path))


def _fetch(hub_id: str) -> Path:
  try:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, "config.json"))
  except Exception as error:  # the hub client raises many unrelated types
    raise FileNotFoundError(
      f"no config.json of {hub_id!r}: there is no such path, and fetching it from the Hugging Face "
      f"hub failed ({first_line(error)}). Without the hub, known are "
      f"{', '.join(KNOWN)}; or name {SOURCES}"
    ) from error
