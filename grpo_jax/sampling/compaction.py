"""Compacts the batch as completions finish, so that finished ones cost nothing.

Completions are laid out as [C, g]: C chunks of g completions of one prompt, whose keys a chunk
reads once. At first a chunk is a whole group. When few enough rows are live, they move into
chunks that are fewer or smaller, in arrays of the next static shape. The batch is cut into S
shards, one for each part of the devices that prompts are split over, and no row leaves its shard.

Axes: S shards, C chunks of a shard, g completions of a chunk, P prompts of a shard. Programs hold
the chunks of all shards on one axis, as [S·C, g].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NOWHERE = 2**30  # index of an empty place; writes to it are dropped


@dataclasses.dataclass(frozen=True)
class Shape:
  """Room for `chunks` x `width` rows in each shard."""

  chunks: int
  width: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap:
  """Maps each row to the completion it holds.

  Attributes:
    prompt: [S, C], index of each chunk's prompt in its shard; chunks with rows are in its order.
    original_index: [S, C, g], index of the completion in its shard, prompt after prompt;
      `NOWHERE` for an empty place.
    count: number of prompts of a shard.
  """

  prompt: Int[Array, "S C"]
  original_index: Int[Array, "S C g"]
  count: int = dataclasses.field(metadata={"static": True})


def shapes(prompts: int, group: int, max_compactions: int) -> list[Shape]:
  """Returns the shapes of a shard in turn, each with half the rows of the one before.

  The last one has one row, or is number `max_compactions` after the first. Chunks shrink faster
  than the number of rows: with g = G / 2, a prompt with slightly more than half of its completions
  live would need two.

  Args:
    prompts, group: number of prompts of a shard, and of completions per prompt.

  Example:
    >>> [(shape.chunks, shape.width) for shape in shapes(4, 8, max_compactions=9)]
    [(4, 8), (8, 2), (8, 1), (4, 1), (2, 1), (1, 1)]
  """
  result, rows = [Shape(prompts, group)], prompts * group
  for i in range(max_compactions):
    rows = -(-rows // 2)
    width = max(group >> (i + 2), 1)
    shape = Shape(-(-rows // width), width)
    if shape == result[-1]:
      break
    result.append(shape)
  return result


def start(shards: int, shape: Shape) -> RowMap:
  """Returns the first row map, in which every group is a chunk."""
  size = (shards, shape.chunks, shape.width)
  original_index = jnp.arange(shape.chunks * shape.width, dtype=jnp.int32).reshape(size[1:])
  prompt = jnp.arange(shape.chunks, dtype=jnp.int32)
  return RowMap(
    jnp.broadcast_to(prompt, size[:2]), jnp.broadcast_to(original_index, size), shape.chunks
  )


def fits(row_map: RowMap, live: Bool[Array, "SC g"], shape: Shape) -> Bool[Array, ""]:
  """Returns whether the live rows have room in that shape, in every shard."""
  needed = -(-_count_live(row_map, live) // shape.width)
  return (needed.sum(-1) <= shape.chunks).all()


@dataclasses.dataclass(frozen=True)
class Gather:
  """Moves arrays from one shape to the next.

  Attributes:
    source: [S, C·g], for each new row the index of the old one in its shard.
    chunk: [S, C], for each new chunk the index of the old one in its shard.
    valid: [S·C, g], true for rows that hold a live completion; the rest is padding.
  """

  source: Int[Array, "S n"]
  chunk: Int[Array, "S C"]
  valid: Bool[Array, "SC g"]

  def rows(self, tree: Any, axis: int = 0) -> Any:
    """Returns the rows of arrays that have [S·C, g] from `axis` on, as [S·C', g']."""
    shape = (-1, self.valid.shape[-1])
    return take(tree, self.source, axis, 2, shape)

  def flat_rows(self, tree: Any, axis: int = 0) -> Any:
    """Returns the rows of arrays that have [S·C·g] at `axis`, as [S·C'·g']."""
    return take(tree, self.source, axis, 1, (-1,))

  def chunks(self, tree: Any, axis: int = 0) -> Any:
    """Returns the chunks of arrays that have [S·C] at `axis`, as [S·C']."""
    return take(tree, self.chunk, axis, 1, (-1,))


def regroup(row_map: RowMap, live: Bool[Array, "SC g"], shape: Shape) -> tuple[RowMap, Gather]:
  """Returns the row map in which the live rows are compacted into `shape`, and the way there.

  Args:
    live: rows to keep; they must fit (`fits`).
  """

  def one_shard(prompt, original_index, live, counts):  # [C], [n], [n], [P]
    chunks = -(-counts // shape.width)
    chunks_before, rows_before = (jnp.cumsum(a) - a for a in (chunks, counts))
    prompt_of_row = jnp.repeat(prompt, live.size // prompt.size)
    # Live rows of a prompt are in order, so cumulative counts give the rank of a row in its prompt.
    rank = jnp.cumsum(live) - 1 - rows_before[prompt_of_row]
    place = chunks_before[prompt_of_row] * shape.width + rank
    size = shape.chunks * shape.width
    source = jnp.full(size, live.size).at[jnp.where(live, place, size)]
    source = source.set(jnp.arange(live.size), mode="drop")
    valid, source = source < live.size, jnp.minimum(source, live.size - 1)
    return source, jnp.where(valid, original_index[source], NOWHERE), valid

  counts = _count_live(row_map, live)
  shards, _, width = row_map.original_index.shape
  flat = (row_map.original_index.reshape(shards, -1), live.reshape(shards, -1))
  source, original_index, valid = jax.vmap(one_shard)(row_map.prompt, *flat, counts)
  chunk = source[:, :: shape.width] // width
  prompt = jnp.take_along_axis(row_map.prompt, chunk, axis=1)
  row_map = RowMap(prompt, original_index.reshape(shards, shape.chunks, shape.width), row_map.count)
  return row_map, Gather(source, chunk, valid.reshape(-1, shape.width))


def scatter_rows(tree: Any, row_map: RowMap, rows: Any) -> Any:
  """Returns `tree`, arrays [S·P, G, ...], with `rows` [S·C, g, ...] at their original indices."""

  def one(completions: Array, rows: Array) -> Array:
    shards = row_map.original_index.shape[0]
    flat = completions.reshape(shards, -1, *completions.shape[2:])
    rows = rows.reshape(shards, -1, *rows.shape[2:])
    original_index = row_map.original_index.reshape(shards, -1)
    flat = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))(flat, original_index, rows)
    return flat.reshape(completions.shape)

  return jax.tree.map(one, tree, rows)


def _count_live(row_map: RowMap, live: Bool[Array, "SC g"]) -> Int[Array, "S P"]:
  """Returns the number of live rows of each prompt."""
  per_chunk = live.sum(-1, dtype=jnp.int32).reshape(row_map.prompt.shape)
  zeros = jnp.zeros((row_map.prompt.shape[0], row_map.count), jnp.int32)
  return jax.vmap(lambda a, i, n: a.at[i].add(n))(zeros, row_map.prompt, per_chunk)


def take(tree: Any, index: Int[Array, "S n"], axis: int, axes: int, shape: tuple[int, ...]) -> Any:
  """Returns entries of arrays along `axes` axes from `axis` on, as `shape`.

  Args:
    tree: arrays whose axes from `axis` on hold all shards in turn.
    index: entries to take from each shard, of its part of these axes.
  """
  return jax.tree.map(lambda array: _take(array, index, axis, axes, shape), tree)


def _take(array: Array, index: Array, axis: int, axes: int, shape: tuple[int, ...]) -> Array:
  """Returns entries of an array along `axes` axes from `axis` on, which hold all shards in turn.

  Axes before `axis` are layers. They are mapped over one after another: where the new order of
  rows needs a copy, it is of one layer, not of the whole cache.
  """
  if axis % array.ndim:
    return jax.lax.map(lambda a: _take(a, index, axis % array.ndim - 1, axes, shape), array)
  after = array.shape[axes:]
  by_shard = array.reshape(index.shape[0], -1, *after)
  return jax.vmap(lambda a, i: a[i])(by_shard, index).reshape(*shape, *after)
