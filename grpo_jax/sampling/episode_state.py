"""Computes the turns of episodes on the device: their state, and the programs that change it.

A turn is sampled token by token; the observation before it is read in pieces of `PIECE` tokens, for
all rows at once. Every row fills its own slots of the cache one after another, without gaps. So
what a row computes does not depend on which other rows take part in a turn. `turns.py` decides
which do, and where rows lie.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.protocol import Cache, EpisodeModel, Params
from grpo_jax.sampling import compaction
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.generate import Rows, no_rows, pick, write_token

PIECE = 16  # tokens of each observation that are read at once


def slots_of(length: int) -> int:
  """Returns the slots of the cache for an episode of `length` tokens; the last piece is padded."""
  return length + PIECE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Holds what stays on the device between the turns, for rows in chunks [C, g].

  Attributes:
    hidden: [C, g, D], hidden state that predicts the next token of each row.
    keys: [C, g], random key of each row.
    count: [C, g], tokens of each row so far. The last one has not passed the model.
    cache: keys and values of the rows; None before rows have a place.
    prefix, prompt_mask: keys and values of the prompts, and their mask.
    row_map: the completion that each row holds; None for seats, which the host assigns.
  """

  hidden: Float[Array, "C g D"]
  keys: Any
  count: Int[Array, "C g"]
  cache: Cache | None
  prefix: Cache
  prompt_mask: Bool[Array, "C N"]
  row_map: compaction.RowMap | None


