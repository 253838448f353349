"""Goes through the vocabulary in tiles, so that logits `[..., T, V]` never exist.

`logprobs.head_logprobs` and `divergences.head_divergence` are loops over these tiles.
Axes: S row shards of R rows each, B vocabulary shards of V / B tokens each, w columns of a shard in
a tile. A single shard has no axis.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.core.checks import Array, as_mask, check_positive

# Number of logits in the largest tile that `head_logprobs` forms (float32: 16 MiB), counted for one
# row shard and one vocabulary shard, which is the part of one device.
TILE_ELEMENTS = 2**22
# Least number of columns of a tile, however many rows it has.
LEAST_COLUMNS = 512


def soft_cap_and_slope(x: jax.Array, cap: float | None) -> tuple[jax.Array, jax.Array | float]:
  """Returns `soft_cap(x, cap)` and its derivative in `x`."""
  if cap is None:
    return x, 1.0
  squashed = jnp.tanh(x / cap)
  return cap * squashed, 1.0 - squashed**2


def check_head(
  hidden: Array, head: Array, temperature: float, softcap: float | None, vocab_shards: int
) -> tuple[jax.Array, jax.Array]:
  """Returns hidden states and head as arrays, if everything fits together."""
  hidden, head = jnp.asarray(hidden), jnp.asarray(head)
  for name, value in (("hidden", hidden), ("head", head)):
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point, got dtype {value.dtype}")
  if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
    raise ValueError(
      f"hidden has shape {hidden.shape} and head {head.shape}, expected [..., T, D] and [D, V]"
    )
  check_positive("temperature", temperature)
  if softcap is not None:
    check_positive("softcap", softcap)
  if vocab_shards < 1 or head.shape[1] % vocab_shards:
    raise ValueError(
      f"vocab_shards must divide the vocabulary of {head.shape[1]}, got {vocab_shards}"
    )
  return hidden, head


def row_shards_of(
  hidden: jax.Array, where: Array | None, row_shards: int
) -> tuple[jax.Array | None, tuple[int, ...]]:
  """Returns which of the rows to compute, as a flat mask or None, and the axes of all rows."""
  count = math.prod(hidden.shape[:-1])
  if row_shards < 1 or count % row_shards:
    raise ValueError(f"row_shards must divide the {count} rows, got {row_shards}")
  rows = None
  if where is not None:
    rows = as_mask("where", where, hidden.shape[:-1]).reshape(-1)
  # XLA:CPU: a single shard gets no axis, because products of more than two axes copy operands.
  return rows, (*(row_shards,) * (row_shards > 1), count // row_shards)


def fold_rows(hidden: jax.Array, rows: jax.Array | None, row_axes: tuple[int, ...]) -> jax.Array:
  """Returns hidden states [S, R, D], 0 in the rows that are not computed."""
  flat = hidden.reshape(-1, hidden.shape[-1])
  if rows is not None:
    flat = jnp.where(rows[:, None], flat, 0.0)
  return flat.reshape(*row_axes, hidden.shape[-1])


def fold_head(head: jax.Array, vocab_shards: int) -> jax.Array:
  """Returns a head [D, V] as [B, V / B, D]."""
  axes = (*(vocab_shards,) * (vocab_shards > 1), head.shape[1] // vocab_shards)
  return head.T.reshape(*axes, head.shape[0])


def tiles_of(rows: int, size: int) -> tuple[int, int]:
  """Returns (number of full tiles of a vocabulary shard, columns of each); the rest is smaller."""
  target = max(TILE_ELEMENTS // max(rows, 1), LEAST_COLUMNS)
  count = -(-size // target)
  return count, size // count


def over_tiles(body: Callable, carry: tuple, hidden: jax.Array, head: jax.Array) -> tuple:
  """Runs `carry = body(carry, start, width)` over all tiles; the widths are static."""
  size = head.shape[-2]
  count, width = tiles_of(hidden.shape[-2], size)
  # The rest comes first: after the loop, XLA would copy the gradient of the head for it.
  if rest := size - count * width:
    carry = body(carry, count * width, rest)
  return jax.lax.fori_loop(0, count, lambda i, c: body(c, i * width, width), carry)


def shard_axes(hidden: jax.Array, head: jax.Array) -> tuple[str, str]:
  """Returns the einsum letters of the shard axes: "s" for rows, "b" for the vocabulary, or ""."""
  return "s" * (hidden.ndim - 2), "b" * (head.ndim - 2)


def broadcastable(per_row: jax.Array, head: jax.Array) -> jax.Array:
  """Returns numbers of rows [S, R] as [S, R, 1, 1], to be combined with logits [S, R, B, w]."""
  return per_row.reshape(per_row.shape + (1,) * (head.ndim - 1))


def as_bits(x: jax.Array) -> jax.Array:
  """Returns 16-bit floats as integers, other arrays as they are."""
  # XLA:CPU: slicing a bfloat16 array would widen the whole array first.
  return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def tile_logits(hidden, head, start, width, temperature, softcap, dtype):
  """Returns scaled logits of a tile, `d logits / d (hidden @ head)`, and the tile of the head."""
  s, b = shard_axes(hidden, head)
  tile = jax.lax.dynamic_slice_in_dim(as_bits(head), start, width, axis=-2).view(head.dtype)
  # Narrow hidden states meet a head of their own dtype, as they do in the sampler. With a wider
  # head, the same tokens would have other log-probs.
  tile = tile.astype(hidden.dtype)
  raw = jnp.einsum(f"{s}rd,{b}wd->{s}r{b}w", hidden, tile, preferred_element_type=dtype)
  capped, slope = soft_cap_and_slope(raw, softcap)
  return capped / temperature, slope / temperature, tile


def finite_top(top: jax.Array) -> jax.Array:
  """Returns the largest logits, `top`, with 0 for -inf, so that they can be subtracted."""
  return jnp.where(jnp.isneginf(top), 0.0, top)


def gradients_of_tiles(
  slopes: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
  hidden: jax.Array,
  head: jax.Array,
  dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients with respect to hidden states and head, from those of the raw logits.

  Args:
    slopes: maps (start, width) of a tile to the gradient of `hidden @ head` there, float32 or
      wider, and the tile of the head.
    hidden, head: as `fold_rows` and `fold_head` return them.
    dtype: of the sums.
  """
  s, b = shard_axes(hidden, head)

  def body(carry: tuple, start: jax.Array, width: int) -> tuple:
    d_hidden, d_head = carry
    d_raw, tile = slopes(start, width)
    d_raw = d_raw.astype(hidden.dtype)
    d_hidden += jnp.einsum(f"{s}r{b}w,{b}wd->{b}{s}rd", d_raw, tile, preferred_element_type=dtype)
    d_tile = jnp.einsum(f"{s}r{b}w,{s}rd->{s}{b}wd", d_raw, hidden, preferred_element_type=dtype)
    d_tile = as_bits(d_tile.astype(head.dtype))
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_tile, start, axis=-2)

  carry = (
    jnp.zeros((*head.shape[:-2], *hidden.shape), dtype),
    as_bits(jnp.empty((*hidden.shape[:-2], *head.shape), head.dtype)),
  )
  d_hidden, d_head = over_tiles(body, carry, hidden, head)
  d_head = d_head.view(head.dtype)
  d_hidden, d_head = d_hidden.sum(0) if b else d_hidden, d_head.sum(0) if s else d_head
  return d_hidden.astype(hidden.dtype), d_head
