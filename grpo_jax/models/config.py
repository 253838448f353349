"""Describes a decoder-only language model: its sizes, and what its family computes differently.

Imports neither jax nor flax, so that a model file can be read, listed or planned without them.
"""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Stretches the rotary frequencies of a pretrained model to a context `factor` times as long.

  Attributes:
    kind: "linear" divides all frequencies, "llama3" depends on the wavelength, "yarn" on the number
      of turns (Peng et al. 2023, arXiv 2309.00071), "longrope" divides each by its own number (Ding
      et al. 2024, arXiv 2402.13753).
    factor: divisor of the low frequencies; unused by "longrope".
    original: context length in tokens of the pretrained model; unused by "linear".
    low: number of turns within `original` below which a frequency is divided by `factor`.
    high: number of turns above which a frequency is unchanged; frequencies between `low` and `high`
      are interpolated. Both are unused by "linear".
    amplitude: factor on cos and sin.
    rounded: round the limits outwards to whole frequency indices; used by "yarn" only.
    short: divisors of the frequencies, for sequences of up to `original` tokens; "longrope" only.
    long: divisors of the frequencies for longer sequences; "longrope" only.
  """

  kind: Literal["linear", "llama3", "yarn", "longrope"]
  factor: float
  original: int = 0
  low: float = 1.0
  high: float = 4.0
  amplitude: float = 1.0
  rounded: bool = True
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Describes a decoder: the sizes of its arrays, and what its family computes differently.

  Attributes:
    vocab_size: vocabulary, V.
    width: hidden size, D.
    layers: number of layers, L.
    heads: query heads, H.
    kv_heads: key-value heads, K; divides `heads`.
    head_dim: head size, Dh.
    mlp: hidden size of the MLP, F, or of each expert.
    rope_theta: base of the rotary frequencies.
    norm_eps: epsilon of all RMS norms.
    tied: use the embedding as the head.
    context: longest sequence in tokens that the model was trained for.
    rope_scaling: scaling of the rotary frequencies for longer contexts.
    labels: outputs of a sequence classifier, which has a `score` matrix [labels, D] instead of a
      head; 0 for a language model.
    biases: projections (of q k v o gate up down router experts_gate experts_up experts_down) that
      add a bias.
    qk_norm: apply an RMS norm to queries and keys: over the head size, or over all heads together
      ("all").
    pre_norm: apply an RMS norm to the inputs of attention and MLP.
    post_norm: apply an RMS norm to the outputs of attention and MLP before the residual addition.
    norm_offset: RMS norms multiply by `norm_offset + weight`.
    activation: activation function of the MLP's gate.
    embed_scale: factor on the embeddings.
    residual_scale: factor on the outputs of attention and MLP in the residual addition.
    hidden_divisor: divisor of the final hidden states, from which the head computes the logits.
    attn_scale: attention scores are `attn_scale * q · k`; None means `Dh^-0.5`.
    attn_softcap: soft cap of the attention scores, `cap * tanh(score / cap)`; None disables it.
    softcap: soft cap of the logits, applied by the code that computes them from `Decoder.head`.
    window: local layers attend to the last `window` tokens only, including the current one.
    local_layers: for each layer, true if it is local; empty if no layer is.
    local_rope_theta: `rope_theta` of local layers, which are then not scaled; None means that they
      rotate like the others.
    rotary: first dimensions of a head that are rotated; 0 rotates all.
    interleaved: the rotated pairs are neighbours (2 i, 2 i + 1) instead of (i, i + rotary / 2).
    unrotated_layers: for each layer, true if its queries and keys are not rotated; empty if all
      layers rotate.
    query_growth: queries at position p are multiplied by `1 + query_growth ln(1 + floor(p / n))`,
      where n is `rope_scaling.original`; 0 leaves them as they are.
    clip_qkv: queries, keys and values are clipped to this absolute value before rotation; None
      disables it.
    experts: number of MLPs of a layer of which each token passes through some, E; 0 for one MLP
      without a router.
    experts_per_token: number of experts of a token, k.
    router_normalized: the weights of a token's experts sum to one.
    swiglu_alpha: if above 0, experts compute `g sigmoid(alpha g) (u + 1)` of their gate g and their
      other factor u.
    swiglu_limit: with an alpha, the largest g, and the largest absolute value of u.
    sinks: each head has a learned score that takes part in its softmax, of no token.
    names: names of the tensors in Hugging Face files, a key of `weights.NAMES`.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tied: bool = True
  context: int = 2048
  rope_scaling: RopeScaling | None = None
  labels: int = 0
  biases: tuple[str, ...] = ()
  qk_norm: bool | Literal["all"] = False
  pre_norm: bool = True
  post_norm: bool = False
  norm_offset: float = 0.0
  activation: Literal["silu", "gelu_tanh"] = "silu"
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  hidden_divisor: float = 1.0
  attn_scale: float | None = None
  attn_softcap: float | None = None
  softcap: float | None = None
  window: int = 0
  local_layers: tuple[bool, ...] = ()
  local_rope_theta: float | None = None
  rotary: int = 0
  interleaved: bool = False
  unrotated_layers: tuple[bool, ...] = ()
  query_growth: float = 0.0
  clip_qkv: float | None = None
  experts: int = 0
  experts_per_token: int = 0
  router_normalized: bool = False
  swiglu_alpha: float = 0.0
  swiglu_limit: float = 0.0
  sinks: bool = False
  names: str = "llama"


MAX_LAYERS = 10_000
# Largest sizes of a model, far beyond any there is. A file with larger ones is damaged, and lists
# as long as its layers would fill the memory.
_LIMITS = {
  "vocab_size": 10**8, "width": 10**6, "layers": MAX_LAYERS, "heads": 10**5, "kv_heads": 10**5,
  "head_dim": 10**5, "mlp": 10**7, "labels": 10**6, "context": 10**9,
  "experts": 10**5,
}  # fmt: skip


_MAY_BE_ZERO = (
  "labels", "window", "norm_eps", "norm_offset", "rotary", "query_growth", "experts",
  "experts_per_token", "swiglu_alpha", "swiglu_limit",
  "rope_scaling.original",
)  # fmt: skip


def check_numbers(config: ModelConfig, where: str) -> None:
  """Checks the numbers of a config that was read from a file.

  Raises:
    ValueError: a number is not finite or out of range; the message names it and the file.
  """
  numbers = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  if s := config.rope_scaling:
    numbers |= {f"rope_scaling.{f.name}": getattr(s, f.name) for f in dataclasses.fields(s)}
  for name, value in numbers.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    positive = name not in _MAY_BE_ZERO
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
      limit = "a finite number above 0" if positive else "a finite number of at least 0"
      raise ValueError(f"{where}: {name} is {value}, it must be {limit}")
    if value > _LIMITS.get(name, math.inf):
      raise ValueError(f"{where}: {name} is {value:,}, it must be at most {_LIMITS[name]:,}")
  if config.heads % config.kv_heads or config.head_dim % 2:
    raise ValueError(
      f"{where}: the number of key-value heads, {config.kv_heads}, must divide that of heads, "
      f"{config.heads}, and the head size, {config.head_dim}, must be even"
    )
  for flags, what in (
    (config.local_layers, "local or global"),
    (config.unrotated_layers, "rotated or not"),
  ):
    if flags and len(flags) != config.layers:
      raise ValueError(f"{where}: {len(flags)} layers are named {what}, of {config.layers}")
  if config.experts and not 0 < config.experts_per_token <= config.experts:
    raise ValueError(
      f"{where}: {config.experts_per_token} experts per token, of {config.experts}; it must be at "
      "least 1 and at most their number"
    )
  if config.rotary % 2 or config.rotary > config.head_dim:
    raise ValueError(
      f"{where}: {config.rotary} dimensions of each head rotate; it must be an even number of at "
      f"most the head size, {config.head_dim}"
    )
  if config.query_growth and not (s and s.original):
    raise ValueError(
      f"{where}: queries that grow with their position, by {config.query_growth}, need a rope "
      f"scaling with an original context, got {s}"
    )
  if s and s.kind == "longrope":
    pairs = (config.rotary or config.head_dim) // 2
    for name, divisors in (("short_factor", s.short), ("long_factor", s.long)):
      if len(divisors) != pairs or not all(0 < d < math.inf for d in divisors):
        raise ValueError(
          f"{where}: {name} must be {pairs} finite numbers above 0, got {repr(divisors)[:80]}"
        )
  if (
    s
    and s.kind in ("llama3", "yarn")
    and (not s.original or s.low >= s.high or config.rope_theta <= 1)
  ):
    raise ValueError(
      f"{where}: the rope scaling {s} with rope_theta {config.rope_theta} must have original above "
      "0, low below high, and rope_theta above 1"
    )