def start(
  model: EpisodeModel,
  params: Params,
  prompts: Int[Array, "P N"],
  prompt_mask: Bool[Array, "P N"],
  keys: jax.Array,
  *,
  slots: int,
  prompt_shards: int = 1,
) -> State:
  """Returns the state after the prompts, before the first turn.

  Args:
    prompts, prompt_mask: left-padded.
    keys: typed random keys [P, G], one per completion.
    slots: room for tokens of each completion; 0 leaves the cache out.
    prompt_shards: number of equal shards of the prompts.
  """
  count, group = keys.shape
  hidden, prefix = model.prefill(params, prompts, prompt_mask)
  shape = compaction.Shape(count // prompt_shards, group)
  return State(
    hidden=jnp.broadcast_to(hidden[:, None], (count, group, hidden.shape[-1])),
    keys=keys,
    count=jnp.zeros((count, group), jnp.int32),
    cache=model.empty_cache(params, count, group, slots) if slots else None,
    prefix=prefix,
    prompt_mask=prompt_mask,
    row_map=compaction.start(prompt_shards, shape),
  )


def seats(model: EpisodeModel, params: Params, episodes: State, rows: int, slots: int) -> State:
  """Returns seats, [S·R, 1], that nobody has taken yet.

  Args:
    episodes: the state of all completions, without a cache.
    rows: number of seats of a shard, R.
    slots: room for tokens of each.
  """
  shards = len(episodes.row_map.prompt)
  nobody = _first_turns(episodes, jnp.zeros((shards, rows), jnp.int32))
  return dataclasses.replace(nobody, cache=model.empty_cache(params, shards * rows, 1, slots))


def seat(
  episodes: State, state: State, completion: Int[Array, "S R"], fresh: Bool[Array, "S R"]
) -> State:
  """Returns the seats with completions that begin their episodes.

  Args:
    episodes: the state of all completions, without a cache.
    state: that of the seats.
    completion: for each seat, index of a completion in its shard.
    fresh: seats that are given to that completion; the others stay as they are.
  """
  new, own = fresh.reshape(-1, 1), _first_turns(episodes, completion)

  def replaced(own: Array, old: Array) -> Array:  # [..., S·R, K, N, Dh]
    return jnp.where(new[:, :, None, None], own, old)

  return dataclasses.replace(
    state,
    hidden=jnp.where(new[..., None], own.hidden, state.hidden),
    keys=jnp.where(new, own.keys, state.keys),
    count=jnp.where(new, 0, state.count),
    prefix=jax.tree.map(replaced, own.prefix, state.prefix),
    prompt_mask=jnp.where(new, own.prompt_mask, state.prompt_mask),
  )


def _first_turns(episodes: State, completion: Int[Array, "S R"]) -> State:
  """Returns the state of completions before their first turn, each with a copy of its prompt."""
  prompt = completion // episodes.keys.shape[1]
  of_prompts = (episodes.hidden[:, :1], episodes.prompt_mask)
  hidden, mask = compaction.take(of_prompts, prompt, 0, 1, (-1,))
  return State(
    hidden=hidden,
    keys=compaction.take(episodes.keys.reshape(-1), completion, 0, 1, (-1, 1)),
    count=jnp.zeros((completion.size, 1), jnp.int32),
    cache=None,
    prefix=compaction.take(episodes.prefix, prompt, -4, 1, (-1,)),
    prompt_mask=mask,
    row_map=None,
  )


def take_turn(
  model: EpisodeModel,
  params: Params,
  state: State,
  limit: Int[Array, "C g"],
  stop_table: Int[Array, "V S"],
  *,
  length: int,
  temperature: float,
  pad_id: int,
  token_filter: TokenFilter | None = None,
) -> tuple[State, tuple[Array, ...], Bool[Array, "C g"]]:
  """Samples up to `length` tokens of each row.

  The last token of a row is not fed to the model: it is the first one that `read` feeds. So a turn
  of n tokens fills n - 1 slots. Token t of a row, observations included, uses `fold_in(key, t)`.

  Args:
    limit: tokens that each row may write in this turn; 0 for rows that take no part.
    stop_table, temperature, pad_id, token_filter: as in `generate.generate`.

  Returns:
    The new state; tokens, mask, logp and entropy, each [C, g, length]; and whether each row reached
    an ending token.
  """
  table, end = model.head(params).T, stop_table.shape[0] - 1

  def next_token(hidden: Array, i: Any, rows: Rows) -> Rows:
    number = state.count + i
    drawn = pick(hidden, table, model.config.softcap, temperature, rows.keys, number, token_filter)
    closed = dataclasses.replace(rows, state=jnp.where(i < limit, rows.state, end))
    written = write_token(closed, i, drawn, stop_table, pad_id)
    return dataclasses.replace(written, state=jnp.where(i < limit, written.state, rows.state))

  def going(carry: tuple) -> Array:
    i, rows, *_ = carry
    return (i < length) & ((rows.state != end) & (i < limit)).any()

  def step(carry: tuple) -> tuple:
    i, rows, cache = carry
    # Rows that write nothing fill slots behind their own tokens, which are written over.
    slot = state.count + i - 1
    hidden, cache = model.decode(params, rows.token, slot, state.prefix, state.prompt_mask, cache)
    return i + 1, next_token(hidden, i, rows), cache

  rows = no_rows(state.keys, length, stop_table.dtype, pad_id)
  rows = next_token(state.hidden, 0, rows)
  _, rows, cache = jax.lax.while_loop(going, step, (jnp.int32(1), rows, state.cache))
  count = state.count + rows.written[1].sum(-1, dtype=jnp.int32)
  state = dataclasses.replace(state, count=count, cache=cache)
  return state, rows.written, rows.state == end


def read(
  model: EpisodeModel,
  params: Params,
  state: State,
  tokens: Int[Array, "C g W"],
  number: Int[Array, "C g"],
) -> State:
  """Computes the last token of each row's turn and the observation after it, piece by piece.

  Rows that have no token yet are fed from their first one on.

  Args:
    tokens: right-padded to a multiple of `PIECE`.
    number: tokens of each row, its last one included; 0 for rows that take no part.
  """
  start = jnp.maximum(state.count - 1, 0)

  def piece(carry: tuple) -> tuple:
    at, last, cache = carry
    new = jax.lax.dynamic_slice_in_dim(tokens, at, PIECE, axis=2)
    hidden, cache = model.extend(params, new, start + at, state.prefix, state.prompt_mask, cache)
    place = number - 1 - at  # of a row's last token in this piece
    own = jnp.clip(place, 0, PIECE - 1)[..., None, None]
    is_here = (place >= 0) & (place < PIECE)
    hidden = jnp.take_along_axis(hidden, own, axis=2)[:, :, 0]
    return at + PIECE, jnp.where(is_here[..., None], hidden, last), cache

  carry = (jnp.int32(0), state.hidden, state.cache)
  _, hidden, cache = jax.lax.while_loop(lambda carry: carry[0] < number.max(), piece, carry)
  count = jnp.where(number > 0, start + number, state.count)
  return dataclasses.replace(state, hidden=hidden, count=count, cache=cache)


def compact(state: State, live: Bool[Array, "C g"], shape: compaction.Shape) -> State:
  """Returns the state of the live rows only, in chunks of `shape`; they have to fit."""
  row_map, gather = compaction.regroup(state.row_map, live, shape)
  hidden, keys, count = gather.rows((state.hidden, state.keys, state.count))
  return State(
    hidden=hidden,
    keys=keys,
    count=count,
    cache=gather.flat_rows(state.cache, axis=-4),
    prefix=gather.chunks(state.prefix, axis=-4),
    prompt_mask=gather.chunks(state.prompt_mask),
    row_map=row_map,
  )
