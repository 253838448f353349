"""Computes what a critic is for: advantages from values (GAE), and the loss that the critic learns.

The value of a token slot is the expected reward from that slot on, before its token is drawn: a
function of the prompt and of the tokens before it. Everything is `[..., T]`, usually `[P, G, T]`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import (
  Array,
  as_float,
  as_mask,
  check_positive,
  check_shape,
  check_share,
)
from grpo_jax.core.masks import count_tokens, masked_mean, token_weights


def gae(
  rewards: Float[Array, "... T"],
  values: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
  """Returns `A_t = d_t + gamma lam A_t+`, `d_t = r_t + gamma V_t+ - V_t`, and returns `A_t + V_t`.

  Here t+ is the next slot of the policy's own tokens: slots of padding and of observations between
  the turns of an episode are passed over. After the last own token, A and V are 0. A completion
  that was cut off by its budget counts as ended.

  With `gamma = lam = 1`, `A_t` is the sum of the rewards from t on, minus `V_t`. The value is then
  a baseline, and the expected update is the gradient of mean reward whatever the values are. A
  smaller `lam` has less variance, and is unbiased only if the values are exact. Neither result
  carries a gradient.

  Args:
    rewards: reward of each token, in reward units; that of a whole completion stands at its last
      token. NaN at a token of the policy means that the sequence was not scored: its advantages
      are 0 and its returns are its values. Masked slots may hold anything.
    values: value of each slot, in reward units.
    mask: true on the policy's own tokens.
    gamma: discount per token, in [0, 1].
    lam: weight of longer estimates, in [0, 1]. 0 trusts the next value, 1 trusts no value.

  Returns:
    (advantages, returns), both 0 where masked. Returns are the targets of `value_loss`.

  References:
    Schulman et al. 2016, arXiv 1506.02438, eq. 16.

  Raises:
    ValueError: a shape or dtype does not fit, or `gamma` or `lam` is outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> rewards, values = jnp.array([[0.0, 9.0, 1.0]]), jnp.array([[0.5, 9.0, 0.75]])
    >>> mask = jnp.array([[True, False, True]])  # the second token is an observation
    >>> advantages, returns = gae(rewards, values, mask, lam=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.375, 0.0, 0.25]], [[0.875, 0.0, 1.0]])
  """
  for name, value in (("gamma", gamma), ("lam", lam)):
    check_share(name, value)
  rewards, values = as_float("rewards", rewards), as_float("values", values)
  if values.ndim == 0:
    raise ValueError("values has shape (), expected at least one axis [..., T]")
  check_shape("rewards", rewards, values.shape)
  mask = as_mask("mask", mask, values.shape)
  scored = _scored(rewards, mask)
  own = mask & scored
  rewards = jax.lax.stop_gradient(jnp.where(own, rewards, 0.0))
  values = jax.lax.stop_gradient(jnp.where(mask, values, 0.0))
  delta = jnp.where(own, rewards + gamma * _next_own(values, mask) - values, 0.0)

  advantages = discounted_sum(delta, own, gamma * lam)
  advantages = jnp.where(own, advantages, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def discounted_sum(
  values: Float[Array, "... T"], mask: Bool[Array, "... T"], discount: float
) -> Float[Array, "... T"]:
  """Returns `S_t = values_t + discount S_t+`, where t+ is the next slot; a masked one is free.

  A masked slot hands on what comes after it, undiscounted, and its own value must be 0.

  Args:
    values: a number of each slot, 0 where masked.
    mask: true on the policy's own tokens.
    discount: per own token.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([True, False, True])
    >>> discounted_sum(jnp.array([1.0, 0.0, 2.0]), mask, 0.5).tolist()
    [2.0, 2.0, 2.0]
  """

  # Each slot is an affine map of what comes after it, and composing such maps is associative.
  def compose(later: tuple, earlier: tuple) -> tuple:
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

  factors = jnp.where(mask, jnp.asarray(discount, values.dtype), 1.0)
  pair = (factors, values)
  return jax.lax.associative_scan(compose, pair, reverse=True, axis=values.ndim - 1)[1]


def gae_advantages(
  rewards: Float[Array, "... T"],
  values: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> Float[Array, "... T"]:
  """Returns the advantages of `gae`, without the returns; arguments as there.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards, values = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5])
    >>> gae_advantages(rewards, values, jnp.array([1, 1]), lam=1).tolist()
    [0.5, 0.5]
  """
  return gae(rewards, values, mask, gamma=gamma, lam=lam)[0]


def gae_whitened(
  rewards: Float[Array, "... T"],
  values: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
  eps: float = 1e-8,
) -> Float[Array, "... T"]:
  """Returns `(A - mean) / (std + eps)` with the `A` of `gae`, over the scored tokens of the batch.

  The scale of the rewards then has no effect on the size of an update. Mean and standard deviation
  (with n - 1) are those of the whole batch, so whiten before cutting it into micro-batches.

  Args:
    rewards, values, mask, gamma, lam: as in `gae`.
    eps: number added to the standard deviation, in reward units.

  References:
    Implementation detail 7 of Huang et al. 2022, "The 37 implementation details of proximal policy
    optimization", there over mini-batches.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards, values = jnp.array([[3.0], [1.0]]), jnp.zeros((2, 1))
    >>> gae_whitened(rewards, values, jnp.ones((2, 1), bool)).round(3).tolist()
    [[0.7070000171661377], [-0.7070000171661377]]
  """
  advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
  mask = as_mask("mask", mask)
  own = mask & _scored(as_float("rewards", rewards), mask)
  centered = jnp.where(own, advantages - masked_mean(advantages, own), 0.0)
  variance = (centered**2).sum() / jnp.maximum(count_tokens(own) - 1, 1)
  return centered / (jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) + eps)


def returns_whitened(
  rewards: Float[Array, "... T"], mask: Bool[Array, "... T"], *, eps: float = 1e-8
) -> Float[Array, "... T"]:
  """Returns `(R - mean) / (std + eps)`, R the sum of the rewards from a token on, as REINFORCE++.

  It is `gae_whitened` without a critic, undiscounted: mean and standard deviation are those over
  the scored tokens of the whole batch. A KL term in the rewards is whitened with them.

  Args:
    rewards, mask, eps: as in `gae_whitened`.

  References:
    REINFORCE++, arXiv 2501.03262v9, section 3.2, with the KL penalty in the reward of each token.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards = jnp.array([[0.0, 3.0], [1.0, 0.0]])
    >>> mask = jnp.array([[True, True], [True, False]])  # returns 3, 3 and 1
    >>> print(returns_whitened(rewards, mask))
    [[ 0.57735...  0.57735...]
     [-1.15470...  0.       ]]
  """
  rewards = as_float("rewards", rewards)
  return gae_whitened(rewards, jnp.zeros_like(rewards), mask, lam=1.0, eps=eps)


def value_loss(
  values: Float[Array, "... T"],
  returns: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  old_values: Float[Array, "... T"] | None = None,
  clip: float | None = None,
  weights: Float[Array, "... T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """Returns `sum_t w_t max((V_t - R_t)^2, (clip(V_t) - R_t)^2) / 2`, and metrics.

  `clip(V)` is V held in [old V - clip, old V + clip]. Without `clip`, the loss is the plain squared
  error, and the gradient of a token is its weight times `V_t - R_t`. With it, a token has no
  gradient where V is outside the bounds and the clipped error is the larger one. Only `values`
  receives gradient.

  Args:
    values: values of the critic that is trained, in reward units.
    returns: their targets, from `gae`.
    mask: true on the policy's own tokens. Masked slots of every argument may hold anything.
    old_values: values before this batch's updates; needed with `clip`.
    clip: largest change of a value that counts, in reward units, above 0; None disables it.
    weights: weight of each token, from `token_weights` on the mask of the whole global batch. None
      = 1 / (tokens of this batch). Losses of micro-batches then add up to that of the batch.

  Returns:
    (loss, metrics), all scalars: `critic/values_mean`, `critic/error` (mean of |V - R|, in reward
    units) and `critic/clip_ratio` (fraction of tokens without gradient), means over tokens.

  References:
    The squared error of PPO, arXiv 1707.06347, eq. 9, with coefficient 1/2. The clipped form is
    that of its authors' code (baselines, `ppo2`), not in the paper.

  Raises:
    ValueError: a shape or dtype does not fit, `clip` is not above 0, or `clip` comes without
      `old_values`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> mask = jnp.array([[True, True, False]])
    >>> loss = lambda v: value_loss(v, jnp.array([[1.0, 0.0, 0.0]]), mask)[0]
    >>> jax.grad(loss)(jnp.array([[0.5, 0.5, jnp.nan]])).tolist()
    [[-0.25, 0.25, 0.0]]
  """
  values = as_float("values", values)
  if values.ndim == 0:
    raise ValueError("values has shape (), expected at least one axis [..., T]")
  mask = as_mask("mask", mask, values.shape)
  if clip is not None:
    check_positive("clip", clip)
    if old_values is None:
      raise ValueError(
        f"clip={clip} needs old_values, the values before this batch's updates; pass them, or "
        "leave out clip"
      )

  def clean(name: str, value: Array) -> jax.Array:
    value = as_float(name, value)
    check_shape(name, value, values.shape)
    return jax.lax.stop_gradient(jnp.where(mask, value, 0.0))

  returns = clean("returns", returns)
  weights = token_weights(mask, "token") if weights is None else clean("weights", weights)
  values = jnp.where(mask, values, 0.0)
  error = (values - returns) ** 2
  clipped = jnp.zeros_like(mask)
  if clip is not None:
    old = clean("old_values", old_values)
    held = jnp.clip(values, old - clip, old + clip)
    clipped = ((held - returns) ** 2 > error) & mask
    error = jnp.where(clipped, jax.lax.stop_gradient((held - returns) ** 2), error)
  loss = jnp.sum(jnp.where(mask, weights * error, 0.0)) / 2
  current = jax.lax.stop_gradient(values)
  metrics = {
    "critic/values_mean": masked_mean(current, mask),
    "critic/error": masked_mean(jnp.abs(current - returns), mask),
    "critic/clip_ratio": masked_mean(clipped, mask),
  }
  return loss, metrics


def _scored(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns whether each sequence was scored: no NaN or infinity at its own tokens, [..., 1]."""
  return (jnp.isfinite(rewards) | ~mask).all(-1, keepdims=True)


def _next_own(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the value of the next own slot after each slot, 0 where there is none."""
  length = mask.shape[-1]
  slots = jnp.where(mask, jnp.arange(length), length)
  at_or_after = jax.lax.cummin(slots, axis=slots.ndim - 1, reverse=True)
  padding = [(0, 0)] * (values.ndim - 1) + [(0, 1)]
  after = jnp.pad(at_or_after[..., 1:], padding, constant_values=length)
  return jnp.take_along_axis(jnp.pad(values, padding), after, axis=-1)
