"""Trust regions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.core.ratios import finite_exp

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
