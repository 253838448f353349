"""Computes policy losses: `sum(weights * -(correction * objective - beta * kl + ...))`."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.algorithms import Algorithm, lookup_algorithm
from grpo_jax.core.checks import Array, as_float, as_mask, check_shape, lookup
from grpo_jax.core.corrections import correction_weights
from grpo_jax.core.kl import KLS
from grpo_jax.core.log_ratios import log_ratio_advantages, sum_later
from grpo_jax.core.masks import masked_mean, token_weights
from grpo_jax.core.ratios import ANCHORS, RATIOS, finite_exp
from grpo_jax.core.trust_regions import TRUST_REGIONS

Metrics = dict[str, jax.Array]


def grpo_loss(
  logp: Float[Array, "... T"],
  advantages: Float[Array, "..."],
  mask: Bool[Array, "... T"],
  *,
  old_logp: Float[Array, "... T"] | None = None,
  ref_logp: Float[Array, "... T"] | None = None,
  beta: float = 0.0,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  average: str = "sequence",
  max_length: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns GRPO's loss `mean_i (1/|o_i|) sum_t -( min(r A, clip(r) A) - beta k3 )` and metrics.

  Here `r = exp(logp - old_logp)` and `k3 = exp(ref_logp - logp) - (ref_logp - logp) - 1`. With
  `old_logp=None` the ratio is `exp(logp - stop_gradient(logp))`: it is exactly 1, the clip never
  binds, and the gradient per token is `-(A - beta (1 - exp(ref_logp - logp)))` times its weight.
  Only `logp` receives gradient. Arguments that are not listed are those of `policy_loss`.

  `policy_loss("grpo", ...)` is the same loss with the paper's `beta` of 0.04. The default here is
  0: `ref_logp` is optional, and only adds the metric `kl` unless `beta` is given.

  Args:
    beta: coefficient of the KL term. Above 0 it needs `ref_logp`; the row `grpo` has 0.04.
    clip_low: the lower bound of the ratio is 1 - clip_low.
    clip_high: the upper bound of the ratio is 1 + clip_high.
    average: `sequence`, `token` or `constant`, see `token_weights`.
    max_length: completion budget in tokens, for `average="constant"`.

  Returns:
    (loss, metrics), as `policy_loss` returns them.

  References:
    DeepSeekMath, arXiv 2402.03300, eq. 3 and 4.

  Raises:
    ValueError: as `policy_loss` does.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> logp = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.25]]]))  # [P=1, G=2, T=2]
    >>> mask = jnp.array([[[True, True], [True, False]]])
    >>> loss = lambda logp: grpo_loss(logp, jnp.array([[1.0, -1.0]]), mask)[0]
    >>> jax.grad(loss)(logp).tolist()
    [[[-0.25, -0.25], [0.5, 0.0]]]
  """
  algorithm = Algorithm(
    trust_region="clip",
    clip_low=clip_low,
    clip_high=clip_high,
    kl="k3",
    beta=beta,
    average=average,
  )
  return policy_loss(
    algorithm,
    logp,
    advantages,
    mask,
    old_logp=old_logp,
    ref_logp=ref_logp,
    max_length=max_length,
  )


