"""Estimators of the KL divergence from the policy to the reference, one value per token.

Each function takes `(logp, ref_logp, ratio)`: the log-probabilities of the drawn tokens under the
policy and the reference, in nats, and the ratio of the policy to the old policy that drew them.
Only `kl_k3_ratio` uses the ratio; the others ignore it, so that all are called alike. Gradient
flows to every argument that is used. With `D = logp - ref_logp`:

| name             | value             | gradient in `logp`, as a loss                           |
|------------------|-------------------|---------------------------------------------------------|
| `k1`             | `D`               | 1                                                       |
| `k2`             | `D^2 / 2`         | `D`: on-policy that of KL(policy, reference)            |
| `k3`             | `exp(-D) + D - 1` | `1 - exp(-D)`: on-policy that of KL(reference, policy)  |
| `k3_k2_gradient` | that of `k3`      | that of `k2`                                            |
| `k3_ratio`       | `k3 * ratio`      | that of KL(policy, reference), also off-policy          |

`docs/estimators.md` gives the bias of each, computed exactly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.core.checks import Array, as_float, check_shape
from grpo_jax.core.ratios import EXP_LIMIT


def _expm1_minus(x: jax.Array) -> jax.Array:
  """Returns `exp(x) - 1 - x` with little cancellation near 0, linear above `EXP_LIMIT`."""
  below = jnp.minimum(x, EXP_LIMIT)
  above = jnp.maximum(x - EXP_LIMIT, 0.0)
  return jnp.expm1(below) - below + jnp.expm1(EXP_LIMIT) * above


def no_kl(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"] | None = None
) -> Float[Array, "*S"]:
  """Returns 0 for every token.

  Example:
    >>> import jax.numpy as jnp
    >>> no_kl(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [0.0]
  """
  return jnp.zeros_like(logp)


def kl_k1(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"] | None = None
) -> Float[Array, "*S"]:
  """Returns `k1 = logp - ref_logp`: unbiased for KL(policy || reference), but it can be negative.

  It belongs in the reward, not in the loss: on the policy's own samples the expected gradient of
  its mean is 0 and does not depend on the reference.

  References:
    Schulman 2020, http://joschu.net/blog/kl-approx.html.

  Raises:
    ValueError: the shapes differ, or an argument does not hold real numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k1(jnp.array(-1.0), jnp.array(-1.5))
    Array(0.5, dtype=float32)
  """
  logp, ref_logp = as_float("logp", logp), as_float("ref_logp", ref_logp)
  check_shape("ref_logp", ref_logp, logp.shape)
  return logp - ref_logp


def kl_k2(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"] | None = None
) -> Float[Array, "*S"]:
  """Returns `k2 = (logp - ref_logp)^2 / 2`: a biased value whose gradient is that of the KL.

  References:
    Schulman 2020 for the value; arXiv 2510.01555 for the gradient, on-policy.

  Raises:
    ValueError: the shapes differ, or an argument does not hold real numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k2(jnp.array(-1.0), jnp.array(-1.5))
    Array(0.125, dtype=float32)
  """
  return 0.5 * kl_k1(logp, ref_logp) ** 2


def kl_k3(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"] | None = None
) -> Float[Array, "*S"]:
  """Returns `k3 = exp(-D) + D - 1` with `D = logp - ref_logp`: unbiased and never negative.

  As a loss its gradient per token is `1 - exp(-D)`, which is not the gradient of
  KL(policy || reference). For `-D > 20` the exponential continues as a straight line, so that
  value and gradient stay finite.

  References:
    Schulman 2020; DeepSeekMath, arXiv 2402.03300, eq. 4.

  Raises:
    ValueError: the shapes differ, or an argument does not hold real numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k3(jnp.array(-1.0), jnp.array(-1.5)).round(4)  # exp(-0.5) + 0.5 - 1
    Array(0.1065, dtype=float32)
  """
  return _expm1_minus(-kl_k1(logp, ref_logp))


def kl_k3_k2_gradient(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"] | None = None
) -> Float[Array, "*S"]:
  """Returns the value of k3 with the gradient of k2 (straight-through).

  The value is unbiased and never negative, and the on-policy gradient is that of
  KL(policy || reference).

  Raises:
    ValueError: the shapes differ, or an argument does not hold real numbers.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> float(jax.grad(kl_k3_k2_gradient)(jnp.array(-1.0), jnp.array(-1.5)))  # D; k3 has 0.39
    0.5
  """
  k2 = kl_k2(logp, ref_logp)
  return jax.lax.stop_gradient(kl_k3(logp, ref_logp)) + k2 - jax.lax.stop_gradient(k2)


def kl_k3_ratio(
  logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"], ratio: Float[Array, "*S"]
) -> Float[Array, "*S"]:
  """Returns `k3 * ratio`, which corrects k3 for tokens that an old policy drew.

  With a differentiable `ratio = exp(logp - old_logp)` value and gradient are those of
  KL(policy || reference) in expectation, also after updates.

  Args:
    ratio: probability under the policy over that under the old policy, per token.

  References:
    DeepSeek-V3.2, arXiv 2512.02556.

  Raises:
    ValueError: the shapes differ, or an argument does not hold real numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> kl_k3_ratio(jnp.array(-1.0), jnp.array(-1.5), jnp.array(2.0)).round(4)
    Array(0.2131, dtype=float32)
  """
  return kl_k3(logp, ref_logp) * ratio


KLS: dict[str, Callable] = {
  "none": no_kl,
  "k1": kl_k1,
  "k2": kl_k2,
  "k3": kl_k3,
  "k3_k2_gradient": kl_k3_k2_gradient,
  "k3_ratio": kl_k3_ratio,
}
