"""Samples within a budget of cache memory: a row that ends makes room for the next completion.

The completions of a shard wait in a queue, prompt after prompt. R rows are live at a time. Each has
room for one completion in the cache, and a copy of its prompt's keys; a prompt itself is computed
once. When the queue is empty and at most half of the rows are live, they move into arrays of half
as many rows, again and again (`compaction` does the same without a queue).

The random stream of a completion and the slots of its tokens in the cache do not depend on when its
row was free, so completions are those of `generate`. Log-probs agree to rounding: XLA sums products
with weights in another order for another number of rows.

Axes: S shards, R rows of a shard, n completions of a shard. Programs hold rows as [S·R, 1].
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.protocol import Cache, Model, Params
from grpo_jax.sampling.compaction import NOWHERE, take
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.generate import Completions, pick

MAX_COMPACTIONS = 5  # each one compiles one more loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Holds the rows that are live, or empty.

  Attributes:
    completion: [S, R], index of each row's completion in its shard; `NOWHERE` for an empty row.
    number: [S·R, 1], tokens of each row so far.
    token, state, keys: [S·R, 1], last token, state in the stop table, random key.
    cache: keys and values of the rows.
    prefix, prompt_mask: keys and values of each row's prompt, and their mask.
  """

  completion: Int[Array, "S R"]
  number: Int[Array, "SR 1"]
  token: Int[Array, "SR 1"]
  state: Int[Array, "SR 1"]
  keys: Any
  cache: Cache
  prefix: Cache
  prompt_mask: Bool[Array, "SR N"]


