"""Computes the loss of a reward model on preference pairs."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from grpo_jax.core.checks import Array, as_float, check_shape
from grpo_jax.core.masks import masked_mean


def preference_loss(
  chosen: Float[Array, "..."],
  rejected: Float[Array, "..."],
  *,
  margin: Float[Array, "..."] | None = None,
  center: float = 0.0,
  weights: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """Returns `sum_i w_i (-log sigmoid(d_i) + center (c_i + r_i)^2)`, `d = c - r - m`, and metrics.

  The first term is the negative log-likelihood, in nats, that the chosen text c beats the rejected
  text r by the model of Bradley and Terry. It depends on differences of rewards only; the second
  term keeps the sum of the two near 0. The gradient of c is `w (sigmoid(d) - 1 + 2 center (c + r))`
  and that of r is `w (1 - sigmoid(d) + 2 center (c + r))`. Nothing else receives gradient.

  Args:
    chosen, rejected: rewards of the two texts of each pair, in reward units.
    margin: difference that the rewards of a pair should have at least, in reward units, such as how
      much better people found the chosen text; None is 0.
    center: coefficient of the second term, at least 0.
    weights: weight of each pair, 1 / (pairs of the whole global batch); None = 1 / (pairs of this
      batch). Losses of micro-batches then add up to that of the batch. A pair of weight 0 is
      padding: its other entries may hold anything.

  Returns:
    (loss, metrics), all scalars: `accuracy` (share of pairs with c > r; a tie counts half),
    `margin` (mean of c - r) and `mean_reward` (mean of c and r), means over the pairs whose weight
    is not 0.

  References:
    Bradley and Terry 1952, "Rank analysis of incomplete block designs"; as a loss, Ouyang et al.
    2022, arXiv 2203.02155, eq. 1. Margin: Llama 2, arXiv 2307.09288, eq. 2. Centering: Eisenstein
    et al. 2023, arXiv 2312.09244.

  Raises:
    ValueError: a shape or dtype does not fit, or `center` is below 0 or not finite.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> chosen, rejected = jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0])
    >>> loss, metrics = preference_loss(chosen, rejected, margin=jnp.array([2.0, 0.0]))
    >>> round(float(loss), 4), float(metrics["accuracy"]), float(metrics["margin"])
    (0.6931, 0.75, 1.0)
    >>> jax.grad(lambda c: preference_loss(c, rejected)[0])(jnp.zeros(2)).tolist()
    [-0.25, -0.25]
  """
  if isinstance(center, int | float | np.number) and not (np.isfinite(center) and center >= 0):
    raise ValueError(f"center must be a finite number of at least 0, got {center}")
  chosen = as_float("chosen", chosen)
  rejected = as_float("rejected", rejected)
  check_shape("rejected", rejected, chosen.shape)

  def constant(name: str, value: Array | float) -> jax.Array:
    value = as_float(name, value)
    check_shape(name, value, chosen.shape)
    return jax.lax.stop_gradient(value)

  weights = jnp.full(chosen.shape, 1 / max(chosen.size, 1)) if weights is None else weights
  weights = constant("weights", weights)
  real = weights != 0
  margin = 0.0 if margin is None else jnp.where(real, constant("margin", margin), 0.0)
  chosen, rejected = (jnp.where(real, rewards, 0.0) for rewards in (chosen, rejected))
  losses = jax.nn.softplus(rejected - chosen + margin) + center * (chosen + rejected) ** 2
  loss = jnp.sum(jnp.where(real, weights * losses, 0.0))
  chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
  metrics = {
    "accuracy": masked_mean((jnp.sign(chosen - rejected) + 1) / 2, real),
    "margin": masked_mean(chosen - rejected, real),
    "mean_reward": masked_mean((chosen + rejected) / 2, real),
  }
  return loss, metrics
