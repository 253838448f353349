"""Finds the ModelConfig of a source without its weights; holds a table of well-known models.

Used for planning: the fields of config.json, a file of a few hundred bytes, describe a model, so
its weights need not be on this machine.
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

# Fields of config.json by hub id.
# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
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
  "Qwen/Qwen3-30B-A3B": {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "tie_word_embeddings": False, "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
  "allenai/OLMoE-1B-7B-0924": {
    "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304, "hidden_size": 2048,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": False, "tie_word_embeddings": False, "rope_theta": 10_000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
  "openai/gpt-oss-20b": {
    "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880,
    "num_hidden_layers": 24, "intermediate_size": 2880, "num_local_experts": 32,
    "tie_word_embeddings": False},
  "HuggingFaceTB/SmolLM3-3B": {
    "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "intermediate_size": 11008, "tie_word_embeddings": True, "rope_theta": 5_000_000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 65536},
  "allenai/OLMo-2-0425-1B-Instruct": {
    "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "hidden_size": 2048,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 8192, "tie_word_embeddings": False, "rope_theta": 500_000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
  "microsoft/phi-4": {
    "architectures": ["Phi3ForCausalLM"], "vocab_size": 100352, "hidden_size": 5120,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
    "intermediate_size": 17920, "tie_word_embeddings": False, "rope_theta": 250_000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 16384},
  "zai-org/GLM-4-9B-0414": {
    "architectures": ["Glm4ForCausalLM"], "vocab_size": 151552, "hidden_size": 4096,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 13696, "tie_word_embeddings": False, "attention_bias": True,
    "partial_rotary_factor": 0.5, "rope_theta": 10_000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768},
}
# fmt: on


def config_of(source: str) -> ModelConfig:
  """Returns the ModelConfig of any `model.source`; reads only config.json of a folder or hub id.

  Raises:
    FileNotFoundError: nothing is at `source`, or config.json is missing.
    ValueError: a file is damaged or describes a model that the decoder does not compute.

  Example:
    >>> config_of("Qwen/Qwen3-0.6B").width
    1024
  """
  if source in PRESETS:
    return families.parse(PRESETS[source], source)
  path = Path(source).expanduser()
  if path.is_dir():
    return _read(Path(resolve(source).location) / "config.json")
  if path.exists() or ":" in source or source.count("/") != 1:
    location = resolve(source)
    if location.kind == "random":
      return RANDOM_MODELS.get(location.location) or _read(Path(location.location))
    return open_files(location).config
  return _read(_download(source))


def _read(path: Path) -> ModelConfig:
  if not path.is_file():
    raise FileNotFoundError(f"no {path}: a model is planned from its config.json")
  return families.parse(read_json(path), str(path))


def _download(hub_id: str) -> Path:
  try:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, "config.json"))
  except Exception as error:  # the hub client raises many unrelated types
    raise FileNotFoundError(
      f"no config.json of {hub_id!r}: there is no such path, and downloading it from the Hugging "
      f"Face hub failed ({first_line(error)}). Without the hub, use one of {', '.join(PRESETS)}; "
      f"or {SOURCES}"
    ) from error
