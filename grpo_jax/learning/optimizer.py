"""Builds the optimizer behind a global-norm clip, and its schedule: a warm-up and a decay."""

import inspect
import re
from collections.abc import Callable

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
  name: str = "adamw",
  beta1: float = 0.9,
  beta2: float = 0.99,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
) -> optax.GradientTransformation:
  """Returns an optimizer on gradients whose global norm is clipped.

  | `name`      | state per parameter of a matrix [in, out]                              |
  |-------------|------------------------------------------------------------------------|
  | `adamw`     | two numbers                                                            |
  | `muon`      | one number; two in embedding, head and vectors, which Adam updates     |
  | `adafactor` | 1 / in + 1 / out, if both are 128 or more; one number otherwise        |

  Learning rates of Adam serve all of them: Muon's update is scaled to a root mean square of 0.2
  times the learning rate, as Adam's often has, Adafactor's to at most 1 times, and the size of a
  parameter has no influence. Muon updates each of the stacked layers alone; Adafactor limits the
  size for all layers of a matrix together.

  Args:
    schedule: learning rate by step.
    name: a key of `OPTIMIZERS`.
    beta1, beta2, eps: decay rates of the two moments, and the constant added to the denominator.
      `adafactor` has none of them: no first moment, and a decay of 1 - t^-0.8. In `muon` they are
      those of its Adam, which has Nesterov's momentum; the momentum of its matrices is 0.95.
    weight_decay: decoupled weight decay; applies to matrices (embedding, head and adapters
      included), not to norm weights and biases, stacked or not, nor to other vectors.
    clip_norm: largest global norm of the gradient; 0 does not clip.

  Raises:
    ValueError: there is no optimizer of that name.

  References:
    Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2 (AdamW). Liu et al. 2025, arXiv
    2502.16982, section 2.2 (Muon, and its scale). Shazeer and Stern 2018, arXiv 1804.04235,
    algorithm 4, without relative step sizes (Adafactor).

  Example:
    >>> optimizer = make_optimizer(optax.constant_schedule(0.1), eps=0.0)
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = optimizer.update({"w": jnp.array([3.0, -4.0])}, optimizer.init(params), params)
    >>> updates["w"].round(3).tolist()  # Adam's first update has the size of the learning rate
    [-0.1..., 0.1...]
  """
  if name not in OPTIMIZERS:
    raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
  make = OPTIMIZERS[name]
  settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
  optimizer = make(schedule, **{name: settings[name] for name in settings_of(make)})
  return optax.chain(_clip(clip_norm), optimizer) if clip_norm > 0 else optimizer


def _adamw(
  schedule: optax.Schedule, *, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
  return optax.adamw(
    schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
  )


def _adafactor(schedule: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
  # As in `optax.adafactor`, but for the decay, which the learning rate multiplies as in AdamW.
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(weight_decay, mask=_is_matrix),
    optax.scale_by_learning_rate(schedule),
  )


def _muon(
  schedule: optax.Schedule, *, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
  return optax.contrib.muon(
    schedule,
    eps=eps,
    weight_decay=weight_decay,
    weight_decay_mask=_is_matrix,
    adam_b1=beta1,
    adam_b2=beta2,
    adam_weight_decay=weight_decay,
    muon_weight_dimension_numbers=_orthogonalized,
    consistent_rms=0.2,
  )


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}


def settings_of(make: Callable[..., optax.GradientTransformation]) -> list[str]:
  """Returns the settings that an entry of `OPTIMIZERS` takes.

  Example:
    >>> settings_of(OPTIMIZERS["adafactor"])
    ['weight_decay']
  """
  return [
    name
    for name, parameter in inspect.signature(make).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]


def _orthogonalized(params: dict) -> dict:
  """Returns the axes of the matrices that Muon updates: all but embedding and head."""

  def one(path: tuple, is_matrix: bool) -> optax.contrib.MuonDimensionNumbers | None:
    table = jax.tree_util.keystr(path, simple=True, separator="/").endswith(("embed", "head"))
    return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix and not table else None

  return jax.tree_util.tree_map_with_path(one, _is_matrix(params))


def _clip(limit: float) -> optax.GradientTransformation:
  """Returns `optax.clip_by_global_norm`, written as a product."""

  # XLA:CPU: the quotient of optax's version is kept in memory for the whole gradient.
  def clip(grads: optax.Updates, _: optax.Params) -> optax.Updates:
    norm = optax.tree.norm(grads)
    return optax.tree.scale(jnp.where(norm < limit, 1.0, limit / norm), grads)

  return optax.stateless(clip)


def _is_matrix(params: dict) -> dict:
  """Returns a tree that is true for matrices and false for vectors.

  Norm weights, biases and attention sinks of stacked layers are [L, D] or longer, so their names
  tell them from matrices.
  """

  def one(path: tuple, leaf: jax.Array) -> bool:
    name = jax.tree_util.keystr(path)
    return leaf.ndim > 1 and not any(vector in name for vector in ("norm", "bias", "sinks"))

  return jax.tree_util.tree_map_with_path(one, params)


def frozen(optimizer: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
  """Returns an optimizer that leaves some parameters as they are.

  Their gradients count in no norm that the optimizer clips by, and they do not decay.

  Args:
    pattern: regular expression on the end of a parameter's path, such as `layers/router`.

  Example:
    >>> optimizer = frozen(optax.sgd(1.0), "router")
    >>> params = {"router": jnp.ones(1), "q": jnp.ones(1)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["router"].tolist(), updates["q"].tolist()
    ([0.0], [-1.0])
  """

  def matches(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: (
        re.search(f"(^|/)(?:{pattern})$", jax.tree_util.keystr(path, simple=True, separator="/"))
        is not None
      ),
      params,
    )

  zero = optax.masked(optax.set_to_zero(), matches)
  return optax.chain(zero, optimizer, zero)
