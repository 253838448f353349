"""The optimizer: AdamW behind a global-norm clip, with a warm-up and a decay."""

import jax
import jax.numpy as jnp
import optax


def _constant(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
  return optax.constant_schedule(peak)


def _linear(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
  return optax.linear_schedule(peak, peak * final_fraction, decay_steps)


def _cosine(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
  return optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction)


SCHEDULES = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate_schedule(
  *, learning_rate: float, schedule: str, warmup_steps: int, steps: int, final_fraction: float
) -> optax.Schedule:
  """Learning rate at each optimizer step, from 0.

  Args:
    learning_rate: the peak.
    schedule: `constant`, `linear` or `cosine`, after the warm-up.
    warmup_steps: steps of linear rise; the first step has `learning_rate / (warmup_steps + 1)`.
    steps: where the decay ends, warm-up included.
    final_fraction: share of the peak that is left at the end of the decay.

  Example:
    >>> rate = learning_rate_schedule(learning_rate=1.0, schedule="linear", warmup_steps=1,
    ...                               steps=5, final_fraction=0.5)
    >>> [float(rate(step)) for step in (0, 1, 3, 5, 9)]
    [0.5, 1.0, 0.75, 0.5, 0.5]
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
  after = SCHEDULES[schedule](learning_rate, max(steps - warmup_steps, 1), final_fraction)
  if warmup_steps == 0:
    return after
  start = learning_rate / (warmup_steps + 1)
  rise = optax.linear_schedule(start, learning_rate, warmup_steps)
  return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(
  schedule: optax.Schedule,
  *,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW on gradients whose global norm is held to `clip_norm` (0 = not clipped).

  Weight decay is decoupled and applies to matrices, not to norm weights.
  """
  adamw = optax.adamw(
    schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
  )
  return optax.chain(_clip(clip_norm), adamw) if clip_norm > 0 else adamw


def _clip(limit: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, but a product: XLA's CPU backend keeps quotients in memory."""

  def clip(grads: optax.Updates, _: optax.Params) -> optax.Updates:
    norm = optax.tree.norm(grads)
    return optax.tree.scale(jnp.where(norm < limit, 1.0, limit / norm), grads)

  return optax.stateless(clip)


def _is_matrix(params: dict) -> dict:
  """True on weights that multiply; norm weights are vectors, stacked or not."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: "norm" not in jax.tree_util.keystr(path), params
  )
