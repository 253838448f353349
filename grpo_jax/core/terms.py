"""What the loss of one token is made of: KL estimators, ratios, trust regions, corrections.

Each choice is one small function in the table of its kind, elementwise in the token axis (a
sequence-level ratio is spread over its tokens). They get arrays in which masked slots are already
replaced by 0 (`losses.policy_loss` does that), and never average.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.core.checks import as_float, check_shape

# exp is continued as a straight line above this, so that a log-ratio of 100 gives a large finite
# loss and gradient instead of an infinity. No ratio in a healthy run comes near e^20.
EXP_LIMIT = 20.0


def finite_exp(x: jax.Array) -> jax.Array:
  """`exp(x)`, continued linearly (same slope) above `EXP_LIMIT`."""
  return jnp.exp(jnp.minimum(x, EXP_LIMIT)) * (1.0 + jnp.maximum(x - EXP_LIMIT, 0.0))


def _expm1_minus(x: jax.Array) -> jax.Array:
  """`exp(x) - 1 - x` with little cancellation near 0, linear above `EXP_LIMIT`."""
  below = jnp.minimum(x, EXP_LIMIT)
  above = jnp.maximum(x - EXP_LIMIT, 0.0)
  return jnp.expm1(below) - below + jnp.expm1(EXP_LIMIT) * above


# --- KL to the reference -------------------------------------------------------------------------


def kl_k1(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
  """`k1 = logp - ref_logp`: unbiased for KL(policy || reference), but it can be negative.

  Belongs in the reward, not in the loss: on the policy's own samples the gradient of its mean is
  0 in expectation and does not look at the reference. Source: Schulman 2020,
  http://joschu.net/blog/kl-approx.html. Gradient to both arguments; nats.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k1(jnp.array(-1.0), jnp.array(-1.5))
    Array(0.5, dtype=float32)
  """
  logp, ref_logp = as_float("logp", logp), as_float("ref_logp", ref_logp)
  check_shape("ref_logp", ref_logp, logp.shape)
  return logp - ref_logp


def kl_k2(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
  """`k2 = (logp - ref_logp)^2 / 2`: biased as a value, its gradient is that of the KL.

  Sources: Schulman 2020 (value); arXiv 2510.01555 (gradient, on-policy). Nats.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k2(jnp.array(-1.0), jnp.array(-1.5))
    Array(0.125, dtype=float32)
  """
  return 0.5 * kl_k1(logp, ref_logp) ** 2


def kl_k3(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
  """`k3 = exp(-D) + D - 1` with `D = logp - ref_logp`: unbiased as a value and never negative.

  Source: Schulman 2020; DeepSeekMath, arXiv 2402.03300, eq. 4. As a loss its gradient per token
  is `1 - exp(-D)`, which is not the gradient of KL(policy || reference). For `-D > 20` the
  exponential goes on as a straight line, so value and gradient stay finite. Nats.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k3(jnp.array(-1.0), jnp.array(-1.5)).round(4)  # exp(-0.5) + 0.5 - 1
    Array(0.1065, dtype=float32)
  """
  return _expm1_minus(-kl_k1(logp, ref_logp))


def _kl_k3_k2_gradient(logp, ref_logp, ratio):
  """Value of k3, gradient of k2 (straight-through): finite-sample value, the KL's gradient."""
  k2 = kl_k2(logp, ref_logp)
  return jax.lax.stop_gradient(kl_k3(logp, ref_logp)) + k2 - jax.lax.stop_gradient(k2)


# name -> f(logp, ref_logp, ratio) with `ratio` the per-token importance ratio, differentiable.
KLS: dict[str, Callable] = {
  "none": lambda logp, ref_logp, ratio: jnp.zeros_like(logp),
  "k1": lambda logp, ref_logp, ratio: kl_k1(logp, ref_logp),
  "k2": lambda logp, ref_logp, ratio: kl_k2(logp, ref_logp),
  "k3": lambda logp, ref_logp, ratio: kl_k3(logp, ref_logp),
  "k3_k2_gradient": _kl_k3_k2_gradient,
  # DeepSeek-V3.2, arXiv 2512.02556: corrects k3 for off-policy samples; on-policy its gradient is
  # that of the KL.
  "k3_ratio": lambda logp, ref_logp, ratio: kl_k3(logp, ref_logp) * ratio,
}


# --- ratio level ---------------------------------------------------------------------------------


def _token_log_ratio(logp, old_logp, mask):
  """`logp - old_logp` per token: PPO, GRPO."""
  return logp - old_logp


def _sequence_log_ratio(logp, old_logp, mask):
  """Mean of the token log-ratios, one per sequence: GSPO, arXiv 2507.18071, eq. 7."""
  lengths = jnp.maximum(mask.sum(-1, keepdims=True), 1)
  mean = jnp.sum(logp - old_logp, -1, keepdims=True) / lengths
  return jnp.broadcast_to(mean, logp.shape)


def _sequence_token_log_ratio(logp, old_logp, mask):
  """Value of the sequence ratio, gradient of the token: GSPO-token, arXiv 2507.18071, eq. 14."""
  sequence = jax.lax.stop_gradient(_sequence_log_ratio(logp, old_logp, mask))
  return sequence + logp - jax.lax.stop_gradient(logp)


RATIOS: dict[str, Callable] = {
  "token": _token_log_ratio,
  "sequence": _sequence_log_ratio,
  "sequence_token": _sequence_token_log_ratio,
}


