"""Chooses the number of micro-batches of a batch by a budget of tokens."""

import functools
from collections.abc import Callable
from typing import Any


def count_micro_batches(
  prompts: int, tokens: int, *, budget: int, prompt_shards: int, least: int = 1
) -> int:
  """Returns the fewest equal micro-batches that hold at most `budget` tokens per device.

  The result is a multiple of `least`. A micro-batch holds at least one prompt per device, whose
  tokens may exceed the budget.

  Args:
    prompts: number of prompts in the batch, a multiple of `prompt_shards * least`.
    tokens: tokens of one prompt with its completions, padding included: N + G * T.
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
  """

  def __init__(
    self, make: Callable[[int], Callable], *, budget: int, prompt_shards: int, least: int = 1
  ) -> None:
    self._make = functools.cache(make)
    self._limits = {"budget": budget, "prompt_shards": prompt_shards, "least": least}

  def program(self, batch: Any) -> Any:
    """Returns the function for batches of this shape."""
    (prompts, n), (_, group, t) = batch.prompts.shape, batch.mask.shape
    return self._make(count_micro_batches(prompts, n + group * t, **self._limits))

  def __call__(self, first: Any, batch: Any, *rest: Any) -> Any:
    return self.program(batch)(first, batch, *rest)

  def trace(self, first: Any, batch: Any, *rest: Any) -> Any:
    """Traces the program as `jax.jit` does, for arrays or for shapes with a sharding."""
    return self.program(batch).trace(first, batch, *rest)

  def lower(self, first: Any, batch: Any, *rest: Any) -> Any:
    """Lowers the program as `jax.jit` does."""
    return self.program(batch).lower(first, batch, *rest)
