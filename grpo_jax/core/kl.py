"""KL estimators of one token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.core.checks import as_float, check_shape
from grpo_jax.core.ratios import EXP_LIMIT


def _expm1_minus(x: jax.Array) -> jax.Array:
  """`exp(x) - 1 - x` with little cancellation near 0, linear above `EXP_LIMIT`."""
  below = jnp.minimum(x, EXP_LIMIT)
  above = jnp.maximum(x - EXP_LIMIT, 0.0)
  return jnp.expm1(below) - below + jnp.expm1(EXP_LIMIT) * above


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
