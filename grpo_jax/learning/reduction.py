"""Adds up gradients and metrics over micro-batches, whose number follows a budget of tokens."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.core.masks import count_tokens
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.skipping import SKIPPED

# (params, batch, base_params) -> (gradient, loss, metrics)
Gradient = Callable[[Any, Batch, Any], tuple[Any, jax.Array, dict[str, jax.Array]]]


def split(batch: Batch, count: int) -> Batch:
  """Returns the batch cut into `count` micro-batches along a new first axis.

  Each micro-batch takes an equal share of every device's prompts. Contiguous blocks of prompts
  would leave devices idle in turn.
  """
  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)


def make_gradient(loss: Callable, micro_batches: int = 1) -> Gradient:
  """Returns the gradient of a loss over a batch, accumulated over micro-batches.

  Args:
    loss: `(params, batch, base_params) -> (loss, metrics)`; the losses of the micro-batches of a
      batch add up to its loss.
    micro_batches: number of gradient accumulation steps; changes memory, not the result.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def whole(params: Any, batch: Batch, base_params: Any):
    (value, metrics), grads = gradient(params, batch, base_params)
    return grads, value, metrics

  def accumulated(params: Any, batch: Batch, base_params: Any):
    total = jnp.maximum(count_tokens(batch.mask), 1)

    def add(grads, part):
      new, value, metrics = whole(params, part, base_params)
      return jax.tree.map(jnp.add, grads, new), (value, metrics, count_tokens(part.mask) / total)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (losses, metrics, shares) = jax.lax.scan(add, zeros, split(batch, micro_batches))
    return grads, losses.sum(), combine(metrics, shares)

  return whole if micro_batches == 1 else accumulated


def combine(
  metrics: dict[str, Float[Array, "M"]], shares: Float[Array, "M"]
) -> dict[str, Float[Array, ""]]:
  """Returns the metrics of a batch from those of its M micro-batches.

  Metrics are averaged, weighted by `shares`; those named `.../max` and `.../min` are extremes, of
  the micro-batches that have tokens.

  Args:
    shares: each micro-batch's share of the tokens; sums to 1.

  Example:
    >>> metrics = {"kl": jnp.array([1.0, 3.0]), "kl/max": jnp.array([1.0, 3.0])}
    >>> combined = combine(metrics, jnp.array([0.25, 0.75]))
    >>> float(combined["kl"]), float(combined["kl/max"])
    (2.5, 3.0)
  """
  counts = (shares > 0) | ~(shares > 0).any()  # all of them, if the whole batch is empty

  def one(name: str, values: jax.Array) -> jax.Array:
    if name.endswith("/max"):
      return values.max(where=counts, initial=-jnp.inf)
    if name.endswith("/min"):
      return values.min(where=counts, initial=jnp.inf)
    return jnp.sum(values * shares)

  return {name: one(name, values) for name, values in metrics.items()}


@jax.jit
def average(metrics: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the metrics of several updates as those of one rollout.

  Metrics are averaged; those named `.../max` and `.../min` are extremes, and skipped updates are
  counted.
  """
  shares = jnp.full(len(metrics), 1 / len(metrics))
  stacked = {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
  counts = {name: stacked[name].sum() for name in (SKIPPED,) if name in stacked}
  return combine(stacked, shares) | counts


def count_micro_batches(
  prompts: int, tokens: int, *, budget: int, prompt_shards: int, least: int = 1
) -> int:
  """Returns the fewest equal micro-batches that hold at most `budget` tokens per device.

  The result is a multiple of `least`. A micro-batch holds at least one prompt per device, whose
  tokens may exceed the budget.

  Args:
    prompts: number of prompts in the batch, a multiple of `prompt_shards * least`.
    tokens: tokens of one prompt with its completions, padding included: N + G * T; those of one
      device where `context` splits them.
    budget: tokens per device and micro-batch; 0 is no limit.
    prompt_shards: number of shards that devices hold the prompts in (`mesh.prompt_shards`).
    least: the smallest number of micro-batches.

  Example:
    >>> count_micro_batches(32, 300, budget=1200, prompt_shards=2)  # 16 prompts a device, 4 at once
    4
  """
  per_device = prompts // prompt_shards
  counts = [n for n in range(least, per_device + 1, least) if per_device % n == 0]
  return next((n for n in counts if per_device // n * tokens <= budget or not budget), counts[-1])


class WithinBudget:
  """Calls `make(number of micro-batches)(first, batch, *rest)` for the number a batch needs.

  The number depends only on the shape of the batch, and a new shape compiles anyway.

  Args:
    make: number of micro-batches -> a jitted function whose second argument is a batch.
    budget, prompt_shards, least: as in `count_micro_batches`.
    token_shards: number of shards that devices hold the tokens of a row in.
  """

  def __init__(
    self,
    make: Callable[[int], Callable],
    *,
    budget: int,
    prompt_shards: int,
    token_shards: int = 1,
    least: int = 1,
  ) -> None:
    self._make, self._token_shards = functools.cache(make), token_shards
    self._limits = {"budget": budget, "prompt_shards": prompt_shards, "least": least}

  def program(self, batch: Batch) -> Any:
    """Returns the function for batches of this shape."""
    (prompts, n), (_, group, t) = batch.prompts.shape, batch.mask.shape
    tokens = -(-(n + group * t) // self._token_shards)
    return self._make(count_micro_batches(prompts, tokens, **self._limits))

  def __call__(self, first: Any, batch: Batch, *rest: Any) -> Any:
    return self.program(batch)(first, batch, *rest)

  def trace(self, first: Any, batch: Batch, *rest: Any) -> Any:
    """Traces the program as `jax.jit` does, for arrays or for shapes with a sharding."""
    return self.program(batch).trace(first, batch, *rest)

  def lower(self, first: Any, batch: Batch, *rest: Any) -> Any:
    """Lowers the program as `jax.jit` does."""
    return self.program(batch).lower(first, batch, *rest)
