"""Bounds the objective of each token where the policy has moved too far: trust regions.

Each function takes `(log_ratio, logp, old_logp, advantages)`, all `[..., T]` and 0 where masked,
and keyword-only settings, which are fields of `Algorithm`. It returns `(objective, low, high)`:

- `objective`: the quantity to maximize, before correction and averaging. Gradient flows to
  `log_ratio` and `logp`.
- `low`: true where a lower bound keeps the gradient in `logp` from being `ratio * A`.
- `high`: true where an upper bound does.

A bound counts where it is in force, whatever the sign of A: the floor of `dual_clip` and the caps
of `cispo` and `dppo_tv` bind for negative advantages too. Nothing counts where A is 0, and the
smooth gate of `sapo` has no bounds. No token is both. The two only feed the metrics `clip_ratio/*`,
shares of the completion tokens: `low_mean`, `high_mean`, and `region_mean` for either.

- `clip` low: A < 0 and ratio < 1 - clip_low. High: A > 0 and ratio > 1 + clip_high.
- `dual_clip` low: as `clip`. High: as `clip`, or A < 0 and ratio > clip_dual.
- `cispo` low: ratio < ratio_min. High: ratio > ratio_max.
- `dppo_tv` low: A < 0 and the probability fell by more than `divergence`. High: A > 0 and it rose
  by more than that, or the ratio is above `ratio_max`.

Below, `ratio = exp(log_ratio)`, which continues as a straight line above e^20 (`finite_exp`), and
`A` is the advantage.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array
from grpo_jax.core.ratios import finite_exp

Bounded = tuple[Float[Array, "*B T"], Bool[Array, "*B T"], Bool[Array, "*B T"]]


def no_trust_region(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
) -> Bounded:
  """Returns `ratio * A`, the importance-weighted policy gradient; it never binds.

  Its gradient in `logp` is `ratio * A`; on-policy, where the ratio is 1, that is REINFORCE.

  References:
    Williams 1992.

  Example:
    >>> import jax.numpy as jnp
    >>> ratio, a = jnp.array([0.5, 1.0, 2.0]), jnp.ones(3)
    >>> objective, low, high = no_trust_region(jnp.log(ratio), jnp.log(ratio), jnp.zeros(3), a)
    >>> print(objective, high)
    [0.5 1.  2. ] [False False False]
  """
  never = jnp.zeros(log_ratio.shape, bool)
  return finite_exp(log_ratio) * advantages, never, never


def clip(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
  *,
  clip_low: float,
  clip_high: float,
) -> Bounded:
  """Returns `min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`.

  The gradient in `logp` is `ratio * A` inside the region and 0 where it binds.

  Args:
    clip_low: distance of the lower bound from 1, for negative advantages.
    clip_high: distance of the upper bound from 1, for positive advantages.

  References:
    PPO, arXiv 1707.06347, eq. 7; two distances: DAPO, arXiv 2503.14476, eq. 8.

  Example:
    >>> import jax.numpy as jnp
    >>> ratio, a = jnp.array([0.5, 1.0, 2.0]), jnp.ones(3)
    >>> objective, low, high = clip(
    ...   jnp.log(ratio), jnp.log(ratio), jnp.zeros(3), a, clip_low=0.25, clip_high=0.25
    ... )
    >>> print(objective, high)
    [0.5  1.   1.25] [False False  True]
  """
  ratio = finite_exp(log_ratio)
  low = (ratio < 1.0 - clip_low) & (advantages < 0)
  high = (ratio > 1.0 + clip_high) & (advantages > 0)
  # The minimum is spelled out by the sign of A, so that a ratio on the bound keeps its whole
  # gradient: `minimum` and `clip` would split it between equal branches.
  bounded = jnp.where(low, 1.0 - clip_low, jnp.where(high, 1.0 + clip_high, ratio))
  return bounded * advantages, low, high


def dual_clip(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
  *,
  clip_low: float,
  clip_high: float,
  clip_dual: float,
) -> Bounded:
  """Returns `clip`, but at least `clip_dual * A` where A < 0.

  A token with a negative advantage and a ratio above `clip_dual` gets no gradient.

  Args:
    clip_low: distance of the lower bound from 1, for negative advantages.
    clip_high: distance of the upper bound from 1, for positive advantages.
    clip_dual: largest ratio that counts where the advantage is negative, above 1.

  References:
    Dual-clip PPO, arXiv 1912.09729, eq. 5.

  Example:
    >>> import jax.numpy as jnp
    >>> ratio, a = jnp.array([0.5, 2.0, 8.0]), -jnp.ones(3)
    >>> objective, low, high = dual_clip(
    ...   jnp.log(ratio), jnp.log(ratio), jnp.zeros(3), a,
    ...   clip_low=0.25, clip_high=0.25, clip_dual=3.0,
    ... )
    >>> print(objective, low, high)
    [-0.75 -2.   -3.  ] [ True False False] [False False  True]
  """
  objective, low, high = clip(
    log_ratio, logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high
  )
  # Spelled out for the same reason as in `clip`.
  floor = (finite_exp(log_ratio) > clip_dual) & (advantages < 0)
  return jnp.where(floor, clip_dual * advantages, objective), low, high | floor


def cispo(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
  *,
  ratio_min: float,
  ratio_max: float,
) -> Bounded:
  """Returns `stop_gradient(clip(ratio, ratio_min, ratio_max)) * A * logp`.

  The gradient in `logp` is the clipped ratio times A: every token keeps one.

  Args:
    ratio_min: smallest weight. An absolute ratio, not a distance from 1.
    ratio_max: largest weight. An absolute ratio, not a distance from 1.

  References:
    CISPO (MiniMax-M1), arXiv 2506.13585, eq. 4.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> logp, a = jnp.log(jnp.array([0.5, 1.0, 2.0])), jnp.ones(3)
    >>> loss = lambda x: cispo(x, x, jnp.zeros(3), a, ratio_min=0.0, ratio_max=1.5)[0].sum()
    >>> print(jax.grad(loss)(logp))
    [0.5 1.  1.5]
  """
  ratio = jax.lax.stop_gradient(finite_exp(log_ratio))
  low, high = (ratio < ratio_min) & (advantages != 0), (ratio > ratio_max) & (advantages != 0)
  return jnp.clip(ratio, ratio_min, ratio_max) * advantages * logp, low, high


def sapo(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
  *,
  tau_positive: float,
  tau_negative: float,
) -> Bounded:
  """Returns `(4 / tau) * sigmoid(tau (ratio - 1)) * A`, with tau by the sign of A.

  A smooth gate replaces the bounds, so `low` and `high` are false everywhere. The gradient in
  `logp` is `4 s (1 - s) ratio A` with `s = sigmoid(tau (ratio - 1))`: it is A at a ratio of 1 and
  vanishes far from it.

  Args:
    tau_positive: sharpness of the gate where A > 0.
    tau_negative: sharpness of the gate elsewhere.

  References:
    SAPO, arXiv 2511.20347.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> logp, a = jnp.log(jnp.array([0.5, 1.0, 20.0])), jnp.ones(3)
    >>> loss = lambda x: sapo(x, x, jnp.zeros(3), a, tau_positive=1.0, tau_negative=1.0)[0].sum()
    >>> print(jax.grad(loss)(logp).round(2))
    [0.47 1.   0.  ]
  """
  tau = jnp.where(advantages > 0, tau_positive, tau_negative)
  gate = 4.0 / tau * jax.nn.sigmoid(tau * (finite_exp(log_ratio) - 1.0))
  never = jnp.zeros(log_ratio.shape, bool)
  return gate * advantages, never, never


def dppo_tv(
  log_ratio: Float[Array, "*B T"],
  logp: Float[Array, "*B T"],
  old_logp: Float[Array, "*B T"],
  advantages: Float[Array, "*B T"],
  *,
  divergence: float,
  ratio_max: float,
) -> Bounded:
  """Returns `stop_gradient(min(ratio, ratio_max)) * A * logp`, and 0 where the region binds.

  The region binds where the probability of the token has moved by more than `divergence` in the
  direction of its advantage. It compares probabilities, not ratios, so a rare token is not clipped
  for moving a negligible mass. The gradient in `logp` is the bounded ratio times A, or 0.

  Args:
    divergence: largest change of a token's probability, in [0, 1].
    ratio_max: largest weight, an absolute ratio.

  References:
    DPPO with total variation, arXiv 2602.04879.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> logp, old, a = jnp.log(jnp.array([0.5, 0.1])), jnp.log(jnp.array([0.3, 0.01])), jnp.ones(2)
    >>> settings = {"divergence": 0.15, "ratio_max": 20.0}
    >>> loss = lambda x: dppo_tv(x - old, x, old, a, **settings)[0].sum()
    >>> print(jax.grad(loss)(logp).round(2))  # 0.5 - 0.3 is above 0.15; 0.1 / 0.01 is below 20
    [ 0. 10.]
  """
  change = jnp.exp(logp) - jnp.exp(old_logp)
  low = (change < -divergence) & (advantages < 0)
  high = (change > divergence) & (advantages > 0)
  ratio = jax.lax.stop_gradient(finite_exp(log_ratio))
  capped = (ratio > ratio_max) & (advantages != 0) & ~low
  objective = jnp.where(low | high, 0.0, jnp.minimum(ratio, ratio_max) * advantages * logp)
  return objective, low, high | capped


TRUST_REGIONS: dict[str, Callable] = {
  "none": no_trust_region,
  "clip": clip,
  "dual_clip": dual_clip,
  "cispo": cispo,
  "sapo": sapo,
  "dppo_tv": dppo_tv,
}