# --- trust region --------------------------------------------------------------------------------
# Each takes (log_ratio, logp, old_logp, advantages) and its own keyword-only settings, which are
# fields of `Algorithm`. Each returns the objective to maximize and where the region binds, split
# into too low and too high: a ratio that has left the region in the direction of its advantage.


def _no_region(log_ratio, logp, old_logp, advantages):
  """`ratio * A`: the importance-weighted policy gradient; REINFORCE when on-policy."""
  never = jnp.zeros(log_ratio.shape, bool)
  return finite_exp(log_ratio) * advantages, never, never


def _clip(log_ratio, logp, old_logp, advantages, *, clip_low, clip_high):
  """`min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`: PPO, arXiv 1707.06347, eq. 7."""
  ratio = finite_exp(log_ratio)
  low = (ratio < 1.0 - clip_low) & (advantages < 0)
  high = (ratio > 1.0 + clip_high) & (advantages > 0)
  # The minimum, spelt out by the sign of A: a ratio on the boundary keeps its whole gradient,
  # where minimum and clip would split it.
  bounded = jnp.where(low, 1.0 - clip_low, jnp.where(high, 1.0 + clip_high, ratio))
  return bounded * advantages, low, high


def _dual_clip(log_ratio, logp, old_logp, advantages, *, clip_low, clip_high, clip_dual):
  """PPO's clip, and `clip_dual * A` at least where A < 0: arXiv 1912.09729, eq. 5."""
  objective, low, high = _clip(
    log_ratio, logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high
  )
  floor = jnp.where(advantages < 0, clip_dual * advantages, -jnp.inf)
  return jnp.maximum(objective, floor), low, high


def _cispo(log_ratio, logp, old_logp, advantages, *, ratio_min, ratio_max):
  """`stop_grad(clip(ratio, ratio_min, ratio_max)) * A * logp`: CISPO, arXiv 2506.13585, eq. 4.

  The bounds are absolute ratios, not distances from 1. Every token keeps a gradient.
  """
  ratio = jax.lax.stop_gradient(finite_exp(log_ratio))
  low, high = (ratio < ratio_min) & (advantages < 0), (ratio > ratio_max) & (advantages > 0)
  return jnp.clip(ratio, ratio_min, ratio_max) * advantages * logp, low, high


def _sapo(log_ratio, logp, old_logp, advantages, *, tau_positive, tau_negative):
  """`(4 / tau) * sigmoid(tau (ratio - 1)) * A`, tau by the sign of A: SAPO, arXiv 2511.20347."""
  tau = jnp.where(advantages > 0, tau_positive, tau_negative)
  gate = 4.0 / tau * jax.nn.sigmoid(tau * (finite_exp(log_ratio) - 1.0))
  never = jnp.zeros(log_ratio.shape, bool)
  return gate * advantages, never, never


def _dppo(log_ratio, logp, old_logp, advantages, *, divergence, ratio_max):
  """`keep * stop_grad(min(ratio, ratio_max)) * A * logp`: DPPO-TV, arXiv 2602.04879.

  A token is dropped when its probability has already moved by more than `divergence` in the
  direction of its advantage: probabilities are compared, not ratios, so that rare tokens are
  not clipped for moving a negligible mass.
  """
  moved = jnp.exp(logp) - jnp.exp(old_logp)
  low = (moved < -divergence) & (advantages < 0)
  high = (moved > divergence) & (advantages > 0)
  ratio = jnp.minimum(jax.lax.stop_gradient(finite_exp(log_ratio)), ratio_max)
  return jnp.where(low | high, 0.0, ratio * advantages * logp), low, high


TRUST_REGIONS: dict[str, Callable] = {
  "none": _no_region,
  "clip": _clip,
  "dual_clip": _dual_clip,
  "cispo": _cispo,
  "sapo": _sapo,
  "dppo_tv": _dppo,
}


# --- sampler correction --------------------------------------------------------------------------
# Where the sampler's probabilities differ from the trainer's: weights for the objective, from the
# log-ratio trainer (before this update) minus sampler. They carry no gradient.


def _no_correction(log_ratio, mask):
  """The two distributions are taken to be the same."""
  return jnp.ones_like(log_ratio)


def _token_truncate(log_ratio, mask, *, correction_max):
  """`min(ratio, correction_max)` per token: truncated importance sampling (TIS)."""
  return jnp.minimum(finite_exp(log_ratio), correction_max)


def _token_mask(log_ratio, mask, *, correction_min, correction_max):
  """`ratio`, and 0 where it lies outside [correction_min, correction_max]: IcePop."""
  ratio = finite_exp(log_ratio)
  return jnp.where((ratio < correction_min) | (ratio > correction_max), 0.0, ratio)


def _sequence_mask(log_ratio, mask, *, correction_min, correction_max):
  """As `token_mask`, with one ratio for the whole sequence (the product over its tokens)."""
  total = jnp.sum(log_ratio, -1, keepdims=True)
  weight = _token_mask(total, mask, correction_min=correction_min, correction_max=correction_max)
  return jnp.broadcast_to(weight, log_ratio.shape)


CORRECTIONS: dict[str, Callable] = {
  "none": _no_correction,
  "token_truncate": _token_truncate,
  "token_mask": _token_mask,
  "sequence_mask": _sequence_mask,
}
