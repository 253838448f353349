"""Converts a Hugging Face config.json to a ModelConfig; FAMILIES lists the supported families.

Only the fields of the file are read; code in a model repository (`auto_map`) is never run. Fields
that a file omits have the defaults of the family's config class in transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.config import ModelConfig, check_numbers
from grpo_jax.models.io.fields import Fields
from grpo_jax.models.io.rope_fields import GLOBAL, LOCAL, rope_fields

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
  """Describes a model family: its names in config.json, and how it differs from Llama.

  Attributes:
    language_model: entry of `architectures` for the language model.
    classifier: entry of `architectures` for the sequence classifier; None if transformers has none.
    overrides: computes the ModelConfig fields that differ from Llama from the fields of the file.
    defaults: values of fields that the file may omit.
    wraps: whether the language model is a part of a larger model, described under `text_config`.
    unpacks: values of `quant_method` in `quantization_config` whose files are read; their matrices
      become wide.
    describes: computes fields of config.json from a ModelConfig, for those that do not have the
      names of `writer`.
  """

  language_model: str
  classifier: str | None
  overrides: Callable[[Fields], dict[str, Any]]
  defaults: Mapping[str, Any] = field(default_factory=dict)
  wraps: bool = False
  unpacks: tuple[str, ...] = ()
  describes: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


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


def _smollm3(f: Fields) -> dict[str, Any]:
  every = f.integer("no_rope_layer_interval", 4)
  rotated = f.items("no_rope_layers") or [(i + 1) % every for i in range(f.layers)]
  unrotated = tuple(not each for each in rotated)
  local = _layer_types(f)
  if not f.flag("use_sliding_window") or f.get("sliding_window") is None:
    local = None
  elif local is None:
    local = list(unrotated)
  return {
    **_llama(f),
    **(_local(f, local) if local else {}),
    "unrotated_layers": unrotated if any(unrotated) else (),
  }


def _olmo2(f: Fields) -> dict[str, Any]:
  f.refuse("clip_qkv", "values of projections are not clipped")
  return _llama(f) | {"qk_norm": "all", "pre_norm": False, "post_norm": True, "names": "olmo"}


def _olmo3(f: Fields) -> dict[str, Any]:
  layers = _layer_types(f) or [bool((i + 1) % 4) for i in range(f.layers)]
  return _olmo2(f) | _local(f, layers)


def _exaone4(f: Fields) -> dict[str, Any]:
  """Returns the fields of EXAONE 4: with local layers, only these rotate."""
  window, pattern = f.get("sliding_window"), f.get("sliding_window_pattern", 4)
  layers = _layer_types(f)
  if layers is None and window is not None:
    # Text such as "LLLG" names the layers of a period.
    period = [letter != "G" for letter in pattern] if isinstance(pattern, str) else None
    period = period or [True] * (f.integer("sliding_window_pattern", 4) - 1) + [False]
    layers = [period[i % len(period)] for i in range(f.layers)]
  local = _local(f, layers or []) if window is not None else {}
  unrotated = tuple(not each for each in layers or ()) if window is not None else ()
  return {
    **local,
    "qk_norm": True,
    "pre_norm": False,
    "post_norm": True,
    "unrotated_layers": unrotated if any(unrotated) else (),
    "names": "olmo",
  }


def _phi3(f: Fields) -> dict[str, Any]:
  return _mistral(f) | {"rotary": _rotary(f), "names": "phi3"}


def _glm4(f: Fields) -> dict[str, Any]:
  return {
    "biases": ("q", "k", "v") if f.flag("attention_bias", True) else (),
    "post_norm": True,
    "rotary": _rotary(f),
    "interleaved": True,
    "names": "glm4",
  }


def _rotary(f: Fields) -> int:
  """Returns how many dimensions of a head rotate; 0 if all do."""
  parameters = f.group("rope_scaling") or f.group("rope_parameters")
  name = "partial_rotary_factor"
  share = Fields(parameters, {name: f.get(name, 1.0)}, f.where).positive(name)
  head_dim = f.integer("head_dim", f.integer("hidden_size") // f.integer("num_attention_heads"))
  return 0 if share == 1 else int(head_dim * share)


def _ministral3(f: Fields) -> dict[str, Any]:
  parameters = Fields(f.group("rope_scaling") or f.group("rope_parameters"), {}, f.where)
  return _mistral(f) | {"query_growth": parameters.number("llama_4_scaling_beta", 0.0)}


def _mistral3(f: Fields) -> dict[str, Any]:
  return _ministral3(f) if f.get("model_type") == "ministral3" else _mistral(f)


def _granite(f: Fields) -> dict[str, Any]:
  return {
    **_llama(f),
    "embed_scale": f.positive("embedding_multiplier", 1.0),
    "attn_scale": f.positive("attention_multiplier", 1.0),
    "residual_scale": f.positive("residual_multiplier", 1.0),
    "hidden_divisor": f.positive("logits_scaling", 1.0),
  }


def _qwen3_moe(f: Fields) -> dict[str, Any]:
  if f.integer("decoder_sparse_step", 1) != 1 or f.get("mlp_only_layers"):
    raise ValueError(
      f"{f.where}: decoder_sparse_step {f.get('decoder_sparse_step')} and mlp_only_layers "
      f"{f.get('mlp_only_layers')} make layers with and without experts, which are not supported; "
      "use a model in which all layers have experts (1 and [])"
    )
  windows = {}
  if f.flag("use_sliding_window") and f.get("sliding_window") is not None:
    windows = _local(f, [True] * f.layers)
  return {
    **windows,
    **_llama(f),
    **_experts(f, f.integer("num_local_experts", f.get("num_experts", 128)), "qwen_moe"),
    "mlp": f.integer("moe_intermediate_size", 768),
    "router_normalized": f.flag("norm_topk_prob"),
    "qk_norm": True,
  }


def _olmoe(f: Fields) -> dict[str, Any]:
  return {
    **_llama(f),
    **_experts(f, f.integer("num_experts", f.get("num_local_experts", 64)), "qwen_moe"),
    "router_normalized": f.flag("norm_topk_prob"),
    "qk_norm": "all",
    "clip_qkv": f.cap("clip_qkv"),
  }


def _mixtral(f: Fields) -> dict[str, Any]:
  experts = _experts(f, f.integer("num_local_experts", 8), "mixtral")
  return _mistral(f) | experts | {"router_normalized": True}


def _gpt_oss(f: Fields) -> dict[str, Any]:
  biases = ("q", "k", "v", "o") if f.flag("attention_bias") else ()
  layers = _layer_types(f) or [i % 2 == 0 for i in range(f.layers)]
  return {
    **(_local(f, layers) if f.get("sliding_window") is not None else {}),
    **_experts(f, f.integer("num_local_experts", f.get("num_experts", 128)), "gpt_oss"),
    "biases": (*biases, "router", "experts_gate", "experts_up", "experts_down"),
    "router_normalized": True,
    "swiglu_alpha": f.positive("swiglu_alpha", 1.702),
    "swiglu_limit": f.positive("swiglu_limit", 7.0),
    "sinks": True,
  }


def _experts(f: Fields, count: int, names: str) -> dict[str, Any]:
  """Returns the fields that all mixtures of experts share."""
  used = f.integer("num_experts_per_tok")
  return {"experts": count, "experts_per_token": used, "names": names}


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
    "names": "gemma",
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


# --- fields of config.json that only some families have -------------------------------------------


def _describe_smollm3(c: ModelConfig) -> dict[str, Any]:
  rotated = [int(not each) for each in c.unrotated_layers] or [1] * c.layers
  return {"no_rope_layers": rotated, "use_sliding_window": bool(c.local_layers)}


def _describe_granite(c: ModelConfig) -> dict[str, Any]:
  return {
    "embedding_multiplier": c.embed_scale,
    "attention_multiplier": c.attn_scale,
    "residual_multiplier": c.residual_scale,
    "logits_scaling": c.hidden_divisor,
  }


def _describe_phi3(c: ModelConfig) -> dict[str, Any]:
  raw = {"partial_rotary_factor": c.rotary / c.head_dim if c.rotary else 1.0}
  if c.rope_scaling is not None:
    raw["original_max_position_embeddings"] = c.rope_scaling.original
  return raw


def _describe_glm4(c: ModelConfig) -> dict[str, Any]:
  return _describe_phi3(c) | {"attention_bias": "q" in c.biases}


def _describe_olmo3(c: ModelConfig) -> dict[str, Any]:
  """Returns the angles of local layers, where they are not those that every reader assumes."""
  if c.local_rope_theta in (None, _OLMO3["rope_theta"]):
    return {}
  local = {"rope_type": "default", "rope_theta": c.local_rope_theta}
  return {"rope_parameters": {GLOBAL: {"rope_type": "default"}, LOCAL: local}}


def _describe_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
  return {
    "num_experts": c.experts,
    "moe_intermediate_size": c.mlp,
    "norm_topk_prob": c.router_normalized,
    "use_sliding_window": bool(c.local_layers),
  }


def _describe_olmoe(c: ModelConfig) -> dict[str, Any]:
  clip = {} if c.clip_qkv is None else {"clip_qkv": c.clip_qkv}
  return {"num_experts": c.experts, "norm_topk_prob": c.router_normalized} | clip


def _describe_mixtral(c: ModelConfig) -> dict[str, Any]:
  return {"num_local_experts": c.experts}


def _describe_exaone4(c: ModelConfig) -> dict[str, Any]:
  local = c.local_layers or (False,) * c.layers
  return {"layer_types": [LOCAL if each else GLOBAL for each in local]}


def _describe_ministral3(c: ModelConfig) -> dict[str, Any]:
  return {"rope_scaling": {"llama_4_scaling_beta": c.query_growth}} if c.query_growth else {}


def _describe_gpt_oss(c: ModelConfig) -> dict[str, Any]:
  plain = {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
  return {
    **_describe_mixtral(c),
    **_describe_exaone4(c),
    "swiglu_alpha": c.swiglu_alpha,
    "swiglu_limit": c.swiglu_limit,
    **({} if c.rope_scaling else plain),
  }


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
_MINISTRAL3 = {
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "max_position_embeddings": 262144,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
  },
}
_OLMO3 = {
  "rms_norm_eps": 1e-5,
  "rope_theta": 5e5,
  "rope_local_base_freq": 5e5,
  "sliding_window": 4096,
}
_GPT_OSS = {
  "num_attention_heads": 64,
  "num_key_value_heads": 8,
  "head_dim": 64,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
  "sliding_window": 128,
  "num_experts_per_tok": 4,
  "attention_bias": True,
  "rope_theta": 150000.0,
  "rope_parameters": {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
  },
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
  "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification", _smollm3,
    {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
     "tie_word_embeddings": True}, describes=_describe_smollm3),
  "olmo2": Family("Olmo2ForCausalLM", "Olmo2ForSequenceClassification", _olmo2,
    {"rms_norm_eps": 1e-5}),
  "olmo3": Family("Olmo3ForCausalLM", "Olmo3ForSequenceClassification", _olmo3, _OLMO3,
    describes=_describe_olmo3),
  "phi3": Family("Phi3ForCausalLM", "Phi3ForSequenceClassification", _phi3,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
     "original_max_position_embeddings": 4096}, describes=_describe_phi3),
  "glm4": Family("Glm4ForCausalLM", "Glm4ForSequenceClassification", _glm4,
    {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
     "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5}, describes=_describe_glm4),
  "granite": Family("GraniteForCausalLM", None, _granite, describes=_describe_granite),
  "ministral3": Family("Ministral3ForCausalLM", "Ministral3ForSequenceClassification",
    _ministral3, _MINISTRAL3, describes=_describe_ministral3),
  "mistral3": Family("Mistral3ForConditionalGeneration", None, _mistral3,
    {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
     "max_position_embeddings": 131072, "sliding_window": None, "rope_theta": 1e9,
     "tie_word_embeddings": True}, wraps=True),
  "exaone4": Family("Exaone4ForCausalLM", "Exaone4ForSequenceClassification", _exaone4,
    {"rms_norm_eps": 1e-5, "sliding_window": 4096}, describes=_describe_exaone4),
  "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification", _qwen3_moe,
    {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096,
     "num_experts_per_tok": 8}, describes=_describe_qwen3_moe),
  "olmoe": Family("OlmoeForCausalLM", None, _olmoe,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts_per_tok": 8},
    describes=_describe_olmoe),
  "gpt_oss": Family("GptOssForCausalLM", "GptOssForSequenceClassification", _gpt_oss, _GPT_OSS,
    unpacks=("mxfp4",), describes=_describe_gpt_oss),
  "mixtral": Family("MixtralForCausalLM", "MixtralForSequenceClassification", _mixtral,
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
     "num_experts_per_tok": 2, "sliding_window": None}, describes=_describe_mixtral),
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
  if Fields(top.group("quantization_config"), {}, where).get("quant_method") not in family.unpacks:
    reason = "weights are trained in float; use the unquantized checkpoint"
    top.refuse("quantization_config", reason)
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
    norm_eps=f.number("rms_norm_eps", 1e-6),
    # The entry of the larger model takes precedence.
    tied=top.flag("tie_word_embeddings", f.flag("tie_word_embeddings")),
    context=f.integer("max_position_embeddings", 2048),
    labels=_labels(top) if is_classifier else 0,
    activation=_ACTIVATIONS[activation],
    **({"mlp": f.integer("intermediate_size")} if "mlp" not in overrides else {}),
    **rope_fields(f, local=bool(overrides.get("local_layers")), partial="rotary" in overrides),
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
    if architecture and architecture in (family.language_model, family.classifier)
  ]
  if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
    matches = [(model_type, False)]
  if len(matches) != 1:
    known = [
      name for row in FAMILIES.values() for name in (row.language_model, row.classifier) if name
    ]
    remote = " The code in its repository (auto_map) is never run." if "auto_map" in raw else ""
    asked = [*architectures, model_type]
    near = _nearest(asked, [*known, *FAMILIES]) if not matches else ""
    raise ValueError(
      f"{where}: architectures is {architectures} and model_type {model_type!r}, known: "
      f"{', '.join(known)} (exactly one){near}.{remote}"
    )
  return matches[0]


def _nearest(asked: list[Any], known: list[str]) -> str:
  """Returns the known name that is nearest to one of the names asked for, for an error."""
  for name in asked:
    if isinstance(name, str) and (close := difflib.get_close_matches(name, known, n=1)):
      return f"; the nearest is {close[0]}"
  return ""


def _labels(top: Fields) -> int:
  """Returns the number of labels of a classifier; by default 2, as in transformers."""
  return len(top.group("id2label")) or top.integer("num_labels", 2)