def policy_loss(
  algorithm: str | Algorithm,
  logp: Float[Array, "... T"],
  advantages: Float[Array, "..."],
  mask: Bool[Array, "... T"],
  *,
  old_logp: Float[Array, "... T"] | None = None,
  ref_logp: Float[Array, "... T"] | None = None,
  sampler_logp: Float[Array, "... T"] | None = None,
  teacher_logp: Float[Array, "... T"] | None = None,
  divergence: Float[Array, "... T"] | None = None,
  entropy: Float[Array, "... T"] | None = None,
  entropy_coef: Float[Array, "..."] | float | None = None,
  weights: Float[Array, "... T"] | None = None,
  nll_weights: Float[Array, "... T"] | None = None,
  max_length: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns `loss = sum(weights * -(correction * objective - beta * kl))` of a row, and metrics.

  A row with a teacher, or with its KL term in the reward, adds `log_ratio_advantages` to the
  advantages; a row with a divergence to a teacher adds `teacher_weight * divergence` to the loss.
  Three further terms may stand in the bracket: `- sampler_penalty * (logp - sampler_logp)^2`,
  `+ entropy_coef * entropy`, and `+ nll_weight * logp` of right answers, which has weights of its
  own.

  Only `logp` and `divergence` receive gradient, and `entropy` if the row has a bonus. Masked slots
  of every argument may hold anything, including NaN and infinity. The numbers are those of the row:
  `"grpo"` has a KL term (`beta=0.04`), which `grpo_loss` has only if it is given a `beta`.

  Args:
    algorithm: a key of `ALGORITHMS`, or an `Algorithm`.
    logp: log-probabilities of the completion tokens under the policy that is trained, in nats. Any
      leading axes, usually [P, G, T].
    advantages: one per sequence ([P, G]) or one per token ([P, G, T]).
    mask: true on completion tokens, up to and including EOS.
    old_logp: log-probabilities under the policy before this batch's updates. None = the current
      policy, which makes every ratio to it exactly 1.
    ref_logp: log-probabilities under the reference. Needed if `beta > 0`; otherwise it only adds
      the metric `kl`.
    sampler_logp: log-probabilities as the sampler recorded them. Needed if the row has a
      correction or a `sampler_penalty`. A row whose anchor is the sampler takes `old_logp` without
      them: then the old policy is taken to be the sampler. Otherwise they only add the metrics
      `sampling/*`.
    teacher_logp: log-probabilities under the teacher; of several teachers, their mean. Needed if
      the row has a `teacher_weight` and no divergence; otherwise it only adds `teacher/kl`.
    divergence: the divergence of each token's distribution to that of the teacher, in nats, from
      `head_divergence`. Needed if the row has a `teacher_divergence`.
    entropy: entropy of the policy at each token, in nats, as `head_logprobs` returns it. Needed if
      the row has an entropy bonus; otherwise it only adds the metric `entropy`.
    entropy_coef: coefficient of an adaptive bonus as it is now, a number or an array that
      broadcasts against `logp`. Needed if the row has an `entropy_target`. None = the row's
      `entropy_bonus`.
    weights: result of `token_weights` on the mask of the whole global batch. None = this batch is
      the whole batch. Pass them for micro-batches, whose losses then add up to that of the batch.
    nll_weights: result of `algorithms.nll_weights` on the rewards and the mask of the whole global
      batch. Needed if the row has an `nll_weight`.
    max_length: completion budget in tokens, for `average="constant"` without `weights`.

  Returns:
    (loss, metrics), all scalars. Metrics are means over this batch's tokens unless the name says
    otherwise: `clip_ratio/{low_mean,high_mean,region_mean}` (the fraction of tokens whose gradient
    a lower bound, an upper bound or either changes; see `trust_regions`), `ratio/{mean,max}`, and
    if their arguments are given `kl`, `teacher/kl` (the mean of old_logp - teacher_logp),
    `teacher/divergence`, `entropy`, `entropy_coef`, `nll` (the negative log-likelihood of right
    answers, 0 on the tokens of others), `sampling/sampling_logp_difference/{mean,max}`,
    `sampling/importance_sampling_ratio/{min,mean,max}`.

  Raises:
    ValueError: a shape or dtype does not fit, a name is unknown, or an argument that the row needs
      is missing. The message names the argument.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 2, 4), bool)
    >>> logp, advantages = jnp.full((1, 2, 4), -1.0), jnp.array([[1.0, -1.0]])
    >>> loss, metrics = policy_loss("dapo", logp, advantages, mask)
    >>> float(loss), sorted(metrics)[0]
    (0.0, 'clip_ratio/high_mean')
  """
  algorithm = lookup_algorithm(algorithm)
  logp = as_float("logp", logp)
  if logp.ndim == 0:
    raise ValueError("logp has shape (), expected at least one axis [..., T]")
  mask = as_mask("mask", mask, logp.shape)
  _check_needed(
    algorithm,
    ref_logp=ref_logp,
    sampler_logp=sampler_logp,
    teacher_logp=teacher_logp,
    divergence=divergence,
    entropy=entropy,
    entropy_coef=entropy_coef,
    nll_weights=nll_weights,
  )

  def clean(name: str, value: Array | None) -> jax.Array | None:
    """Returns the array without a gradient, 0 where masked."""
    if value is None:
      return None
    value = as_float(name, value)
    check_shape(name, value, logp.shape)
    return jax.lax.stop_gradient(jnp.where(mask, value, 0.0))

  logp = jnp.where(mask, logp, 0.0)
  current = jax.lax.stop_gradient(logp)
  old = current if old_logp is None else clean("old_logp", old_logp)
  ref, sampler = clean("ref_logp", ref_logp), clean("sampler_logp", sampler_logp)
  teacher, metrics = clean("teacher_logp", teacher_logp), {}
  advantages = _per_token(advantages, mask)
  later = {"baseline": algorithm.log_ratio_baseline}
  if ref is not None and algorithm.penalizes == "advantages":
    penalty = lookup("kl", KLS, algorithm.kl)(old, ref, jnp.ones_like(old))
    advantages += sum_later(penalty, mask, coefficient=-algorithm.beta, **later)
  if teacher is not None:
    metrics["teacher/kl"] = masked_mean(old - teacher, mask)
    if algorithm.teacher_weight > 0 and algorithm.teacher_divergence is None:
      later |= {"coefficient": algorithm.teacher_weight, "discount": algorithm.teacher_discount}
      advantages += log_ratio_advantages(teacher, old, mask, **later)
  if weights is None:
    weights = token_weights(mask, algorithm.average, max_length=max_length)
  weights, nll_weights = clean("weights", weights), clean("nll_weights", nll_weights)

  anchor = lookup("anchor", ANCHORS, algorithm.anchor)(old, old if sampler is None else sampler)
  log_ratio = lookup("ratio", RATIOS, algorithm.ratio)(logp, anchor, mask)
  region = lookup("trust_region", TRUST_REGIONS, algorithm.trust_region)
  objective, low, high = region(
    log_ratio, logp, anchor, advantages, **algorithm.settings("trust_region")
  )
  ratio = finite_exp(jax.lax.stop_gradient(log_ratio))
  metrics |= {
    "clip_ratio/low_mean": masked_mean(low, mask),
    "clip_ratio/high_mean": masked_mean(high, mask),
    "clip_ratio/region_mean": masked_mean(low | high, mask),
    "ratio/mean": masked_mean(ratio, mask),
    "ratio/max": jnp.max(ratio, where=mask, initial=0.0),
  }
  if sampler is not None:
    difference = old - sampler
    correction = correction_weights(
      algorithm.correction,
      difference,
      mask,
      advantages=advantages,
      drift=current - sampler,
      **algorithm.settings("correction"),
    )
    objective = objective * correction
    metrics |= _sampling_metrics(difference, correction, mask)
  per_token = -objective
  if ref is not None:
    estimate = lookup("kl", KLS, "k3" if algorithm.kl == "none" else algorithm.kl)
    kl = estimate(logp, ref, finite_exp(logp - anchor))
    if algorithm.beta > 0 and algorithm.kl_in == "loss":
      per_token = per_token + algorithm.beta * kl
    metrics["kl"] = masked_mean(jax.lax.stop_gradient(kl), mask)
  if divergence is not None:
    divergence = _with_gradient("divergence", divergence, mask)
    if algorithm.teacher_divergence is not None:
      per_token = per_token + algorithm.teacher_weight * divergence
    metrics["teacher/divergence"] = masked_mean(jax.lax.stop_gradient(divergence), mask)
  if algorithm.sampler_penalty > 0:
    per_token = per_token + algorithm.sampler_penalty * (logp - sampler) ** 2
  if entropy is not None:
    entropy = _with_gradient("entropy", entropy, mask)
    if algorithm.needs_entropy:
      coef = (
        algorithm.entropy_bonus if entropy_coef is None else as_float("entropy_coef", entropy_coef)
      )
      coef = jnp.broadcast_to(jax.lax.stop_gradient(coef), logp.shape)
      per_token = per_token - coef * entropy
      metrics["entropy_coef"] = masked_mean(coef, mask)
    metrics["entropy"] = masked_mean(jax.lax.stop_gradient(entropy), mask)
  loss = jnp.sum(jnp.where(mask, weights * per_token, 0.0))
  if algorithm.nll_weight > 0:
    loss = loss - algorithm.nll_weight * jnp.sum(nll_weights * logp)
    metrics["nll"] = masked_mean(jnp.where(nll_weights > 0, -current, 0.0), mask)
  return loss, metrics


def _with_gradient(name: str, value: Array, mask: jax.Array) -> jax.Array:
  """Returns numbers of tokens, 0 where masked, with their gradient."""
  value = as_float(name, value)
  check_shape(name, value, mask.shape)
  return jnp.where(mask, value, 0.0)


def _check_needed(algorithm: Algorithm, **given: Array | float | None) -> None:
  """Raises if the row needs an argument that is missing."""
  if algorithm.beta > 0 and given["ref_logp"] is None:
    raise ValueError(
      f"beta={algorithm.beta} needs ref_logp, the reference's log-probabilities; pass them, or "
      "use dataclasses.replace(algorithm, beta=0.0) to train without a reference"
    )
  if algorithm.correction != "none" and given["sampler_logp"] is None:
    raise ValueError(f"correction={algorithm.correction!r} needs sampler_logp")
  sampled = algorithm.teacher_weight > 0 and algorithm.teacher_divergence is None
  needs = {
    "teacher_divergence": (
      algorithm.teacher_divergence is not None,
      "divergence",
      ", the divergence of each token's distribution to the teacher's, from head_divergence",
    ),
    "teacher_weight": (
      sampled,
      "teacher_logp",
      ", the teacher's log-probabilities of the drawn tokens",
    ),
    "sampler_penalty": (algorithm.sampler_penalty > 0, "sampler_logp", ""),
    "entropy_bonus": (algorithm.needs_entropy, "entropy", ", as `head_logprobs` returns it"),
    "entropy_target": (
      algorithm.entropy_target is not None,
      "entropy_coef",
      ", the coefficient as it is now; TrainState.create(..., algorithm=) starts it for a step",
    ),
    "nll_weight": (algorithm.nll_weight > 0, "nll_weights", "; see `algorithms.nll_weights`"),
  }
  for name, (holds, argument, hint) in needs.items():
    if holds and given[argument] is None:
      raise ValueError(f"{name}={getattr(algorithm, name)} needs {argument}{hint}")


def _per_token(advantages: Array, mask: jax.Array) -> jax.Array:
  """Returns advantages with a token axis, 0 where masked."""
  advantages = as_float("advantages", advantages)
  if advantages.shape == mask.shape[:-1]:
    advantages = jnp.broadcast_to(advantages[..., None], mask.shape)
  elif advantages.shape != mask.shape:
    raise ValueError(
      f"advantages has shape {advantages.shape}, expected {mask.shape[:-1]} (one per sequence) "
      f"or {mask.shape} (one per token)"
    )
  return jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))


def _sampling_metrics(difference: jax.Array, correction: jax.Array, mask: jax.Array) -> Metrics:
  """Returns the distance of the sampler from the trainer, and the weights that correct for it."""
  difference = jnp.abs(difference)
  name = "sampling/importance_sampling_ratio"
  return {
    "sampling/sampling_logp_difference/mean": masked_mean(difference, mask),
    "sampling/sampling_logp_difference/max": jnp.max(difference, initial=0.0),
    f"{name}/min": jnp.where(mask.any(), jnp.min(correction, where=mask, initial=jnp.inf), 0.0),
    f"{name}/mean": masked_mean(correction, mask),
    f"{name}/max": jnp.max(correction, where=mask, initial=0.0),
  }
