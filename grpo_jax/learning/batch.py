"""Batches on the device, cut and put in another order; their layout stays as it was."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from grpo_jax.distributed import hosts
from grpo_jax.learning.step import Batch

SHORTEST = 16  # tokens; padding is not cut off below that


def select(batch: Batch, rows: np.ndarray, pad_prompts_to_multiple: int) -> Batch:
  """Those prompts of a batch, filled up with empty ones to a multiple of `pad_prompts_to_multiple`, at least one.

  An empty prompt is a copy of the first, with nothing unmasked in its completions.
  """
  size = pad_prompts_to_multiple * max(-(-len(rows) // pad_prompts_to_multiple), 1)
  chosen = np.concatenate([rows, np.zeros(size - len(rows), np.int64)])
  return _select(batch, chosen, np.arange(size) < len(rows), batch.mask.sharding)


@partial(jax.jit, static_argnames="layout")
def _select(batch: Batch, rows: jax.Array, real: jax.Array, layout: Any) -> Batch:
  batch, real = rows_of(batch, rows, layout), real[:, None, None]
  return dataclasses.replace(
    batch, mask=batch.mask & real, weights=jnp.where(real, batch.weights, 0.0)
  )


def trim(
  batch: Batch, prompt_tokens: Int[np.ndarray, "P"], lengths: Int[np.ndarray, "P G"]
) -> tuple[Batch, float]:
  """A batch without the padding that all its rows share, and the share of padding that is left.

  Prompts lose slots at their beginning, completions at their end, down to a size of `sizes`.

  Args:
    prompt_tokens, lengths: of the real rows of the batch.
  """
  group, most = batch.mask.shape[1], (batch.prompts.shape[1], batch.mask.shape[2])
  used = (prompt_tokens.max(initial=0), lengths.max(initial=0))
  n, t = (min(size for size in sizes(full) if size >= least) for full, least in zip(most, used))
  left = 1 - (prompt_tokens.sum() + lengths.sum()) / (len(batch.mask) * (n + group * t))
  return batch if (n, t) == most else _trim(batch, n, t, batch.mask.sharding), float(left)


def sizes(full: int) -> list[int]:
  """The lengths that the update is compiled for: halves of the longest, thrice at most.

  >>> sizes(512), sizes(36), sizes(5)
  ([512, 256, 128, 64], [36, 18], [5])
  """
  return [full] + [n for i in (1, 2, 3) if (n := -(-full // 2**i)) >= SHORTEST]


@partial(jax.jit, static_argnums=(1, 2, 3))
def _trim(batch: Batch, n: int, t: int, layout: Any) -> Batch:
  cut = {"prompts": batch.prompts[:, -n:], "prompt_mask": batch.prompt_mask[:, -n:]}
  for field in dataclasses.fields(batch):
    array = getattr(batch, field.name)
    if field.name not in cut and array is not None and array.ndim == 3:
      cut[field.name] = array[..., :t]
  return laid_out(dataclasses.replace(batch, **cut), layout)


def mini_batches(batch: Batch, count: int, epochs: int, seed: Sequence[int]) -> Iterator[Batch]:
  """`epochs` times the prompts of a batch in a new order, cut into `count` equal parts.

  Token weights are multiplied by `count`: each part is an estimate of the loss of the whole, and
  their mean is that loss. The orders are a function of `seed`. One part of one epoch is the batch.

  Args:
    seed: integers, such as (seed of the run, step).
  """
  if count == epochs == 1:
    yield batch
    return
  prompts = batch.mask.shape[0]
  layout = batch.mask.sharding
  for epoch in range(epochs):
    order = np.random.default_rng([*seed, epoch]).permutation(prompts)
    for rows in np.split(order, count):
      yield _part(batch, hosts.to_all(rows, layout), count, layout)


@partial(jax.jit, static_argnums=(2, 3))
def _part(batch: Batch, rows: jax.Array, count: int, layout: Any) -> Batch:
  part = rows_of(batch, rows, layout)
  return dataclasses.replace(part, weights=part.weights * count)


def rows_of(tree: Any, rows: jax.Array, layout: Any) -> Any:
  """These rows of all arrays, inside a jitted function."""
  return jax.tree.map(lambda a: laid_out(a[rows], layout), tree)


def laid_out(tree: Any, layout: Any, spec: P | None = None) -> Any:
  """Constrains the layout inside a jitted function; None leaves it open."""
  if layout is None:
    return tree
  layout = layout if spec is None else NamedSharding(layout.mesh, spec)
  return jax.lax.with_sharding_constraint(tree, layout)