def generate_refilled(
  model: Model,
  params: Params,
  prompts: Int[Array, "P N"],
  prompt_mask: Bool[Array, "P N"],
  keys: jax.Array,
  stop_table: Int[Array, "S V"],
  *,
  rows: int,
  length: int,
  temperature: float,
  pad_id: int,
  token_filter: TokenFilter | None = None,
  max_compactions: int = MAX_COMPACTIONS,
  prompt_shards: int = 1,
) -> Completions:
  """Samples G completions of up to `length` tokens for each prompt, in `rows` rows of each shard.

  Args:
    model: its `decode` takes one `index` per completion, as `models.decoder.Decoder` does.
    rows: number of rows of a shard that are live at a time, at most its completions.
    prompts, prompt_mask, keys, stop_table: as in `generate.generate`.
    length, temperature, pad_id, token_filter, prompt_shards: as in `generate.generate`.
    max_compactions: largest number of times that the last rows move into arrays of half as many.
  """
  count, group = keys.shape
  shards, end = prompt_shards, stop_table.shape[0] - 1
  total = count // shards * group  # n
  table = model.head(params).T
  first, prefixes = model.prefill(params, prompts, prompt_mask)
  by_completion = keys.reshape(shards, total)

  def done(slots: Slots) -> Array:
    return (slots.state == end) | (slots.number >= length)

  def refill(slots: Slots, waiting: Array) -> tuple[Slots, Array]:
    """Gives the rows that are done to the next completions of their shard's queue."""
    free = done(slots).reshape(shards, -1)
    entry = waiting[:, None] + jnp.cumsum(free, axis=-1) - 1
    fresh = free & (entry < total)
    completion = jnp.where(fresh, entry, jnp.where(free, NOWHERE, slots.completion))
    new = fresh.reshape(-1, 1)
    prompt = jnp.minimum(completion, total - 1) // group
    own = take(prefixes, prompt, -4, 1, (-1,))
    mask = take(prompt_mask, prompt, 0, 1, (-1,))
    chosen = jnp.take_along_axis(by_completion, jnp.minimum(completion, total - 1), axis=1)

    def replaced(copy: Array, old: Array) -> Array:  # [..., S·R, K, N, Dh]
      return jnp.where(new[:, :, None, None], copy, old)

    slots = dataclasses.replace(
      slots,
      completion=completion,
      number=jnp.where(new, 0, slots.number),
      state=jnp.where(new, 0, slots.state),
      keys=jnp.where(new, chosen.reshape(-1, 1), slots.keys),
      prefix=jax.tree.map(replaced, own, slots.prefix),
      prompt_mask=jnp.where(new, mask, slots.prompt_mask),
    )
    return slots, waiting + fresh.sum(-1, dtype=jnp.int32)

  def step(carry: tuple) -> tuple:
    slots, waiting, written, row_steps = carry
    more = (waiting < total)[:, None] & done(slots).reshape(shards, -1)
    # Without the cache, which a branch would copy.
    cache, slots = slots.cache, dataclasses.replace(slots, cache=None)
    slots, waiting = jax.lax.cond(more.any(), refill, lambda *same: same, slots, waiting)
    live, begins = ~done(slots), slots.number == 0
    index = jnp.maximum(slots.number - 1, 0)
    hidden, cache = model.decode(params, slots.token, index, slots.prefix, slots.prompt_mask, cache)
    prompt = jnp.minimum(slots.completion, total - 1) // group
    of_prompt = take(first, prompt, 0, 1, (-1,))[:, None]
    hidden = jnp.where(begins[..., None], of_prompt, hidden)
    token, logp, entropy = pick(
      hidden, table, model.config.softcap, temperature, slots.keys, slots.number, token_filter
    )
    token = jnp.where(live, token, pad_id)
    state = jnp.where(live, stop_table[slots.state, token], slots.state)
    number = slots.number + live
    at = jnp.where(live.reshape(shards, -1), slots.completion, NOWHERE)
    written = _written(written, at, slots.number, (token, logp, entropy), number, state == end)
    row_steps = row_steps + at.shape[1]
    new = {"number": number, "token": token, "state": state, "cache": cache}
    return dataclasses.replace(slots, **new), waiting, written, row_steps

  def going(smaller: int | None, carry: tuple) -> Array:
    slots, waiting, *_ = carry
    live, queued = ~done(slots).reshape(shards, -1), (waiting < total).any()
    if smaller is None:
      return live.any() | queued
    return queued | (live.any() & (live.sum(-1) > smaller).any())

  nobody = jnp.zeros((shards * rows, 1), jnp.int32)
  dtype = stop_table.dtype
  slots = Slots(
    completion=jnp.full((shards, rows), NOWHERE, jnp.int32),
    number=nobody,
    token=nobody,
    state=jnp.full((shards * rows, 1), end, dtype),
    keys=jnp.broadcast_to(by_completion[:, :1], (shards, rows)).reshape(-1, 1),
    cache=model.empty_cache(params, shards * rows, 1, max(length - 1, 1)),
    prefix=take(prefixes, jnp.zeros((shards, rows), jnp.int32), -4, 1, (-1,)),
    prompt_mask=take(prompt_mask, jnp.zeros((shards, rows), jnp.int32), 0, 1, (-1,)),
  )
  shape = (shards, total)
  written = (
    jnp.full((*shape, length), pad_id, jnp.int32), jnp.zeros((*shape, length)),
    jnp.zeros((*shape, length)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool),
  )  # fmt: skip
  carry = (slots, jnp.zeros(shards, jnp.int32), written, jnp.int32(0))
  for smaller in (*halvings(rows, max_compactions), None):
    carry = jax.lax.while_loop(partial(going, smaller), step, carry)
    if smaller is not None:
      carry = (_compacted(carry[0], ~done(carry[0]), smaller), *carry[1:])
  tokens, logp, entropy, lengths, ended = jax.tree.map(
    lambda a: a.reshape(count, group, *a.shape[2:]), carry[2]
  )
  share = jnp.broadcast_to(carry[3] / (count // shards), (count,))
  mask = jnp.arange(length) < lengths[..., None]
  return Completions(tokens, mask, ended, logp, entropy, share.astype(jnp.float32))


def halvings(rows: int, most: int) -> list[int]:
  """Returns the numbers of rows after each compaction.

  Example:
    >>> halvings(10, 3), halvings(2, 5), halvings(1, 5)
    ([5, 3, 2], [1], [])
  """
  result = []
  while rows > 1 and len(result) < most:
    rows = -(-rows // 2)
    result.append(rows)
  return result


def _compacted(slots: Slots, live: Bool[Array, "SR 1"], rows: int) -> Slots:
  """Returns the live rows of each shard, and empty ones, in arrays of `rows` rows."""
  order = jnp.argsort(~live.reshape(slots.completion.shape), axis=-1, stable=True)[:, :rows]
  rest = (slots.number, slots.token, slots.state, slots.keys, slots.prompt_mask)
  number, token, state, keys, mask = take(rest, order, 0, 1, (-1,))
  return Slots(
    completion=jnp.take_along_axis(slots.completion, order, axis=1),
    number=number,
    token=token,
    state=state,
    keys=keys,
    cache=take(slots.cache, order, -4, 1, (-1,)),
    prefix=take(slots.prefix, order, -4, 1, (-1,)),
    prompt_mask=mask,
  )


def _written(
  written: tuple,
  at: Int[Array, "S R"],
  number: Int[Array, "SR 1"],
  drawn: tuple[Array, Float[Array, "SR 1"], Float[Array, "SR 1"]],
  lengths: Int[Array, "SR 1"],
  ended: Bool[Array, "SR 1"],
) -> tuple:
  """Returns the completions of all shards with one more token of each row.

  Args:
    at: completion of each row; `NOWHERE` for rows that write nothing.
    number: number of the token.
    lengths, ended: of each row, this token included.
  """
  shape = at.shape
  *arrays, counts, flags = written
  number, lengths, ended, *drawn = (x.reshape(shape) for x in (number, lengths, ended, *drawn))
  put = jax.vmap(lambda a, i, t, x: a.at[i, t].set(x, mode="drop"))
  put_one = jax.vmap(lambda a, i, x: a.at[i].set(x, mode="drop"))
  arrays = [put(array, at, number, values) for array, values in zip(arrays, drawn)]
  return (*arrays, put_one(counts, at, lengths), put_one(flags, at, ended))
