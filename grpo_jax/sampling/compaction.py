"""Rows that still live, moved together, so that those that have ended stop costing.

Completions lie as [C, g]: C chunks of g of the same prompt, which a chunk reads once. At first a
chunk is a whole group. When few enough rows live, they go into chunks that are fewer or smaller,
in arrays of the next static shape. The batch is cut into S shards, one for each part of the devices
that prompts are split over, and no row leaves its block.

Axes: S shards, C chunks of a block, g completions of a chunk. A program holds chunks of all shards
one after another, as [S C, g].
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_NOWHERE = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
  """Room for `chunks` x `width` rows in each block."""

  chunks: int
  width: int


@partial(
  jax.tree_util.register_dataclass, data_fields=["prompt", "original_index"], meta_fields=["count"]
)
@dataclasses.dataclass(frozen=True)
class RowMap:
  """Which completion each row is.

  Attributes:
    prompt: [S, C], number of each chunk's prompt in its block; chunks with rows come in its order.
    original_index: [S, C, g], number of the completion in its block, prompt after prompt; `_NOWHERE` where
      a place is empty.
    count: prompts of a block.
  """

  prompt: Int[Array, "S C"]
  original_index: Int[Array, "S C g"]
  count: int


def shapes(prompts: int, group: int, max_compactions: int) -> list[Shape]:
  """The shapes of a block on its way, each with half the rows of the one before, down to one row.

  Chunks get small faster than rows get few: with g = G / 2 a prompt of which slightly more than
  half lives would need two.

  >>> [(one.chunks, one.width) for one in shapes(4, 8, max_compactions=9)]
  [(4, 8), (8, 2), (8, 1), (4, 1), (2, 1), (1, 1)]
  """
  found, rows = [Shape(prompts, group)], prompts * group
  for i in range(max_compactions):
    rows = -(-rows // 2)
    width = max(group >> (i + 2), 1)
    one = Shape(-(-rows // width), width)
    if one == found[-1]:
      break
    found.append(one)
  return found


def start(shards: int, shape: Shape) -> RowMap:
  """Every group is a chunk."""
  size = (shards, shape.chunks, shape.width)
  original_index = jnp.arange(shape.chunks * shape.width, dtype=jnp.int32).reshape(size[1:])
  prompt = jnp.arange(shape.chunks, dtype=jnp.int32)
  return RowMap(
    jnp.broadcast_to(prompt, size[:2]), jnp.broadcast_to(original_index, size), shape.chunks
  )


def fits(row_map: RowMap, live: Bool[Array, "SC g"], shape: Shape) -> Bool[Array, ""]:
  """Whether the rows that live have room in that shape, in every block."""
  needed = -(-_alive(row_map, live) // shape.width)
  return (needed.sum(-1) <= shape.chunks).all()


@dataclasses.dataclass(frozen=True)
class Gather:
  """The way from one shape to the next.

  Attributes:
    source: [S, C g], for each new row the number of the old one in its block.
    chunk: [S, C], the same of chunks.
    valid: [S C, g], new rows that are one; the others are copies that nobody asked for.
  """

  source: Int[Array, "S n"]
  chunk: Int[Array, "S C"]
  valid: Bool[Array, "SC g"]

  def rows(self, tree: Any, axis: int = 0) -> Any:
    """The rows of arrays that have [S C, g] from `axis` on, as [S C', g']."""
    shape = (-1, self.valid.shape[-1])
    return jax.tree.map(lambda a: _take(a, self.source, axis, 2, shape), tree)

  def flat_rows(self, tree: Any, axis: int = 0) -> Any:
    """The same of arrays that have all rows on one axis, [S C g], as [S C' g']."""
    return jax.tree.map(lambda a: _take(a, self.source, axis, 1, (-1,)), tree)

  def chunks(self, tree: Any, axis: int = 0) -> Any:
    """The chunks of arrays that have [S C] at `axis`, as [S C']."""
    return jax.tree.map(lambda a: _take(a, self.chunk, axis, 1, (-1,)), tree)


def regroup(row_map: RowMap, live: Bool[Array, "SC g"], shape: Shape) -> tuple[RowMap, Gather]:
  """The rows that live, put into that shape, which they must fit."""

  def one(prompt, original_index, live, alive):  # [C], [n], [n], [P]
    chunks = -(-alive // shape.width)
    before, own = (jnp.cumsum(a) - a for a in (chunks, alive))
    of = jnp.repeat(prompt, live.size // prompt.size)
    # Living rows of a prompt follow each other, so that counts before them give their rank in it.
    place = before[of] * shape.width + jnp.cumsum(live) - 1 - own[of]
    size = shape.chunks * shape.width
    source = jnp.full(size, live.size).at[jnp.where(live, place, size)]
    source = source.set(jnp.arange(live.size), mode="drop")
    valid, source = source < live.size, jnp.minimum(source, live.size - 1)
    return source, jnp.where(valid, original_index[source], _NOWHERE), valid

  alive = _alive(row_map, live)
  shards, _, width = row_map.original_index.shape
  flat = (row_map.original_index.reshape(shards, -1), live.reshape(shards, -1))
  source, original_index, valid = jax.vmap(one)(row_map.prompt, *flat, alive)
  chunk = source[:, :: shape.width] // width
  prompt = jnp.take_along_axis(row_map.prompt, chunk, axis=1)
  row_map = RowMap(prompt, original_index.reshape(shards, shape.chunks, shape.width), row_map.count)
  return row_map, Gather(source, chunk, valid.reshape(-1, shape.width))


def scatter_rows(tree: Any, row_map: RowMap, rows: Any) -> Any:
  """`tree` [S P, G, ...] with the rows [S C, g, ...] written where they belong."""

  def one(all_rows: Array, some: Array) -> Array:
    shards = row_map.original_index.shape[0]
    every = all_rows.reshape(shards, -1, *all_rows.shape[2:])
    some = some.reshape(shards, -1, *some.shape[2:])
    original_index = row_map.original_index.reshape(shards, -1)
    put = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))(every, original_index, some)
    return put.reshape(all_rows.shape)

  return jax.tree.map(one, tree, rows)


def _alive(row_map: RowMap, live: Bool[Array, "SC g"]) -> Int[Array, "S P"]:
  """Rows of each prompt that live."""
  per_chunk = live.sum(-1, dtype=jnp.int32).reshape(row_map.prompt.shape)
  zeros = jnp.zeros((row_map.prompt.shape[0], row_map.count), jnp.int32)
  return jax.vmap(lambda a, i, n: a.at[i].add(n))(zeros, row_map.prompt, per_chunk)


def _take(array: Array, index: Array, axis: int, axes: int, shape: tuple[int, ...]) -> Array:
  """Along `axes` axes from `axis` on, which hold the shards one after another.

  What lies before them, layers, goes one after another: a compiler that lays out the rows anew for
  this copies one layer then, not a whole cache.
  """
  if axis % array.ndim:
    return jax.lax.map(lambda a: _take(a, index, axis % array.ndim - 1, axes, shape), array)
  after = array.shape[axes:]
  blocked = array.reshape(index.shape[0], -1, *after)
  return jax.vmap(lambda a, i: a[i])(blocked, index).reshape(*shape, *after)
