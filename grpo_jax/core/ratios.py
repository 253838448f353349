"""Importance ratios."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# exp is continued as a straight line above this, so that a log-ratio of 100 gives a large finite
# loss and gradient instead of an infinity. No ratio in a healthy run comes near e^20.
EXP_LIMIT = 20.0


def finite_exp(x: jax.Array) -> jax.Array:
  """`exp(x)`, continued linearly (same slope) above `EXP_LIMIT`."""
  return jnp.exp(jnp.minimum(x, EXP_LIMIT)) * (1.0 + jnp.maximum(x - EXP_LIMIT, 0.0))


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
