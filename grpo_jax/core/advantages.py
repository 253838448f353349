"""Advantages: what a completion's reward says relative to its group.

Rewards are `[P, G]`: G completions for each of P prompts. Rules that hold for every function:

- A reward that is not finite (NaN above all) means "not scored": it is left out of the
  statistics and its advantage is 0.
- A group whose scored rewards are all equal gets exactly 0.0. Rewards are first taken relative
  to the smallest of their group, so equal rewards differ by exactly 0 and no rounding noise is
  left for a small standard deviation to blow up; it also keeps precision under large offsets.
- Arrays in, arrays out, float32 or wider; nothing here carries a gradient to the policy.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array, as_float, as_mask, as_tokens, check_rank, check_shape


def _rewards(rewards: Array) -> tuple[jax.Array, jax.Array]:
  """Rewards with 0 where not scored, and where they are scored."""
  rewards = as_float("rewards", rewards)
  check_rank("rewards", rewards, 2, "P, G: prompts, completions per prompt")
  scored = jnp.isfinite(rewards)
  return jnp.where(scored, rewards, 0.0), scored


def _center(x: jax.Array, where: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
  """`x` minus its mean over `axis`; exactly 0 where all are equal, and where not `where`."""
  count = jnp.maximum(where.sum(axis, keepdims=True), 1)
  lowest = jnp.min(x, axis, keepdims=True, where=where, initial=jnp.inf)
  x = jnp.where(where, x - lowest, 0.0)
  mean = x.sum(axis, keepdims=True) / count
  return jnp.where(where, x - mean, 0.0)


def _std(
  centered: jax.Array, where: jax.Array, axis: int | tuple[int, ...] | None, ddof: int
) -> jax.Array:
  """Standard deviation of already centered values, as a divisor: 1 where all of them are 0."""
  count = where.sum(axis, keepdims=True)
  variance = (centered**2).sum(axis, keepdims=True) / jnp.maximum(count - ddof, 1)
  return jnp.sqrt(jnp.where(variance > 0, variance, 1.0))


def group_normalized(
  rewards: Float[Array, "P G"], *, eps: float = 1e-4, ddof: int = 1
) -> Float[Array, "P G"]:
  """`A = (r - mean) / (std + eps)` within the group: GRPO.

  Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2. The paper leaves `eps` and `ddof` open;
  the defaults are those in widest use. Dividing by the group's own spread weights easy and hard
  prompts up, so the expected update is not the gradient of mean reward (see `group_centered`).

  Args:
    rewards: reward units; NaN = not scored.
    eps: added to the standard deviation, reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.

  Example:
    >>> import jax.numpy as jnp
    >>> print(group_normalized(jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])))
    [[ 0.8658754 -0.8658754 -0.8658754  0.8658754]
     [ 0.         0.         0.         0.       ]]
  """
  rewards, scored = _rewards(rewards)
  centered = _center(rewards, scored, -1)
  return centered / (_std(centered, scored, -1, ddof) + eps)


def group_centered(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """`A = r - mean` within the group: Dr. GRPO, arXiv 2503.20783, section 3.

  Its expected update is the gradient of mean reward times (n - 1) / n, because the mean
  includes the completion's own reward; `leave_one_out` removes that factor.

  Example:
    >>> import jax.numpy as jnp
    >>> print(group_centered(jnp.array([[3.0, 0.0, 0.0, jnp.nan]])))
    [[ 2. -1. -1.  0.]]
  """
  rewards, scored = _rewards(rewards)
  return _center(rewards, scored, -1)


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """`A_i = r_i - mean of the others` = `(r_i - mean) · n / (n - 1)`: RLOO, unbiased.

  Source: arXiv 2402.14740, eq. 8. A completion that is alone in its group gets 0.

  Example:
    >>> import jax.numpy as jnp
    >>> print(leave_one_out(jnp.array([[3.0, 0.0, 0.0]])))
    [[ 3.  -1.5 -1.5]]
  """
  rewards, scored = _rewards(rewards)
  count = scored.sum(-1, keepdims=True)
  return _center(rewards, scored, -1) * (count / jnp.maximum(count - 1, 1))


def batch_normalized(
  rewards: Float[Array, "P G"], *, eps: float = 1e-4, ddof: int = 1
) -> Float[Array, "P G"]:
  """`A = (r - group mean) / (std of the batch's rewards + eps)`: Lite PPO.

  Source: arXiv 2508.08221, section 4: one scale for the whole batch, so the relative weight of
  prompts stays what `group_centered` gives.

  Example:
    >>> import jax.numpy as jnp
    >>> print(batch_normalized(jnp.array([[9.0, 3.0], [9.0, 9.0]]), eps=0.0))
    [[ 1. -1.]
     [ 0.  0.]]
  """
  rewards, scored = _rewards(rewards)
  spread = _std(_center(rewards, scored, None), scored, None, ddof)
  return _center(rewards, scored, -1) / (spread + eps)


def batch_whitened(
  rewards: Float[Array, "P G"], *, eps: float = 1e-4, ddof: int = 1
) -> Float[Array, "P G"]:
  """`A = c / (std of c over the batch + eps)` with `c = r - group mean`: REINFORCE++-baseline.

  Source: arXiv 2501.03262, section 3.3. Differs from `batch_normalized` in what is measured:
  the spread of the centered rewards, not of the rewards, so differences between prompts do not
  shrink the advantages. The batch mean of `c` is 0 by construction.

  Example:
    >>> import jax.numpy as jnp
    >>> print(batch_whitened(jnp.array([[8.0, 0.0], [5.0, 5.0]]), eps=0.0, ddof=0))
    [[ 1.4142135 -1.4142135]
     [ 0.         0.       ]]
  """
  rewards, scored = _rewards(rewards)
  centered = _center(rewards, scored, -1)
  return centered / (_std(centered, scored, None, ddof) + eps)


def max_rl(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """`A = (r - mean) / mean` within the group, 0 where the mean is 0: MaxRL.

  Source: arXiv 2602.02710. Meant for rewards of 0 and 1, where it follows the gradient of the
  log success rate and so weights prompts that are rarely solved up.

  Example:
    >>> import jax.numpy as jnp
    >>> max_rl(jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [[3.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
  """
  rewards, scored = _rewards(rewards)
  mean = rewards.sum(-1, keepdims=True) / jnp.maximum(scored.sum(-1, keepdims=True), 1)
  return _center(rewards, scored, -1) / jnp.where(mean == 0, jnp.inf, mean)


def multi_objective(
  rewards: Float[Array, "R P G"], weights: Float[Array, "R"], *, eps: float = 1e-4
) -> Float[Array, "P G"]:
  """`A = x / (std(x) + eps)`, `x = sum_k w_k (r_k - mean_k) / (std_k + eps)`: GDPO.

  Source: arXiv 2601.05242. Each reward is normalized in its group before they are added, so a
  reward with small numbers is not drowned; the sum is then scaled by its spread over the batch.
  Its batch mean is 0 by construction, and is not subtracted again: constant groups stay at 0.

  Args:
    rewards: R reward functions; NaN = that function did not score that completion. A completion
      that none of them scored is left out and gets 0.
    weights: one per reward function.

  Example:
    >>> import jax.numpy as jnp
    >>> correct, short = jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.array([[5.0, 5.0], [9.0, 7.0]])
    >>> print(multi_objective(jnp.stack([correct, short]), jnp.array([1.0, 1.0])).round(2))
    [[ 0.87 -0.87]
     [ 0.87 -0.87]]
  """
  rewards = as_float("rewards", rewards)
  check_rank("rewards", rewards, 3, "R, P, G: reward functions, prompts, completions")
  weights = as_float("weights", weights)
  check_shape("weights", weights, rewards.shape[:1])
  normalized = jax.vmap(lambda r: group_normalized(r, eps=eps))(rewards)
  total = jnp.einsum("r,rpg->pg", weights, normalized)
  scored = jnp.isfinite(rewards).any(0)
  return total / (_std(_center(total, scored, None), scored, None, ddof=1) + eps)


def process_advantages(
  step_rewards: Float[Array, "P G S"],
  step_ends: Int[Array, "P G S"],
  mask: Bool[Array, "P G T"],
  *,
  eps: float = 1e-4,
  ddof: int = 1,
) -> Float[Array, "P G T"]:
  """`A[t] = sum of normalized step rewards over the steps that end at or after t`.

  Source: DeepSeekMath, arXiv 2402.03300, section 4.1.3 (process supervision): the rewards of
  all steps of all completions of a group are normalized together.

  Args:
    step_rewards: reward of each reasoning step; NaN = no such step (pad to S with it).
    step_ends: index of the token that ends the step, counted in the completion from 0.
    mask: completion tokens; masked tokens get 0.

  Example:
    >>> import jax.numpy as jnp
    >>> process_advantages(jnp.array([[[1.0, 0.0]]]), jnp.array([[[0, 2]]]),
    ...                    jnp.ones((1, 1, 3), bool), eps=0.0, ddof=0).tolist()
    [[[0.0, -1.0, -1.0]]]
  """
  step_rewards = as_float("step_rewards", step_rewards)
  check_rank("step_rewards", step_rewards, 3, "P, G, S: prompts, completions, steps")
  step_ends = as_tokens("step_ends", step_ends, step_rewards.shape)
  mask = as_mask("mask", mask)
  check_rank("mask", mask, 3, "P, G, T: prompts, completions, tokens")
  check_shape("mask", mask, (*step_rewards.shape[:2], mask.shape[-1]))
  prompts = step_rewards.shape[0]
  normalized = group_normalized(step_rewards.reshape(prompts, -1), eps=eps, ddof=ddof)
  normalized = normalized.reshape(step_rewards.shape)
  token = jnp.arange(mask.shape[-1]).reshape(1, 1, -1, 1)
  ends_at_or_after = step_ends[..., None, :] >= token
  advantages = jnp.where(ends_at_or_after, normalized[..., None, :], 0.0).sum(-1)
  return jnp.where(mask, advantages, 0.0)


ADVANTAGES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "group_normalized": group_normalized,
  "group_centered": group_centered,
  "leave_one_out": leave_one_out,
  "batch_normalized": batch_normalized,
  "batch_whitened": batch_whitened,
  "max_rl": max_rl,
}
