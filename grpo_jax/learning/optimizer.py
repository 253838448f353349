"""Builds the optimizer: AdamW behind a global-norm clip, with a warm-up and a decay."""

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
  """Returns the learning rate as a function of the optimizer step, counted from 0.

  Args:
    learning_rate: the peak.
    schedule: decay after the warm-up: `constant`, `linear` or `cosine`.
    warmup_steps: number of steps of linear rise; the first step has
      `learning_rate / (warmup_steps + 1)`.
    steps: step at which the decay ends, warm-up included.
    final_fraction: share of the peak at the end of the decay.

  Raises:
    ValueError: there is no schedule of that name.

  Example:
    >>> rate = learning_rate_schedule(learning_rate=1.0, schedule="linear", warmup_steps=1,
    ...                               steps=5, final_fraction=0.5)
    >>> [float(rate(step)) for step in (0, 1, 3, 5, 9)]
    [0.5, 1.0, 0.75, 0.5, 0.5]
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
  decay = SCHEDULES[schedule](learning_rate, max(steps - warmup_steps, 1), final_fraction)
  if warmup_steps == 0:
    return decay
  start = learning_rate / (warmup_steps + 1)
  warmup = optax.linear_schedule(start, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
  schedule: optax.Schedule,
  *,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Returns AdamW on gradients whose global norm is clipped.

  Args:
    schedule: learning rate by step.
    beta1, beta2, eps: decay rates of the two moments, and the constant added to the denominator.
    weight_decay: decoupled weight decay; applies to matrices (embedding, head and adapters
      included), not to norm weights and biases, stacked or not, nor to other vectors.
    clip_norm: largest global norm of the gradient; 0 does not clip.

  References:
    Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.

  Example:
    >>> optimizer = make_optimizer(optax.constant_schedule(0.1), beta1=0.9, beta2=0.99, eps=0.0,
    ...                            weight_decay=0.0, clip_norm=1.0)
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = optimizer.update({"w": jnp.array([3.0, -4.0])}, optimizer.init(params), params)
    >>> updates["w"].round(3).tolist()  # Adam's first update has the size of the learning rate
    [-0.1..., 0.1...]
  """
  adamw = optax.adamw(
    schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
  )
  return optax.chain(_clip(clip_norm), adamw) if clip_norm > 0 else adamw


def _clip(limit: float) -> optax.GradientTransformation:
  """Returns `optax.clip_by_global_norm`, written as a product."""

  # XLA:CPU: the quotient of optax's version is kept in memory for the whole gradient.
  def clip(grads: optax.Updates, _: optax.Params) -> optax.Updates:
    norm = optax.tree.norm(grads)
    return optax.tree.scale(jnp.where(norm < limit, 1.0, limit / norm), grads)

  return optax.stateless(clip)


def _is_matrix(params: dict) -> dict:
  """Returns a tree that is true for matrices and false for vectors.

  Norm weights and biases of stacked layers are [L, D], so their names tell them from matrices.
  """

  def one(path: tuple, leaf: jax.Array) -> bool:
    name = jax.tree_util.keystr(path)
    return leaf.ndim > 1 and "norm" not in name and "bias" not in name

  return jax.tree_util.tree_map_with_path(one, params)
