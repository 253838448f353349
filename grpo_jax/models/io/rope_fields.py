"""Reads the rotary fields of a config.json, as older and newer transformers write them."""

from __future__ import annotations

import math
from typing import Any

from grpo_jax.models.config import RopeScaling
from grpo_jax.models.io.fields import Fields

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_fields(f: Fields, local: bool, partial: bool) -> dict[str, Any]:
  """Returns the rotary fields of ModelConfig.

  transformers 5 writes rope_parameters (one set, or one for each kind of layer); older versions
  write rope_theta, rope_scaling and, for Gemma 3, rope_local_base_freq.

  Args:
    local: whether the model has local layers.
    partial: whether a part of a head may rotate alone.
  """
  parameters, scaling = f.group("rope_parameters"), f.group("rope_scaling")
  kinds = Fields(parameters, {}, f.where)
  by_kind = GLOBAL in parameters or LOCAL in parameters
  chosen = kinds.group(GLOBAL) | scaling if by_kind else scaling or parameters
  p = Fields(chosen, {"rope_theta": f.get("rope_theta", 10_000.0)}, f.where)
  share = p.get("partial_rotary_factor", f.get("partial_rotary_factor", 1.0))
  if share != 1.0 and not partial:
    raise ValueError(
      f"{f.where}: partial_rotary_factor is not supported for this family, only 1.0; got {share!r}"
    )
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
  if p.get("short_factor") is not None:
    kind = "longrope"  # early files call it "su"
  if not isinstance(kind, str) or kind not in _ROPES:
    reason = " (its frequencies change with the longest sequence)" if kind == "dynamic" else ""
    raise ValueError(
      f"{f.where}: rope scaling {kind!r} is not supported{reason}; known: {', '.join(_ROPES)}"
    )
  if kind == "default":
    return None
  if kind == "linear":
    return RopeScaling("linear", p.positive("factor"))
  context = f.integer("max_position_embeddings", 2048)
  name = "original_max_position_embeddings"
  original = f.integer(name) if f.get(name) else p.integer(name, context)
  if kind == "longrope":
    return _longrope(p, original, context)
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


def _longrope(p: Fields, original: int, context: int) -> RopeScaling:
  """Returns the scaling of Phi-3: a divisor of each frequency, and an amplitude."""

  def divisors(name: str) -> tuple[float, ...]:
    value = p.get(name)
    numbers = isinstance(value, list) and all(
      isinstance(each, int | float) and not isinstance(each, bool) for each in value
    )
    if not numbers:
      raise ValueError(f"{p.where}: {name} must be a list of numbers, got {repr(value)[:80]}")
    return tuple(map(float, value))

  factor = p.positive("factor", context / original)
  default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  return RopeScaling(
    "longrope",
    factor=1.0,
    original=original,
    amplitude=p.positive("attention_factor", default),
    short=divisors("short_factor"),
    long=divisors("long_factor"),
  )
