"""Computes importance ratios of the current policy to an earlier one, as logarithms.

Each function of `RATIOS` takes `(logp, old_logp, mask)` and returns one log-ratio per token; a
ratio of whole sequences is repeated over their tokens. Masked slots of `logp` and `old_logp` must
hold 0, which `policy_loss` sees to. Gradient flows to `logp`. Nats.

The earlier policy is the anchor: ratios and trust regions compare with it. Each function of
`ANCHORS` takes `(old_logp, sampler_logp)` and returns the log-probabilities of the anchor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array

# Above this, exp continues as a straight line: a log-ratio of 100 gives a large finite loss and
# gradient instead of an infinity. No ratio of a healthy run comes near e^20.
EXP_LIMIT = 20.0


def finite_exp(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
  """Returns `exp(x)`, continued as a straight line of the same slope above `EXP_LIMIT`.

  Example:
    >>> import jax.numpy as jnp
    >>> finite_exp(jnp.array([0.0, 1.0, 1000.0])).round(2).tolist()  # 981 e^20
    [1.0, 2.72..., 475947...]
  """
  return jnp.exp(jnp.minimum(x, EXP_LIMIT)) * (1.0 + jnp.maximum(x - EXP_LIMIT, 0.0))


def token_log_ratio(
  logp: Float[Array, "*B T"], old_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns `logp - old_logp`: one ratio per token.

  References:
    PPO, arXiv 1707.06347, eq. 6; GRPO (DeepSeekMath), arXiv 2402.03300, eq. 3.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([True, True, True])
    >>> token_log_ratio(jnp.array([-1.0, -1.0, -4.0]), jnp.full(3, -2.0), mask).tolist()
    [1.0, 1.0, -2.0]
  """
  return logp - old_logp


def sequence_log_ratio(
  logp: Float[Array, "*B T"], old_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns `sum_t (logp - old_logp) / |o|`, the mean log-ratio of each sequence.

  Its exponential is the geometric mean of the token ratios. The gradient of a token is 1 / |o| of
  the sum of the cotangents of its sequence.

  References:
    GSPO, arXiv 2507.18071, eq. 7.

  Example:
    >>> import jax.numpy as jnp
    >>> logp, old_logp = jnp.array([-1.0, -4.0, 0.0]), jnp.array([-2.0, -2.0, 0.0])
    >>> sequence_log_ratio(logp, old_logp, jnp.array([True, True, False])).tolist()
    [-0.5, -0.5, -0.5]
  """
  lengths = jnp.maximum(mask.sum(-1, keepdims=True), 1)
  mean = jnp.sum(logp - old_logp, -1, keepdims=True) / lengths
  return jnp.broadcast_to(mean, logp.shape)


def sequence_token_log_ratio(
  logp: Float[Array, "*B T"], old_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns the value of `sequence_log_ratio` with the gradient of `token_log_ratio`.

  It lets the tokens of a sequence have different advantages.

  References:
    GSPO-token, arXiv 2507.18071, eq. 14.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> logp, old_logp = jnp.array([-1.0, -4.0]), jnp.array([-2.0, -2.0])
    >>> loss = lambda logp: sequence_token_log_ratio(logp, old_logp, jnp.ones(2, bool)).sum()
    >>> jax.value_and_grad(loss)(logp)
    (Array(-1., dtype=float32), Array([1., 1.], dtype=float32))
  """
  sequence = jax.lax.stop_gradient(sequence_log_ratio(logp, old_logp, mask))
  return sequence + logp - jax.lax.stop_gradient(logp)


def old_anchor(
  old_logp: Float[Array, "*B T"], sampler_logp: Float[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns `old_logp`: the trainer's policy before this batch's updates.

  With one update per rollout that is the current policy, so every ratio is 1 and no trust region
  binds.

  References:
    PPO, arXiv 1707.06347, eq. 6.

  Example:
    >>> import jax.numpy as jnp
    >>> old_anchor(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [-1.0]
  """
  return old_logp


def sampler_anchor(
  old_logp: Float[Array, "*B T"], sampler_logp: Float[Array, "*B T"]
) -> Float[Array, "*B T"]:
  """Returns `sampler_logp`: the policy that drew the tokens, as the sampler recorded it.

  The ratio then also makes up for a sampler that differs from the trainer, a trust region bounds
  that difference too, and several updates need no pass that computes `old_logp`.

  References:
    DPPO, arXiv 2602.04879, section 5.2.

  Example:
    >>> import jax.numpy as jnp
    >>> sampler_anchor(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [-1.5]
  """
  return sampler_logp


ANCHORS: dict[str, Callable] = {"old": old_anchor, "sampler": sampler_anchor}
RATIOS: dict[str, Callable] = {
  "token": token_log_ratio,
  "sequence": sequence_log_ratio,
  "sequence_token": sequence_token_log_ratio,
}
