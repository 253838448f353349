"""Adds up gradients and metrics over micro-batches, whose number follows a budget of tokens."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.masks import count_tokens
from grpo_jax.learning.batch import PER_PROMPT, Batch, shorten, sizes
from grpo_jax.learning.skipping import SKIPPED

# (params, batch, base_params) -> (gradient, loss, metrics)
Gradient = Callable[[Any, Batch, Any], tuple[Any, jax.Array, dict[str, jax.Array]]]


def split(batch: Batch, count: int) -> Batch:
  """Returns the batch cut into `count` micro-batches along a new first axis.

  Each micro-batch takes an equal share of every device's prompts. Contiguous blocks of prompts
  would leave devices idle in turn.
  """
  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)


def group_parts(prompt: int, group: int, length: int) -> int:
  """Returns the number of parts, 4, 2 or 1, that `by_length` cuts a group into.

  Each part computes the prompt again, which may cost 1 / parts of the completions at most.

  Args:
    prompt, group, length: N, G and T of the batch.

  Example:
    >>> group_parts(256, 8, 4096), group_parts(512, 6, 4096), group_parts(2048, 8, 512)
    (4, 2, 1)
  """
  fits = (p for p in (4, 2) if group % p == 0 and p * p * prompt <= group * length)
  return next(fits, 1)


def by_length(batch: Batch, count: int) -> tuple[Batch, Callable[[Array], Array]]:
  """Puts completions of similar lengths together, in a group and in the micro-batches of `split`.

  A group is cut into parts, the shortest completions first, each with a copy of its prompt; the
  first micro-batch has the shortest parts. A length reaches up to the last unmasked token.

  Args:
    count: number of micro-batches, which divides P.

  Returns:
    The batch, of `group_parts` times as many prompts, and a function that brings a number per token
    back into the order of the batch that was given.
  """
  prompts, group, length = batch.mask.shape
  # The load-balance loss counts the tokens of prompts: copies would change it.
  copies = batch.balance is None
  parts = group_parts(batch.prompts.shape[1], group, length) if copies else 1
  in_group = jnp.argsort(_lengths(batch.mask), axis=1)

  def in_order(name: str, array: Array) -> Array:
    if array.ndim == 1 or name in PER_PROMPT:
      return jnp.repeat(array, parts, axis=0)
    return _along_group(array, in_group).reshape(-1, group // parts, *array.shape[2:])

  arrays = {name: in_order(name, array) for name, array in batch.arrays().items()}
  longest = _lengths(arrays["mask"]).max(1)
  order = jnp.argsort(longest).reshape(count, -1).T.reshape(-1)  # row i of part j to i * count + j
  arrays = {name: array[order] for name, array in arrays.items()}

  def restore(numbers: Array) -> Array:
    numbers = numbers[jnp.argsort(order)].reshape(prompts, group, length)
    return _along_group(numbers, jnp.argsort(in_group, axis=1))

  return dataclasses.replace(batch, **arrays), restore


def _along_group(array: Array, index: Int[Array, "P G"]) -> Array:
  return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1)


def _lengths(mask: Bool[Array, "P G T"]) -> Int[Array, "P G"]:
  """Returns the number of tokens of each completion, up to the last unmasked one."""
  return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[2] + 1), 0), axis=2)


def at_own_length(function: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
  """Calls `function(batch)` with completions cut to the shortest of `batch.sizes` that holds them.

  One program holds the function for each of these lengths, and chooses when it runs.
  """

  def call(batch: Batch):
    lengths = sizes(batch.mask.shape[2])
    longest = _lengths(batch.mask).max()
    index = jnp.sum(longest <= jnp.array(lengths[1:], jnp.int32))
    branches = [lambda batch, t=t: function(shorten(batch, t)) for t in lengths]
    return jax.lax.switch(index, branches, batch)

  return call


def make_gradient(
  loss: Callable, micro_batches: int = 1, *, sort_by_length: bool = False
) -> Gradient:
  """Returns the gradient of a loss over a batch, accumulated over micro-batches.

  Args:
    loss: `(params, batch, base_params) -> (loss, metrics)`; the losses of the micro-batches of a
      batch add up to its loss.
    micro_batches: number of gradient accumulation steps; changes memory, not the result.
    sort_by_length: puts completions of similar lengths together (`by_length`), and computes each
      micro-batch at its own length; changes work, not the result.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def whole(params: Any, batch: Batch, base_params: Any):
    (value, metrics), grads = gradient(params, batch, base_params)
    return grads, value, metrics

  def accumulated(params: Any, batch: Batch, base_params: Any):
    total = jnp.maximum(count_tokens(batch.mask), 1)
    compute = partial(whole, params, base_params=base_params)
    if sort_by_length:
      (batch, _), compute = by_length(batch, micro_batches), at_own_length(compute)

    def add(grads, part):
      new, value, metrics = compute(part)
      return jax.tree.map(jnp.add, grads, new), (value, metrics, count_tokens(part.mask) / total)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (losses, metrics, shares) = jax.lax.scan(add, zeros, split(batch, micro_batches))
    return grads, losses.sum(), combine(metrics, shares)

  return whole if micro_batches == 1 else accumulated


def map_micro_batches(
  function: Callable[[Batch], Float[Array, "p G t"]],
  batch: Batch,
  micro_batches: int,
  *,
  sort_by_length: bool = False,
) -> Float[Array, "P G T"]:
  """Returns a number per token, computed one micro-batch after another.

  Args:
    function: micro-batch -> a number for each of its tokens.
    micro_batches, sort_by_length: as in `make_gradient`.
  """
  if micro_batches == 1:
    return function(batch)
  length = batch.mask.shape[2]

  def padded(part: Batch) -> Float[Array, "p g T"]:
    numbers = function(part)
    return jnp.pad(numbers, [(0, 0), (0, 0), (0, length - numbers.shape[2])])

  compute, restore = function, None
  if sort_by_length:
    (batch, restore), compute = by_length(batch, micro_batches), at_own_length(padded)
  numbers = jax.lax.map(compute, split(batch, micro_batches))
  numbers = numbers.swapaxes(0, 1).reshape(batch.mask.shape)
  return restore(numbers) if restore else numbers


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
