"""Weights that correct for a sampler whose probabilities differ from the trainer's.

Each function takes `(log_ratio, mask)` and keyword-only settings, which are fields of `Algorithm`.
`log_ratio` is the log-probability of each drawn token under the trainer, before this batch's
updates, minus that under the sampler, in nats and 0 where masked. A function may also name the
keyword-only arrays `advantages` and `drift`, both `[..., T]`; `drift` is the log-probability of
now minus that under the sampler. The weights `[..., T]` multiply the objective, not the KL term,
and carry no gradient: `policy_loss` passes arrays without one.

Names joined by "+" are a chain, whose weights are multiplied: "geometric_mask+token_truncate".
"""

import inspect
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array, lookup
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


def geometric_mask(
  log_ratio: Float[Array, "*B T"],
  mask: Bool[Array, "*B T"],
  *,
  geometric_min: float,
  geometric_max: float,
) -> Float[Array, "*B T"]:
  """Returns 1 where `exp(mean_t log_ratio)` lies in [geometric_min, geometric_max], else 0.

  The geometric mean of the token ratios does not shrink or grow with the length, as the product of
  `sequence_mask` does, and it only decides which sequences count: a chain with `token_truncate`
  weighs their tokens.

  Args:
    geometric_min: absolute lower bound of the geometric mean.
    geometric_max: absolute upper bound of the geometric mean.

  References:
    In use as `seq-mask-tis` in OpenRLHF and NeMo RL (bounds 0.999 and 1.002), and in SkyRL (0.99
    and 1.01), each time before token weights; no paper defines it first.

  Example:
    >>> import jax.numpy as jnp
    >>> log_ratio, mask = jnp.log(jnp.array([[0.5, 2.0], [1.2, 1.2]])), jnp.ones((2, 2), bool)
    >>> print(geometric_mask(log_ratio, mask, geometric_min=0.9, geometric_max=1.1))
    [[1. 1.]
     [0. 0.]]
  """
  mean = finite_exp(_mean(log_ratio, mask))
  inside = (mean >= geometric_min) & (mean <= geometric_max)
  return jnp.broadcast_to(jnp.where(inside, 1.0, 0.0), log_ratio.shape).astype(log_ratio.dtype)


def off_policy_mask(
  log_ratio: Float[Array, "*B T"],
  mask: Bool[Array, "*B T"],
  *,
  advantages: Float[Array, "*B T"],
  drift: Float[Array, "*B T"],
  off_policy_max: float,
) -> Float[Array, "*B T"]:
  """Returns 0 where `A < 0` and `mean_t(sampler_logp - logp) > off_policy_max`, else 1.

  A sequence that the policy of now finds much less probable than the sampler did, and that has a
  negative advantage, is dropped. It looks at the policy of now, so it binds from update to update
  as a trust region does.

  Args:
    advantages: their sign decides; 0 counts as not negative.
    drift: log-probability of now minus that under the sampler.
    off_policy_max: largest mean drop of the log-probability of a token, in nats.

  References:
    DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "off-policy sequence masking".

  Example:
    >>> import jax.numpy as jnp
    >>> drift, mask = jnp.array([[-0.6, -0.6], [-0.6, -0.2]]), jnp.ones((2, 2), bool)
    >>> print(off_policy_mask(
    ...   jnp.zeros((2, 2)), mask, advantages=-jnp.ones((2, 2)), drift=drift, off_policy_max=0.5
    ... ))
    [[0. 0.]
     [1. 1.]]
  """
  far = -_mean(drift, mask) > off_policy_max
  return jnp.where(far & (advantages < 0), 0.0, 1.0).astype(log_ratio.dtype)


def effective_sample_size(
  log_ratio: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, ""]:
  """Returns `(sum_i w_i)^2 / (n sum_i w_i^2)` with `w_i = exp(sum_t log_ratio)`, a share of n.

  It is 1 where the policy is the sampler, and 1 / n where a single completion has all the weight:
  an average with these weights is as uncertain as one of that share of the completions. Weights of
  whole completions grow apart with their length.

  Args:
    log_ratio: log-probability of each drawn token under the policy minus that under the sampler.
    mask: true on completion tokens. Completions without one do not count; the share is 1 if none
      has one.

  References:
    Kong 1992, "A note on importance sampling using standardized weights".

  Example:
    >>> import jax.numpy as jnp
    >>> log_ratio, mask = jnp.log(jnp.array([[3.0, 1.0], [0.5, 2.0]])), jnp.ones((2, 2), bool)
    >>> round(float(effective_sample_size(log_ratio, mask)), 3)  # (3 + 1)^2 / (2 (9 + 1))
    0.8
  """
  counts = mask.any(-1)
  total = jnp.where(counts, jnp.where(mask, log_ratio, 0.0).sum(-1), -jnp.inf)
  largest = jnp.max(total, initial=-jnp.inf)
  weights = jnp.where(counts, finite_exp(total - jnp.where(counts.any(), largest, 0.0)), 0.0)
  squares = jnp.where(counts.any(), (weights**2).sum() * counts.sum(), 1.0)
  return jnp.where(counts.any(), weights.sum() ** 2 / squares, 1.0)


def _mean(log_ratio: Array, mask: Array) -> Array:
  """Returns the mean over the tokens of each sequence, `[..., 1]`; 0 for an empty one."""
  lengths = jnp.maximum(mask.sum(-1, keepdims=True), 1)
  return jnp.sum(log_ratio, -1, keepdims=True) / lengths


CORRECTIONS: dict[str, Callable] = {
  "none": no_correction,
  "token_truncate": token_truncate,
  "token_mask": token_mask,
  "sequence_mask": sequence_mask,
  "geometric_mask": geometric_mask,
  "off_policy_mask": off_policy_mask,
}
# Those whose weights are the ratio itself, which a ratio to the sampler holds already.
WEIGHING = ("token_truncate", "token_mask", "sequence_mask")


def lookup_correction(choice: str | Callable) -> list[Callable]:
  """Returns the functions of a correction, several for names joined by "+".

  Raises:
    ValueError: a name is not in `CORRECTIONS`.

  Example:
    >>> [function.__name__ for function in lookup_correction("geometric_mask+token_truncate")]
    ['geometric_mask', 'token_truncate']
  """
  parts = choice.split("+") if isinstance(choice, str) else [choice]
  return [lookup("correction", CORRECTIONS, part) for part in parts]


def correction_weights(
  choice: str | Callable,
  log_ratio: Float[Array, "*B T"],
  mask: Bool[Array, "*B T"],
  **available: float | Array,
) -> Float[Array, "*B T"]:
  """Returns the product of the weights of a correction and of all in its chain.

  Args:
    available: settings and arrays by name; each function gets those that it names.
  """
  weights = []
  for function in lookup_correction(choice):
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} & available.keys()
    weights.append(function(log_ratio, mask, **{name: available[name] for name in named}))
  return math.prod(weights[1:], start=weights[0])
