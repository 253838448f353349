"""Computes advantages: the reward of a completion relative to the rewards of its group.

Rewards are `[P, G]`: G completions for each of P prompts. These rules hold for every function:

- A reward that is not finite (NaN above all) means "not scored": it is left out of the
  statistics, and its advantage is 0.
- A zero-variance group, one whose scored rewards are all equal, gets exactly 0.0. The smallest
  reward of each group is subtracted first, so equal rewards become exactly 0, and a small standard
  deviation has no rounding noise to amplify. This also keeps precision under large offsets.
  `token_whitened`, `centered_token_whitened` and `right_only` do not compare within groups alone:
  with them such a group may have a gradient.
- A group of one is an error: nothing can be compared, so every advantage would be 0. It is usually
  a batch of shape `[P * G, 1]` instead of `[P, G]`. `allow_groups_of_one=True` accepts it.
- Arrays in, arrays out, float32 or wider. No advantage carries a gradient to the policy.

`ADVANTAGES` lists them by name, each with the rewards that it needs. An algorithm may also take a
function of one's own, such as `lambda rewards: group_normalized(rewards) + 0.1 *
leave_one_out(rewards)`; one that needs other rewards goes in as an `Advantage`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import (
  Array,
  as_float,
  as_mask,
  as_tokens,
  check_rank,
  check_shape,
  lookup,
)
from grpo_jax.core.values import gae_advantages, gae_whitened, returns_whitened


def _rewards(rewards: Array, allow_groups_of_one: bool) -> tuple[jax.Array, jax.Array]:
  """Returns the rewards, 0 where not scored, and a mask of the scored ones."""
  rewards = as_float("rewards", rewards)
  check_rank("rewards", rewards, 2, "P, G: prompts, completions per prompt")
  _check_groups("rewards", rewards, rewards.shape[1], allow_groups_of_one)
  scored = jnp.isfinite(rewards)
  return jnp.where(scored, rewards, 0.0), scored


def _check_groups(name: str, rewards: jax.Array, size: int, allow_groups_of_one: bool) -> None:
  """Raises ValueError for groups with one reward, whose advantages would all be 0."""
  if size == 1 and not allow_groups_of_one:
    raise ValueError(
      f"{name} has shape {rewards.shape}: a group of one has nothing to be compared with, so every "
      "advantage would be 0. Put the G completions of a prompt on the axis of groups, as in "
      "rewards.reshape(P, G); if groups of one are meant, call the function with "
      "allow_groups_of_one=True"
    )


def _center(x: jax.Array, where: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
  """Returns `x` minus its mean over `axis`: exactly 0 if all are equal, and 0 outside `where`."""
  count = jnp.maximum(where.sum(axis, keepdims=True), 1)
  lowest = jnp.min(x, axis, keepdims=True, where=where, initial=jnp.inf)
  x = jnp.where(where, x - lowest, 0.0)
  mean = x.sum(axis, keepdims=True) / count
  return jnp.where(where, x - mean, 0.0)


def _std(
  centered: jax.Array, where: jax.Array, axis: int | tuple[int, ...] | None, ddof: int
) -> jax.Array:
  """Returns the standard deviation of centered values, as a divisor: 1 if all of them are 0."""
  count = where.sum(axis, keepdims=True)
  variance = (centered**2).sum(axis, keepdims=True) / jnp.maximum(count - ddof, 1)
  return jnp.sqrt(jnp.where(variance > 0, variance, 1.0))


def group_normalized(
  rewards: Float[Array, "P G"],
  *,
  eps: float = 1e-4,
  ddof: int = 1,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G"]:
  """Returns `A = (r - mean) / (std + eps)` within the group, as GRPO does.

  Dividing by the group's standard deviation gives easy and hard prompts more weight, so the
  expected update is not the gradient of mean reward (see `group_centered`).

  Args:
    rewards: rewards in reward units; NaN = not scored.
    eps: number added to the standard deviation, in reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    DeepSeekMath, arXiv 2402.03300, section 4.1.2. The paper leaves `eps` and `ddof` open; the
    defaults are those in widest use.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> print(group_normalized(jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])))
    [[ 0.8658754 -0.8658754 -0.8658754  0.8658754]
     [ 0.         0.         0.         0.       ]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  centered = _center(rewards, scored, -1)
  return centered / (_std(centered, scored, -1, ddof) + eps)


def group_centered(
  rewards: Float[Array, "P G"], *, allow_groups_of_one: bool = False
) -> Float[Array, "P G"]:
  """Returns `A = r - mean` within the group, as Dr. GRPO does.

  The expected update is the gradient of mean reward times (n - 1) / n, because the mean includes
  the completion's own reward. `leave_one_out` removes that factor.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    Dr. GRPO, arXiv 2503.20783, section 3.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> print(group_centered(jnp.array([[3.0, 0.0, 0.0, jnp.nan]])))
    [[ 2. -1. -1.  0.]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  return _center(rewards, scored, -1)


def leave_one_out(
  rewards: Float[Array, "P G"], *, allow_groups_of_one: bool = False
) -> Float[Array, "P G"]:
  """Returns `A_i = r_i - mean of the others = (r_i - mean) · n / (n - 1)`, as RLOO does.

  The expected update is the gradient of mean reward. The only scored completion of a group gets 0.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    RLOO, arXiv 2402.14740, eq. 8.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> print(leave_one_out(jnp.array([[3.0, 0.0, 0.0]])))
    [[ 3.  -1.5 -1.5]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  count = scored.sum(-1, keepdims=True)
  return _center(rewards, scored, -1) * (count / jnp.maximum(count - 1, 1))


def zero_advantages(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
  """Returns 0 for every completion: the rewards are recorded and give no gradient.

  It is the advantage of algorithms that learn from a teacher alone.

  Example:
    >>> import jax.numpy as jnp
    >>> zero_advantages(jnp.array([[3.0, 0.0]])).tolist()
    [[0.0, 0.0]]
  """
  return jnp.zeros_like(_rewards(rewards, allow_groups_of_one=True)[0])


def batch_normalized(
  rewards: Float[Array, "P G"],
  *,
  eps: float = 1e-4,
  ddof: int = 1,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G"]:
  """Returns `A = (r - group mean) / (std of the batch's rewards + eps)`, as Lite PPO does.

  The whole batch has one scale, so the relative weights of prompts are those of `group_centered`.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    eps: number added to the standard deviation, in reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    Lite PPO, arXiv 2508.08221, section 4.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> print(batch_normalized(jnp.array([[9.0, 3.0], [9.0, 9.0]]), eps=0.0))
    [[ 1. -1.]
     [ 0.  0.]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  spread = _std(_center(rewards, scored, None), scored, None, ddof)
  return _center(rewards, scored, -1) / (spread + eps)


def batch_whitened(
  rewards: Float[Array, "P G"],
  *,
  eps: float = 1e-4,
  ddof: int = 1,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G"]:
  """Returns `A = c / (std of c over the batch + eps)` with `c = r - group mean`.

  Unlike `batch_normalized` it divides by the standard deviation of the centered rewards, not of
  the rewards, so differences between prompts do not shrink the advantages. The batch mean of `c`
  is 0 by construction.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    eps: number added to the standard deviation, in reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    REINFORCE++-baseline, arXiv 2501.03262, section 3.3.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> print(batch_whitened(jnp.array([[8.0, 0.0], [5.0, 5.0]]), eps=0.0, ddof=0))
    [[ 1.4142135 -1.4142135]
     [ 0.         0.       ]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  centered = _center(rewards, scored, -1)
  return centered / (_std(centered, scored, None, ddof) + eps)


def max_rl(
  rewards: Float[Array, "P G"], *, allow_groups_of_one: bool = False
) -> Float[Array, "P G"]:
  """Returns `A = (r - mean) / |mean|` within the group, 0 where the mean is 0, as MaxRL does.

  With rewards of 0 and 1, for which it is meant, it follows the gradient of the log success rate,
  so prompts that are rarely solved get more weight. The paper divides by the mean, which is never
  negative there; with rewards below 0 its sign would make the worst answer the best.

  Args:
    rewards: rewards in reward units, usually 0 and 1; NaN = not scored.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    MaxRL, arXiv 2602.02710.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> max_rl(jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [[3.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  mean = rewards.sum(-1, keepdims=True) / jnp.maximum(scored.sum(-1, keepdims=True), 1)
  return _center(rewards, scored, -1) / jnp.where(mean == 0, jnp.inf, jnp.abs(mean))


def token_whitened(
  rewards: Float[Array, "P G"], mask: Bool[Array, "P G T"], *, eps: float = 1e-8
) -> Float[Array, "P G"]:
  """Returns `A = (r - m) / (s + eps)`, m and s over all tokens of the batch, as REINFORCE++ does.

  A completion counts once for each of its tokens in the mean m and the standard deviation s (by n),
  and there is no group: one completion per prompt will do, and a zero-variance group has a gradient
  unless its reward is m. Prompts of different difficulty share one baseline.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    mask: true on completion tokens.
    eps: number added to the standard deviation, in reward units.

  References:
    REINFORCE++, arXiv 2501.03262v9, section 3.2, without the KL penalty in the reward. Its authors'
    code (OpenRLHF) has the variance at least 1e-8 in place of `eps`.

  Raises:
    ValueError: `rewards` does not hold real numbers, or a shape does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> print(token_whitened(jnp.array([[1.0, 5.0]]), mask))  # m = 2, s^2 = 3
    [[-0.57735...  1.73205...]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one=True)
  return _whiten_over_tokens(rewards, scored, mask, eps)


def centered_token_whitened(
  rewards: Float[Array, "P G"],
  mask: Bool[Array, "P G T"],
  *,
  eps: float = 1e-8,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G"]:
  """Returns `token_whitened` of `c = r - group mean`.

  The mean of `c` over tokens is not 0 where right and wrong answers differ in length, and it is
  subtracted: a zero-variance group gets `-m / (s + eps)`.

  Args:
    rewards: rewards in reward units; NaN = not scored.
    mask: true on completion tokens.
    eps: number added to the standard deviation, in reward units.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    REINFORCE++ with baseline, arXiv 2501.03262v9, section 3.3, and its authors' code (OpenRLHF,
    `reinforce_baseline`), which whitens over tokens too.

  Raises:
    ValueError: `rewards` does not hold real numbers, a shape does not fit, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[[True, True, True], [True, False, False]]])
    >>> print(centered_token_whitened(jnp.array([[1.0, 5.0]]), mask))  # c = -2, 2; m = -1; s^2 = 3
    [[-0.57735...  1.73205...]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one)
  return _whiten_over_tokens(_center(rewards, scored, -1), scored, mask, eps)


def _whiten_over_tokens(x: jax.Array, scored: jax.Array, mask: Array, eps: float) -> jax.Array:
  """Returns values [P, G] whitened over the tokens of the batch; 0 where not scored."""
  mask = as_mask("mask", mask)
  check_rank("mask", mask, 3, "P, G, T: prompts, completions, tokens")
  check_shape("mask", mask, (*x.shape, mask.shape[-1]))
  tokens = jnp.where(scored, mask.sum(-1), 0)
  count = jnp.maximum(tokens.sum(), 1)
  lowest = jnp.min(x, where=scored, initial=jnp.inf)
  x = jnp.where(scored, x - lowest, 0.0)
  centered = jnp.where(scored, x - (tokens * x).sum() / count, 0.0)
  variance = (tokens * centered**2).sum() / count
  return centered / (jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) + eps)


RIGHT_ABOVE = 0.5  # largest reward of a wrong answer, where rewards are 0 and 1


def right_only(
  rewards: Float[Array, "P G"], *, right_above: float = RIGHT_ABOVE
) -> Float[Array, "P G"]:
  """Returns `A = 1` for a right answer, whose reward is above `right_above`, and 0 for the others.

  The policy imitates its own right answers, and nothing pushes wrong ones down. There is no group:
  one whose answers are all right has a gradient.

  Args:
    rewards: rewards in reward units; NaN = not scored, which is not right.
    right_above: largest reward of a wrong answer, in reward units.

  References:
    Online rejection sampling fine-tuning: DeepSeekMath, arXiv 2402.03300, section 5.2.1 and
    appendix A.1.3.

  Raises:
    ValueError: `rewards` does not hold real numbers or is not `[P, G]`.

  Example:
    >>> import jax.numpy as jnp
    >>> right_only(jnp.array([[1.0, 0.0, 0.5, jnp.nan], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
  """
  rewards, scored = _rewards(rewards, allow_groups_of_one=True)
  return jnp.where(scored & (rewards > right_above), 1.0, 0.0).astype(rewards.dtype)


def multi_objective(
  rewards: Float[Array, "R P G"],
  weights: Float[Array, "R"],
  *,
  eps: float = 1e-4,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G"]:
  """Returns `A = x / (std(x) + eps)`, `x = sum_k w_k (r_k - mean_k) / (std_k + eps)`, as GDPO does.

  Each reward is normalized within its group before the rewards are added, so that a reward on a
  small scale still counts. The sum is then divided by its standard deviation over the batch. Its
  batch mean is 0 by construction and is not subtracted again: zero-variance groups stay at 0.

  Args:
    rewards: rewards of R reward functions; NaN = that function did not score that completion. A
      completion that no function scored is left out and gets 0.
    weights: weight of each reward function.
    eps: number added to each standard deviation.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    GDPO, arXiv 2601.05242.

  Raises:
    ValueError: an argument does not hold real numbers, the shapes are not `[R, P, G]` and `[R]`, or
      G is 1.

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
  _check_groups("rewards", rewards, rewards.shape[2], allow_groups_of_one)
  normalized = jax.vmap(partial(group_normalized, eps=eps, allow_groups_of_one=True))(rewards)
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
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G T"]:
  """Returns `A[t]`, the sum of the normalized rewards of the steps that end at or after t.

  The rewards of all steps of all completions of a group are normalized together.

  Args:
    step_rewards: reward of each reasoning step; NaN = no such step (use it as padding).
    step_ends: index of the last token of each step, counted from 0 in the completion.
    mask: true on completion tokens; the others get 0.
    eps: number added to the standard deviation, in reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.
    allow_groups_of_one: accept groups of one step (G = S = 1), where every advantage is 0.

  References:
    Process supervision of DeepSeekMath, arXiv 2402.03300, section 4.1.3.

  Raises:
    ValueError: a dtype or a shape does not fit, or G and S are 1.

  Example:
    >>> import jax.numpy as jnp
    >>> process_advantages(jnp.array([[[1.0, 0.0]]]), jnp.array([[[0, 2]]]),
    ...                    jnp.ones((1, 1, 3), bool), eps=0.0, ddof=0).tolist()
    [[[0.0, -1.0, -1.0]]]
  """
  step_rewards, step_ends, mask = _step_arguments("step", step_rewards, step_ends, mask)
  prompts, group, steps = step_rewards.shape
  _check_groups("step_rewards", step_rewards, group * steps, allow_groups_of_one)
  rows = step_rewards.reshape(prompts, group * steps)
  normalized = group_normalized(rows, eps=eps, ddof=ddof, allow_groups_of_one=True)
  normalized = normalized.reshape(step_rewards.shape)
  token = jnp.arange(mask.shape[-1]).reshape(1, 1, -1, 1)
  ends_at_or_after = step_ends[..., None, :] >= token
  advantages = jnp.where(ends_at_or_after, normalized[..., None, :], 0.0).sum(-1)
  return jnp.where(mask, advantages, 0.0)


def turn_advantages(
  turn_rewards: Float[Array, "P G S"],
  turn_ends: Int[Array, "P G S"],
  mask: Bool[Array, "P G T"],
  *,
  eps: float = 1e-4,
  ddof: int = 1,
  allow_groups_of_one: bool = False,
) -> Float[Array, "P G T"]:
  """Returns `A[t] = (R_k - mean_k) / (std_k + eps)`, `R_k = r_k + r_(k+1) + ...`, t in turn k.

  `R_k` is the reward of turn k and all later ones: earlier rewards do not depend on the tokens of
  turn k. Mean and standard deviation are those of `R_k` over the completions of the group that
  have a turn k. Without the division by the standard deviation, the expected update of turn k is
  its part of the gradient of mean reward times the mean of (n - 1) / n, for the n completions that
  have a turn k. `process_advantages` subtracts a mean for each step instead, so a completion's own
  number of turns changes its baseline, and the update is biased where that number differs.

  Args:
    turn_rewards: reward of each turn of an episode; NaN = no such turn (use it as padding). A
      reward of the whole episode belongs to its last turn.
    turn_ends: index of the last token that the policy wrote in each turn, counted from 0 in the
      completion and rising from turn to turn.
    mask: true on the tokens of the policy; the others, such as observations, get 0. Tokens after
      the last turn get 0 too.
    eps: number added to the standard deviation, in reward units.
    ddof: 1 divides the variance by n - 1, 0 by n.
    allow_groups_of_one: accept G = 1, where every advantage is 0.

  References:
    Rewards to go: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with
    function approximation", theorem 1. Turn rewards in GRPO: MT-GRPO, arXiv 2505.11821, which
    normalizes the reward of each turn and then adds; here the sum is normalized.

  Raises:
    ValueError: a dtype or a shape does not fit, or G is 1.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards = jnp.array([[[1.0, 0.0], [0.0, 3.0]]])  # R is (1, 0) and (3, 3)
    >>> ends = jnp.array([[[0, 2], [1, 2]]])
    >>> mask = jnp.ones((1, 2, 3), bool)
    >>> turn_advantages(rewards, ends, mask, eps=0.0, ddof=0).tolist()
    [[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]]
  """
  turn_rewards, turn_ends, mask = _step_arguments("turn", turn_rewards, turn_ends, mask)
  prompts, group, turns = turn_rewards.shape
  _check_groups("turn_rewards", turn_rewards, group, allow_groups_of_one)
  exists = jnp.isfinite(turn_rewards)
  rewards = jnp.where(exists, turn_rewards, 0.0)
  later = jnp.flip(jnp.cumsum(jnp.flip(rewards, -1), -1), -1)
  by_turn = jnp.where(exists, later, jnp.nan).swapaxes(1, 2).reshape(prompts * turns, group)
  normalized = group_normalized(by_turn, eps=eps, ddof=ddof, allow_groups_of_one=True)
  normalized = normalized.reshape(prompts, turns, group).swapaxes(1, 2)
  # The first turn that ends at or after a token is the turn of that token.
  tokens = mask.shape[-1]
  ends = jnp.where(exists, turn_ends, tokens)[..., None, :]
  ends = jnp.where(ends >= jnp.arange(tokens).reshape(1, 1, -1, 1), ends, tokens)
  is_turn = (ends == ends.min(-1, keepdims=True, initial=tokens)) & (ends < tokens)
  advantages = jnp.where(is_turn, normalized[..., None, :], 0.0).sum(-1)
  return jnp.where(mask, advantages, 0.0)


def _step_arguments(
  name: str, rewards: Array, ends: Array, mask: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the rewards, ends and mask of steps or turns as arrays, if they fit."""
  rewards = as_float(f"{name}_rewards", rewards)
  check_rank(f"{name}_rewards", rewards, 3, f"P, G, S: prompts, completions, {name}s")
  ends = as_tokens(f"{name}_ends", ends, rewards.shape)
  mask = as_mask("mask", mask)
  check_rank("mask", mask, 3, "P, G, T: prompts, completions, tokens")
  check_shape("mask", mask, (*rewards.shape[:2], mask.shape[-1]))
  return rewards, ends, mask


# Arguments that an advantage function gets, in this order, for each kind of rewards.
ARGUMENTS: dict[str, tuple[str, ...]] = {
  "total": ("rewards",),
  "mask": ("mask",),
  "each": ("rewards_per_function", "reward_weights"),
  "steps": ("step_rewards", "step_ends", "mask"),
  "tokens": ("token_rewards", "mask"),
  "values": ("token_rewards", "values", "mask"),
}


@dataclasses.dataclass(frozen=True)
class Advantage:
  """An advantage function and the rewards that it needs.

  | `rewards` | arguments of `function`                                              |
  |-----------|----------------------------------------------------------------------|
  | `total`   | one reward per completion `[P, G]`                                   |
  | `mask`    | the mask `[P, G, T]`                                                 |
  | `each`    | rewards of each reward function `[R, P, G]`, and their weights `[R]` |
  | `steps`   | step rewards and step ends `[P, G, S]`, and the mask `[P, G, T]`     |
  | `tokens`  | rewards of tokens, less a KL term in the reward, and the mask        |
  | `values`  | rewards of tokens and values of a critic, and the mask, `[P, G, T]`  |

  A plain function needs no `Advantage`: it gets the total.

  Attributes:
    function: `(*arguments) -> advantages`, `[P, G]` or `[P, G, T]`.
    rewards: a kind of the table, or several; the function then gets the arguments of each in turn.
    needs_groups: False if groups of one will do, because the function does not compare the
      completions of a prompt. It may then give a zero-variance group advantages other than 0.

  Raises:
    ValueError: a kind is unknown, there is none, or `function` is not callable.

  Example:
    >>> import jax.numpy as jnp
    >>> def outcome_and_process(rewards, step_rewards, step_ends, mask):
    ...   process = process_advantages(step_rewards, step_ends, mask)
    ...   return group_centered(rewards)[..., None] + 0.5 * process
    >>> Advantage(outcome_and_process, rewards=("total", "steps")).rewards
    ('total', 'steps')
  """

  function: Callable[..., jax.Array]
  rewards: str | tuple[str, ...] = "total"
  needs_groups: bool = True

  def __post_init__(self) -> None:
    kinds = (self.rewards,) if isinstance(self.rewards, str) else tuple(self.rewards)
    if not kinds:
      raise ValueError(f"rewards is empty; name at least one of {', '.join(ARGUMENTS)}")
    for kind in kinds:
      lookup("kind of rewards", ARGUMENTS, kind)
    if not callable(self.function):
      raise ValueError(f"function must be callable, got {self.function!r}")
    object.__setattr__(self, "rewards", kinds)

  def __call__(self, *arguments: Array, **settings: float) -> jax.Array:
    """Returns `function(*arguments, **settings)`."""
    return self.function(*arguments, **settings)


ADVANTAGES: dict[str, Advantage] = {
  "group_normalized": Advantage(group_normalized),
  "group_centered": Advantage(group_centered),
  "leave_one_out": Advantage(leave_one_out),
  "batch_normalized": Advantage(batch_normalized),
  "batch_whitened": Advantage(batch_whitened),
  "max_rl": Advantage(max_rl),
  "zero_advantages": Advantage(zero_advantages, needs_groups=False),
  "token_whitened": Advantage(token_whitened, rewards=("total", "mask"), needs_groups=False),
  "centered_token_whitened": Advantage(centered_token_whitened, rewards=("total", "mask")),
  "right_only": Advantage(right_only, needs_groups=False),
  "multi_objective": Advantage(multi_objective, rewards="each"),
  "process_advantages": Advantage(process_advantages, rewards="steps"),
  "turn_advantages": Advantage(turn_advantages, rewards="steps"),  # a turn is a step
  "returns_whitened": Advantage(returns_whitened, rewards="tokens", needs_groups=False),
  "gae": Advantage(gae_advantages, rewards="values", needs_groups=False),
  "gae_whitened": Advantage(gae_whitened, rewards="values", needs_groups=False),
}


def lookup_advantage(choice: str | Callable | Advantage) -> Advantage:
  """Returns the advantage of that name; a plain function becomes one of total rewards.

  Raises:
    ValueError: the name is not in `ADVANTAGES`.

  Example:
    >>> lookup_advantage("multi_objective").rewards
    ('each',)
    >>> lookup_advantage(lambda rewards: rewards).rewards
    ('total',)
  """
  function = lookup("advantage", ADVANTAGES, choice)
  return function if isinstance(function, Advantage) else Advantage(function)
