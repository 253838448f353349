"""Turns the distance to another policy into advantages: a teacher, or the reference of a KL term.

A token is worth more if the other policy gives it a higher log-probability than the policy that
drew it. As advantages, these log-ratios pass through the ratio, the trust region and the
corrections of a loss like the advantages of rewards, to which they are added.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array, as_float, as_mask, check_shape, lookup
from grpo_jax.core.kl import KLS
from grpo_jax.core.values import discounted_sum


def log_ratio_advantages(
  target_logp: Float[Array, "... T"],
  old_logp: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  coefficient: float = 1.0,
  discount: float = 0.0,
  baseline: str = "none",
) -> Float[Array, "... T"]:
  """Returns `A[t] = coefficient * sum_(k >= t) discount^(k - t) (target_logp - old_logp)[k]`.

  The discount decides which KL divergence the expected update descends. With a free distribution
  in each context c and completions drawn by the policy itself:

  | `discount` | expected gradient of `sum_t A[t] logp[t]`                                |
  |------------|--------------------------------------------------------------------------|
  | 0          | of -KL(policy, target) at each context, with visits of contexts fixed    |
  | 1          | of -KL(policy, target) of whole completions, exactly                     |

  With a teacher as the target, this is on-policy distillation. With the reference as the target and
  a discount of 1, it is a KL term in the reward: the estimator k1, subtracted from the reward of
  each token. A policy that equals its target gets advantages of 0.

  No gradient flows through the result. Masked slots of the log-probabilities may hold anything,
  including NaN and infinity. The discount counts only tokens of the policy: an observation between
  two of them has no advantage and does not discount.

  Args:
    target_logp: log-probabilities of the drawn tokens under the teacher or the reference, in nats.
    old_logp: log-probabilities under the policy that is trained, before this update, in nats.
    mask: true on the tokens of the policy; the others get 0.
    coefficient: multiplies the result.
    discount: weight of the next token's log-ratio, in [0, 1].
    baseline: `leave_one_out` subtracts the mean of the other completions of the group (axis -2) at
      the same position. A baseline of other completions leaves the expected update as it is. With
      `none`, the advantages of a distant target are all negative.

  References:
    Discount 0: on-policy distillation, Thinking Machines 2025,
    https://thinkingmachines.ai/blog/on-policy-distillation. Discount 1: REINFORCE on the reverse
    KL, MiniLLM, arXiv 2306.08543, section 2.2; KL in the reward, arXiv 1909.08593, eq. 2.

  Raises:
    ValueError: a shape, a dtype or a name does not fit, the discount is outside [0, 1], or the
      baseline has no axis of completions.

  Example:
    >>> import jax.numpy as jnp
    >>> target, old, mask = jnp.array([-1.0, -1.0, -3.0]), jnp.full(3, -2.0), jnp.ones(3, bool)
    >>> log_ratio_advantages(target, old, mask).tolist()
    [1.0, 1.0, -1.0]
    >>> log_ratio_advantages(target, old, mask, discount=1.0).tolist()
    [1.0, 0.0, -1.0]
  """
  target_logp, old_logp = as_float("target_logp", target_logp), as_float("old_logp", old_logp)
  if old_logp.ndim == 0:
    raise ValueError("old_logp has shape (), expected at least one axis [..., T]")
  check_shape("target_logp", target_logp, old_logp.shape)
  mask = as_mask("mask", mask, old_logp.shape)
  difference = jnp.where(mask, target_logp, 0.0) - jnp.where(mask, old_logp, 0.0)
  return sum_later(difference, mask, coefficient=coefficient, discount=discount, baseline=baseline)


def sum_later(
  values: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  coefficient: float = 1.0,
  discount: float = 1.0,
  baseline: str = "none",
) -> Float[Array, "... T"]:
  """Returns `coefficient * sum_(k >= t) discount^(k - t) values[k]`, minus a baseline.

  Arguments and errors are those of `log_ratio_advantages`; no gradient flows through the result.

  Args:
    values: a reward of each token; 0 where masked.

  Example:
    >>> import jax.numpy as jnp
    >>> sum_later(jnp.array([1.0, 0.0, 2.0]), jnp.array([True, False, True]), discount=0.5).tolist()
    [2.0, 0.0, 2.0]
  """
  subtract = lookup("baseline", BASELINES, baseline)
  if not 0 <= discount <= 1:
    raise ValueError(f"discount must be between 0 and 1, got {discount}")
  total = values
  if discount > 0:  # a discount of 0 must not multiply an infinite value
    total = discounted_sum(values, mask, discount)
  return jax.lax.stop_gradient(jnp.where(mask, coefficient * subtract(total), 0.0))


def penalized_rewards(
  token_rewards: Float[Array, "... T"],
  old_logp: Float[Array, "... T"],
  ref_logp: Float[Array, "... T"],
  mask: Bool[Array, "... T"],
  *,
  beta: float,
  kl: str = "k1",
) -> Float[Array, "... T"]:
  """Returns `token_rewards - beta * kl(old_logp, ref_logp)`: the KL term in a critic's rewards.

  The critic then predicts reward and penalty together. Without a critic, `kl_in="reward"` of a row
  subtracts the penalties of later tokens from the advantage; with exact arithmetic, `gae` of these
  rewards with `lam=1` gives the same advantages.

  No gradient flows through the result. Masked slots of the log-probabilities may hold anything.

  Args:
    token_rewards: the reward of each token.
    old_logp: log-probabilities of the drawn tokens under the policy before this update, in nats.
    ref_logp: log-probabilities under the reference, in nats.
    mask: true on the tokens of the policy; the others get 0.
    beta: coefficient of the penalty, at least 0.
    kl: estimator, a key of `KLS`.

  References:
    arXiv 1909.08593, eq. 2; InstructGPT, arXiv 2203.02155, eq. 2.

  Raises:
    ValueError: a shape, a dtype or a name does not fit, or beta is negative.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards, old, ref = jnp.array([0.0, 1.0]), jnp.array([-1.0, -2.0]), jnp.array([-3.0, -2.0])
    >>> penalized_rewards(rewards, old, ref, jnp.ones(2, bool), beta=0.5).tolist()
    [-1.0, 1.0]
  """
  token_rewards = as_float("token_rewards", token_rewards)
  if not beta >= 0:
    raise ValueError(f"beta must be at least 0, got {beta}")
  estimate = lookup("kl", KLS, kl)
  mask = as_mask("mask", mask, token_rewards.shape)
  both = {"old_logp": old_logp, "ref_logp": ref_logp}
  for name, value in both.items():
    check_shape(name, value := as_float(name, value), token_rewards.shape)
    both[name] = jnp.where(mask, value, 0.0)
  penalty = estimate(both["old_logp"], both["ref_logp"], jnp.ones_like(token_rewards))
  return jax.lax.stop_gradient(jnp.where(mask, token_rewards - beta * penalty, 0.0))


def _leave_one_out(values: Float[Array, "... G T"]) -> Float[Array, "... G T"]:
  """Returns `values` minus the mean of the others on axis -2; unchanged in a group of one."""
  if values.ndim < 2:
    raise ValueError(
      f"baseline='leave_one_out' needs an axis of completions: [..., G, T], got {values.shape}"
    )
  others = max(values.shape[-2] - 1, 1)
  return values - (values.sum(-2, keepdims=True) - values) / others


BASELINES = {"none": lambda values: values, "leave_one_out": _leave_one_out}
