"""Weights that correct for a sampler whose probabilities differ from the trainer's.

Each function takes `(log_ratio, mask)` and keyword-only settings, which are fields of `Algorithm`.
`log_ratio` is the log-probability of each drawn token under the trainer, before this update, minus
that under the sampler, in nats and 0 where masked. The weights `[..., T]` multiply the objective
and carry no gradient: `policy_loss` passes arrays without one.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array
from grpo_jax.core.ratios import finite_exp


def no_correction(
  log_ratio: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns weights of 1: sampler and trainer are taken to be the same policy.

  Example:
    >>> import jax.numpy as jnp
    >>> no_correction(jnp.log(jnp.array([0.5, 3.0])), jnp.ones(2, bool)).tolist()
    [1.0, 1.0]
  """
  return jnp.ones_like(log_ratio)


def token_truncate(
  log_ratio: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, correction_max: float
) -> Float[Array, "*B T"]:
  """Returns `min(ratio, correction_max)` per token: truncated importance sampling (TIS).

  References:
    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.

  Example:
    >>> import jax.numpy as jnp
    >>> log_ratio = jnp.log(jnp.array([0.5, 3.0]))
    >>> print(token_truncate(log_ratio, jnp.ones(2, bool), correction_max=2.0))
    [0.5 2. ]
  """
  return jnp.minimum(finite_exp(log_ratio), correction_max)


def token_mask(
  log_ratio: Float[Array, "*B T"],
  mask: Bool[Array, "*B T"],
  *,
  correction_min: float,
  correction_max: float,
) -> Float[Array, "*B T"]:
  """Returns `ratio` per token, and 0 where it lies outside [correction_min, correction_max].

  References:
    IcePop, arXiv 2510.18855.

  Example:
    >>> import jax.numpy as jnp
    >>> log_ratio, mask = jnp.log(jnp.array([0.25, 0.5, 3.0])), jnp.ones(3, bool)
    >>> print(token_mask(log_ratio, mask, correction_min=0.4, correction_max=2.0))
    [0.  0.5 0. ]
  """
  ratio = finite_exp(log_ratio)
  return jnp.where((ratio < correction_min) | (ratio > correction_max), 0.0, ratio)


def sequence_mask(
  log_ratio: Float[Array, "*B T"],
  mask: Bool[Array, "*B T"],
  *,
  correction_min: float,
  correction_max: float,
) -> Float[Array, "*B T"]:
  """Returns `token_mask` of one ratio per sequence, the product over its tokens.

  Example:
    >>> import jax.numpy as jnp
    >>> log_ratio, mask = jnp.log(jnp.array([[0.5, 2.0], [2.0, 2.0]])), jnp.ones((2, 2), bool)
    >>> print(sequence_mask(log_ratio, mask, correction_min=0.4, correction_max=3.0))
    [[1. 1.]
     [0. 0.]]
  """
  total = jnp.sum(log_ratio, -1, keepdims=True)
  weight = token_mask(total, mask, correction_min=correction_min, correction_max=correction_max)
  return jnp.broadcast_to(weight, log_ratio.shape)


CORRECTIONS: dict[str, Callable] = {
  "none": no_correction,
  "token_truncate": token_truncate,
  "token_mask": token_mask,
  "sequence_mask": sequence_mask,
}
