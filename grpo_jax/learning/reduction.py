"""Micro-batches by a budget of tokens: how many parts a batch is computed in follows its shape."""

import functools
from collections.abc import Callable
from typing import Any


def micro_batches(
  prompts: int, tokens: int, *, budget: int, prompt_shards: int, least: int = 1
) -> int:
  """The fewest equal parts of a batch in which a device computes at most `budget` tokens at once.

  It is a multiple of `least`, and no part is less than one prompt, whose tokens may be more.

  Args:
    prompts: in the batch, a multiple of `prompt_shards * least`.
    tokens: of one prompt with its completions, padding included: N + G * T.
    budget: 0 = none: `least` parts.
    prompt_shards: of prompts that devices hold (`mesh.prompt_shards`).

  Example:
    >>> micro_batches(32, 300, budget=1200, prompt_shards=2)  # 16 prompts a device, 4 at once
    4
  """
  here = prompts // prompt_shards
  parts = [n for n in range(least, here + 1, least) if here % n == 0]
  return next((n for n in parts if here // n * tokens <= budget or not budget), parts[-1])


def within(
  make: Callable[[int], Callable], *, budget: int, prompt_shards: int, least: int = 1
) -> Callable:
  """`make(number of micro-batches)` for each batch: a step `(state or params, batch, ...)`.

  The number depends on the batch's shape alone, for each of which a step compiles anyway.
  """
  make = functools.cache(make)

  def step(first: Any, batch: Any, *rest: Any) -> Any:
    (prompts, n), (_, group, t) = batch.prompts.shape, batch.mask.shape
    limits = {"budget": budget, "prompt_shards": prompt_shards, "least": least}
    return make(micro_batches(prompts, n + group * t, **limits))(first, batch, *rest)

  return step
