"""Converts a Hugging Face config.json to a ModelConfig; FAMILIES lists the supported families.

Only the fields of the file are read; code in a model repository (`auto_map`) is never run. Fields
that a file omits have the defaults of the family's config class in transformers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.config import MAX_LAYERS, ModelConfig, RopeScaling, check_numbers

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
  """Describes a model family: its names in config.json, and how it differs from Llama.

  Attributes:
    language_model: entry of `architectures` for the language model.
    classifier: entry of `architectures` for the sequence classifier.
    overrides: computes the ModelConfig fields that differ from Llama from the fields of the file.
    defaults: values of fields that the file may omit.
    wraps: whether the language model is a part of a larger model, described under `text_config`.
  """

  language_model: str
  classifier: str
  overrides: Callable[[Fields], dict[str, Any]]
  defaults: Mapping[str, Any] = field(default_factory=dict)
  wraps: bool = False


class Fields:
  """Reads the fields of a config.json by name; errors name the file and the field.

  Args:
    raw: the fields.
    defaults: values of missing fields.
    where: name of the file in errors.
  """

  def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    self.raw, self.where = {**defaults, **raw}, where

  def get(self, name: str, default: Any = None) -> Any:
    """Returns the value of a field, or `default` if it is missing or null."""
    value = self.raw.get(name)
    return default if value is None else value

  def number(self, name: str, default: float | None = None) -> float:
    """Returns the value of a numeric field; ValueError for any other value."""
    value = self.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:
      raise self._wrong(name, value, "a finite number")
    return float(value)

  def positive(self, name: str, default: float | None = None) -> float:
    """Returns the value of a numeric field above 0; ValueError for any other value."""
    if (value := self.number(name, default)) <= 0:
      raise self._wrong(name, value, "a finite number above 0")
    return value

  def integer(self, name: str, default: int | None = None) -> int:
    """Returns the value of a positive integer field; ValueError for any other value."""
    value = self.get(name, default)
    if type(value) is not int or value < 1:
      raise self._wrong(name, value, "a positive integer")
    if value >= 2**31:
      raise self._wrong(name, value, "an integer below 2^31")
    return value

  @property
  def layers(self) -> int:
    """The number of layers; ValueError where it would make endless lists."""
    if (value := self.integer("num_hidden_layers")) > MAX_LAYERS:
      raise self._wrong("num_hidden_layers", value, f"at most {MAX_LAYERS}")
    return value

  def flag(self, name: str, default: bool = False) -> bool:
    """Returns the value of a true-or-false field; ValueError for any other value."""
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise self._wrong(name, value, "true or false")
    return value

  def group(self, name: str) -> dict[str, Any]:
    """Returns the fields of a group, none if it is missing; ValueError for any other value."""
    value = self.get(name, {})
    if not isinstance(value, dict):
      raise self._wrong(name, value, "an object")
    return value

  def _wrong(self, name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{self.where}: {name} must be given as {allowed}, got {repr(value)[:80]}")

  def cap(self, name: str) -> float | None:
    """Returns a soft cap, or None if the field is missing, null or 0."""
    return self.number(name, 0.0) or None

  def refuse(self, name: str, reason: str) -> None:
    """Raises ValueError if the field is set."""
    if self.get(name):
      raise ValueError(f"{self.where}: {name} {self.raw[name]!r} is not supported: {reason}")


# --- differences between the families -------------------------------------------------------------


def _llama(f: Fields) -> dict[str, Any]:
  biases = ("q", "k", "v", "o") if f.flag("attention_bias") else ()
  return {"biases": biases + (("gate", "up", "down") if f.flag("mlp_bias") else ())}


def _mistral(f: Fields) -> dict[str, Any]:
  return _local(f, [f.get("sliding_window") is not None] * f.layers)


def _qwen2(f: Fields) -> dict[str, Any]:
  return _qwen_windows(f) | {"biases": ("q", "k", "v")}


def _qwen3(f: Fields) -> dict[str, Any]:
  return _qwen_windows(f) | _llama(f) | {"qk_norm": True}


def _qwen_windows(f: Fields) -> dict[str, Any]:
  layers = f.layers
  if not f.flag("use_sliding_window") or f.get("sliding_window") is None:
    return {}
  first = f.number("max_window_layers", layers)
  return _local(f, _layer_types(f) or [i >= first for i in range(layers)])


def _gemma2(f: Fields) -> dict[str, Any]:
  return _gemma(f, pattern=2) | {"attn_softcap": f.cap("attn_logit_softcapping")}


def _gemma3(f: Fields) -> dict[str, Any]:
  # These files contain attn_logit_softcapping too, but no implementation reads it.
  return _gemma(f, pattern=f.integer("sliding_window_pattern", 6)) | {"qk_norm": True}


def _gemma(f: Fields, pattern: int) -> dict[str, Any]:
  """Returns the fields that all Gemmas share; every `pattern`-th layer is global, others local."""
  f.refuse("use_bidirectional_attention", "generation is causal")
  layers = f.layers
  return {
    **_llama(f),
    **_local(f, _layer_types(f) or [bool((i + 1) % pattern) for i in range(layers)]),
    "post_norm": True,
    "norm_offset": 1.0,
    "embed_scale": f.integer("hidden_size") ** 0.5,
    "attn_scale": f.positive("query_pre_attn_scalar") ** -0.5,
    "softcap": f.cap("final_logit_softcapping"),
  }


def _layer_types(f: Fields) -> list[bool] | None:
  """Returns for each layer whether it is local, or None if the file does not list the layers."""
  names, layers = f.get("layer_types"), f.layers
  if names is None:
    return None
  known = isinstance(names, list) and all(name in (LOCAL, GLOBAL) for name in names)
  if not known or len(names) != layers:
    raise ValueError(
      f"{f.where}: layer_types must name {layers} layers, each {LOCAL} or {GLOBAL}, got "
      f"{repr(names)[:200]}"
    )
  return [name == LOCAL for name in names]


def _local(f: Fields, layers: list[bool]) -> dict[str, Any]:
  """Returns the fields for local layers; none if no layer is local."""
  if not any(layers):
    return {}
  return {"local_layers": tuple(layers), "window": f.integer("sliding_window")}


_QWEN = {
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
_GEMMA = {
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "tie_word_embeddings": True,
  "pad_token_id": 0,
}
_GEMMA3 = _GEMMA | {
  "vocab_size": 262208,
  "max_position_embeddings": 131072,
  "rope_theta": 1e6,
  "rope_local_base_freq": 1e4,
}

# fmt: off
FAMILIES: dict[str, Family] = {
  "llama": Family("LlamaForCausalLM", "LlamaForSequenceClassification", _llama),
  "mistral": Family("MistralForCausalLM", "MistralForSequenceClassification", _mistral,
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}),
  "qwen2": Family("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", _qwen2, _QWEN),
  "qwen3": Family("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", _qwen3,
    _QWEN | {"head_dim": 128}),
  "gemma2": Family("Gemma2ForCausalLM", "Gemma2ForSequenceClassification", _gemma2,
    _GEMMA | {"vocab_size": 256000, "max_position_embeddings": 8192,
              "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
  "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", _gemma3,
    _GEMMA3),
  "gemma3": Family("Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification", _gemma3,
    _GEMMA3, wraps=True),
}
# fmt: on


# --- reading --------------------------------------------------------------------------------------


def parse(raw: Mapping[str, Any], where: str) -> ModelConfig:
  """Returns the ModelConfig of a config.json.

  Args:
    raw: the object in the file.
    where: name of the file in errors.

  Raises:
    ValueError: the family is unknown, a field is missing or has a wrong type, or the model computes
      something that the decoder does not.

  Example:
    >>> raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4,
    ...        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    >>> parse(raw, "config.json").head_dim
    2
  """
  name, is_classifier = find_family(raw, where)
  family = FAMILIES[name]
  top = Fields(raw, {}, where)
  language_model = top.group("text_config") if family.wraps else raw
  f = Fields(language_model, family.defaults, where)
  top.refuse("quantization_config", "weights are trained in float; use the unquantized checkpoint")
  activation = f.get("hidden_activation", f.get("hidden_act", "silu"))
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise ValueError(
      f"{where}: hidden_act {activation!r} is not supported, known: {', '.join(_ACTIVATIONS)}"
    )
  width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
  kv_heads, head_dim = (
    f.integer("num_key_value_heads", heads),
    f.integer("head_dim", width // heads),
  )
  if heads % kv_heads or head_dim % 2:
    raise ValueError(
      f"{where}: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}, and "
      f"head_dim {head_dim} must be even"
    )
  overrides = family.overrides(f)
  config = ModelConfig(
    vocab_size=f.integer("vocab_size"),
    width=width,
    layers=f.layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    mlp=f.integer("intermediate_size"),
    norm_eps=f.number("rms_norm_eps", 1e-6),
    # The entry of the larger model takes precedence.
    tied=top.flag("tie_word_embeddings", f.flag("tie_word_embeddings")),
    context=f.integer("max_position_embeddings", 2048),
    labels=_labels(top) if is_classifier else 0,
    activation=_ACTIVATIONS[activation],
    **_rope(f, local=bool(overrides.get("local_layers"))),
    **overrides,
  )
  check_numbers(config, where)
  return config


def find_family(raw: Mapping[str, Any], where: str) -> tuple[str, bool]:
  """Returns the family of a config.json by its `architectures`, or by `model_type` without them.

  Returns:
    A key of FAMILIES, and whether the model is a sequence classifier.

  Raises:
    ValueError: no family or more than one matches.
  """
  architectures = raw.get("architectures") or []
  if not isinstance(architectures, list):
    raise ValueError(f"{where}: architectures must be a list, got {repr(architectures)[:80]}")
  model_type = raw.get("model_type")
  matches = [
    (name, architecture == family.classifier)
    for name, family in FAMILIES.items()
    for architecture in architectures
    if architecture in (family.language_model, family.classifier)
  ]
  if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
    matches = [(model_type, False)]
  if len(matches) != 1:
    known = ", ".join(f"{row.language_model}, {row.classifier}" for row in FAMILIES.values())
    remote = " The code in its repository (auto_map) is never run." if "auto_map" in raw else ""
    raise ValueError(
      f"{where}: architectures is {architectures} and model_type {model_type!r}, known: {known} "
      f"(exactly one).{remote}"
    )
  return matches[0]


def _labels(top: Fields) -> int:
  """Returns the number of labels of a classifier; by default 2, as in transformers."""
  return len(top.group("id2label")) or top.integer("num_labels", 2)


def _rope(f: Fields, local: bool) -> dict[str, Any]:
  """Returns the rotary fields of ModelConfig.

  transformers 5 writes rope_parameters (one set, or one for each kind of layer); older versions
  write rope_theta, rope_scaling and, for Gemma 3, rope_local_base_freq.

  Args:
    local: whether the model has local layers.
  """
  parameters, scaling = f.group("rope_parameters"), f.group("rope_scaling")
  kinds = Fields(parameters, {}, f.where)
  by_kind = GLOBAL in parameters or LOCAL in parameters
  chosen = kinds.group(GLOBAL) | scaling if by_kind else scaling or parameters
  p = Fields(chosen, {"rope_theta": f.get("rope_theta", 10_000.0)}, f.where)
  fields = {"rope_theta": p.positive("rope_theta"), "rope_scaling": _scaling(f, p)}
  if not local:
    return fields
  local_parameters = kinds.group(LOCAL) if by_kind else {}
  if local_parameters.get("rope_type", "default") != "default":
    raise ValueError(f"{f.where}: rope scaling of {LOCAL} is not supported, got {local_parameters}")
  other = Fields(local_parameters, {"rope_theta": f.get("rope_local_base_freq")}, f.where)
  if other.get("rope_theta") is None:
    return fields
  theta = other.positive("rope_theta")
  same = theta == fields["rope_theta"] and fields["rope_scaling"] is None
  return fields if same else fields | {"local_rope_theta": theta}


def _scaling(f: Fields, p: Fields) -> RopeScaling | None:
  """Returns the scaling in the rotary parameters `p` of a config with the fields `f`."""
  kind = p.get("rope_type", p.get("type", "default"))
  if not isinstance(kind, str) or kind not in _ROPES:
    reason = " (its frequencies change with the longest sequence)" if kind == "dynamic" else ""
    raise ValueError(
      f"{f.where}: rope scaling {kind!r} is not supported{reason}; known: {', '.join(_ROPES)}"
    )
  if p.get("partial_rotary_factor", f.get("partial_rotary_factor", 1.0)) != 1.0:
    raise ValueError(f"{f.where}: partial_rotary_factor is not supported, only 1.0")
  if kind == "default":
    return None
  if kind == "linear":
    return RopeScaling("linear", p.positive("factor"))
  context = f.integer("max_position_embeddings", 2048)
  name = "original_max_position_embeddings"
  original = f.integer(name) if f.get(name) else p.integer(name, context)
  if kind == "llama3":
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    return RopeScaling("llama3", p.positive("factor"), original, low, high)
  factor = p.positive("factor", context / original)

  def amplitude(strength: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

  if p.get("mscale") and p.get("mscale_all_dim"):
    default = amplitude(p.positive("mscale")) / amplitude(p.positive("mscale_all_dim"))
  else:
    default = amplitude(1.0)
  return RopeScaling(
    "yarn",
    factor,
    original,
    low=p.number("beta_slow", 1.0) or 1.0,
    high=p.number("beta_fast", 32.0) or 32.0,
    amplitude=p.positive("attention_factor", default),
    rounded=p.flag("truncate", True),
  )
