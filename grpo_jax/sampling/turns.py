"""Samples the turns of episodes. Keys and values of earlier turns stay on the device.

An episode is one row of tokens: what the policy writes in its turns, and observations in between.
Each token passes the model once. A turn is sampled token by token; the observation before it is
read in pieces of `PIECE` tokens, for all rows at once. Every row fills its own slots of the cache
one after another, without gaps. So what a row computes does not depend on which other rows take
part in a turn: a row whose environment has not answered is left out of turns until it has.

There are three ways to place rows:

- in step: all rows that go on take their turns together, and between turns they move into arrays of
  half as many rows (`compaction`), so that rows whose episode is over stop costing;
- each for itself: rows keep their places, since the moment of a move would depend on how long
  environments take, and with it the last bits of log-probs;
- in seats, for a budget of cache memory: a row whose episode is over gives its place to the next.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import deterministic
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.models.protocol import Cache, EpisodeModel, Params
from grpo_jax.sampling import compaction
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.generate import Rows, no_rows, pick, write_token
from grpo_jax.sampling.sampler import Prepared, Sampler, for_decoding
from grpo_jax.tokens import Messages

PIECE = 16  # tokens of each observation that are read at once
MAX_COMPACTIONS = 3  # each shape compiles its own programs


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


# --- on the host ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
  """Holds one turn of all rows, [P, G, L]; rows that took no part have no token.

  Attributes:
    tokens, mask, logp, entropy: as in `generate.Completions`.
    ended: [P, G], true for rows that reached an ending token.
  """

  tokens: Int[np.ndarray, "P G L"]
  mask: Bool[np.ndarray, "P G L"]
  logp: Float[np.ndarray, "P G L"]
  entropy: Float[np.ndarray, "P G L"]
  ended: Bool[np.ndarray, "P G"]


@dataclasses.dataclass(frozen=True)
class Budget:
  """Limits of an episode, beside its tokens, which are the sampler's `completion_length`.

  Attributes:
    turns: largest number of turns.
    turn_length: largest number of tokens of a turn.
    observation_length: largest number of tokens of an observation; a longer one ends the episode as
      truncated.
  """

  turns: int
  turn_length: int
  observation_length: int


class TurnSampler:
  """Samples the turns of the episodes of some prompts with the model of a `Sampler`.

  Args:
    sampler: model, tokenizer, stops and temperature. With its `chunks`, episodes are sampled chunk
      by chunk where the number of prompts allows it (`learning.deterministic`); with its
      `cache_rows`, so many seats of a shard take one episode after another.
    budget: limits of an episode.
    in_step: whether all rows that go on take their turns together.

  Raises:
    ValueError: the model cannot go on after an observation.
  """

  def __init__(self, sampler: Sampler, budget: Budget, in_step: bool = True) -> None:
    if not isinstance(sampler.model, EpisodeModel):
      raise ValueError(
        f"{type(sampler.model).__name__} has no method 'extend', which episodes need: see "
        "models.protocol.EpisodeModel"
      )
    self.sampler, self.budget, self.in_step = sampler, budget, in_step
    self._programs = cache(partial(Programs, sampler, budget))

  def begin(
    self,
    params: Params,
    prompts: Sequence[str | Messages],
    key: jax.Array,
    *,
    group: int,
    **options: Any,
  ) -> "Session":
    """Starts an episode of each of G completions of each prompt; arguments as of a `Sampler`."""
    own = self.sampler
    prepared = own.prepare(prompts, key, group, **options)
    count = len(prepared.on_device[0])  # of all hosts
    chunks = own.chunks if own.chunks and count % own.chunks.count == 0 else None
    params = for_decoding(own.model, params, own.prompt_sharding)
    return Session(self, self._programs(chunks), params, prepared, group)

  def go_on(
    self,
    params: Params,
    prompts: Sequence[str | Messages],
    keys: jax.Array,
    rows: Sequence[Sequence[Sequence[int]]],
  ) -> "Session":
    """Goes on with episodes that other parameters may have begun, before a turn of each.

    Args:
      keys: [P, G], random key of each episode.
      rows: [P][G], its tokens so far; those of episodes that are over may be left out.
    """
    own = self.sampler
    prepared = own.prepare(prompts, jax.random.key(0), len(rows[0]))
    prepared = dataclasses.replace(prepared, on_device=(*prepared.on_device[:-1], keys))
    params = for_decoding(own.model, params, own.prompt_sharding)
    session = Session(self, self._programs(None), params, prepared, len(rows[0]))
    begun = {(p, g): row for p, line in enumerate(rows) for g, row in enumerate(line) if row}
    if begun:
      session.feed(begun)
    return session


class Programs:
  """Holds the compiled programs of episodes.

  A state is that of all prompts, whose rows lie in `shards` parts. With chunks, it is the states of
  the chunks, [rounds, devices, ...], and each chunk is a part.

  Attributes:
    shards: number of parts; no row leaves its own.
    start: `(params, prompts, prompt_mask, keys) -> state`, without a cache if there are seats.
    take_turn, read, seats, seat, compact: the functions of this module; the last two have no model.
    row_map: `state -> [shards, C, g]`, the index of the completion in each place of a part.
  """

  def __init__(self, sampler: Sampler, budget: Budget, chunks: Chunks | None) -> None:
    model, layout, pad_id = sampler.model, sampler.prompt_sharding, sampler.tokenizer.pad_id
    self.shards = chunks.count if chunks else meshes.prompt_shards(layout)
    shards_inside = 1 if chunks else self.shards
    slots = sampler.completion_length + PIECE  # the last piece of an observation may be padded

    def over_rows(function: Callable, params: Params, state: Any, rows: tuple, *shared: Any) -> Any:
      """Calls `(params, state, *rows, *shared) -> (state, rows)`, chunk by chunk if need be."""
      if chunks is None:
        return function(params, state, *rows, *shared)
      run = deterministic.by_chunk(
        lambda params, own, shared: function(params, own[0], *own[1], *shared), chunks
      )
      some = rows[1] if state is None else state.count
      state, results = run(params, (state, chunks.deal(rows)), shared, some)
      return state, chunks.undeal(results)

    def begin(params: Params, *rows: Array) -> State:
      own = 0 if sampler.cache_rows and chunks is None else slots

      def first(params: Params, _: None, *rows: Array) -> Any:
        return start(model, params, *rows, slots=own, prompt_shards=shards_inside), None

      return over_rows(first, params, None, rows)[0]

    def turn(
      params: Params, state: State, limit: Array, stop_table: Array, **how: Any
    ) -> tuple[State, tuple[Array, ...], Array]:
      def one(params: Params, state: State, limit: Array, stop_table: Array) -> Any:
        options = {"length": budget.turn_length, "pad_id": pad_id, **how}
        state, *rows = take_turn(model, params, state, limit, stop_table, **options)
        return state, rows

      state, rows = over_rows(one, params, state, (limit,), stop_table)
      return state, *rows

    def go_on(params: Params, state: State, tokens: Array, number: Array) -> State:
      def one(params: Params, state: State, tokens: Array, number: Array) -> Any:
        return read(model, params, state, tokens, number), None

      return over_rows(one, params, state, (tokens, number))[0]

    def move(state: State, live: Array, shape: compaction.Shape) -> State:
      def one(_: None, state: State, live: Array) -> Any:
        return compact(state, live, shape), None

      return over_rows(one, None, state, (live,))[0]

    def row_map(state: State) -> Array:
      index = state.row_map.original_index
      return chunks.undeal(index) if chunks else index

    def new_seats(params: Params, episodes: State, rows: int) -> State:
      return seats(model, params, episodes, rows, slots)

    self.start = jax.jit(begin)
    self.take_turn = jax.jit(
      turn,
      static_argnames=("temperature", "token_filter"),
      donate_argnums=1,
      out_shardings=(None, layout, layout),
    )
    self.read = jax.jit(go_on, donate_argnums=1)
    self.compact = jax.jit(move, static_argnums=2)
    self.seats = jax.jit(new_seats, static_argnums=2)
    self.seat = jax.jit(seat, donate_argnums=1)
    self.row_map = jax.jit(row_map, out_shardings=layout)  # each host reads its part


class Session:
  """Plays the episodes of some prompts on the device, turn by turn.

  Attributes:
    prepared: prompts, keys, stops, temperature and filter.
    row_steps: with seats, tokens that all of them could have written so far; None without.
  """

  def __init__(
    self,
    sampler: TurnSampler,
    programs: Programs,
    params: Params,
    prepared: Prepared,
    group: int,
  ) -> None:
    single, count = sampler.sampler, len(prepared.prompts)
    self.prepared = prepared
    self._sampler, self._params, self._layout = sampler, params, single.prompt_sharding
    self._programs, self._size = programs, (count, group)
    self._last = np.zeros(self._size, np.int64)  # last token of each row's turn
    shards, host_count = programs.shards, hosts.own_shard()[1]
    self._own_shards = max(shards // host_count, 1)
    self._state = programs.start(params, *prepared.on_device)
    of_shard = count * group // self._own_shards
    self.row_steps: int | None = None
    if self._state.cache is None:
      self.row_steps = 0
      rows = min(single.cache_rows, of_shard)
      self._episodes = self._state
      self._state = programs.seats(params, self._episodes, rows)
      self._original = np.full((self._own_shards * rows, 1), -1)
      self._waiting = [deque(of_shard * n + np.arange(of_shard)) for n in range(self._own_shards)]
      self._seat(np.ones(self._size, bool))
    else:
      self._original = self._read_rows()
    self._shapes = compaction.shapes(count * host_count // shards, group, MAX_COMPACTIONS)[1:]

  @property
  def placed(self) -> Bool[np.ndarray, "P G"]:
    """Rows that have a place on the device; with seats, the others come later."""
    placed = np.zeros(self._size[0] * self._size[1], bool)
    placed[self._original[self._original >= 0]] = True
    return placed.reshape(self._size)

  def keep(self, live: Bool[np.ndarray, "P G"]) -> None:
    """Frees the places of rows whose episode is over, or moves the others together.

    Args:
      live: rows whose episode goes on, those without a place yet included.
    """
    if self._state.row_map is None:
      self._seat(live)
    elif self._sampler.in_step:
      self._compact(live)

  def turn(
    self,
    limit: Int[np.ndarray, "P G"],
    observations: Mapping[tuple[int, int], Sequence[int]] = MappingProxyType({}),
  ) -> Turn:
    """Reads observations, and samples the next turn of each row that takes part.

    Args:
      limit: tokens that each row may write; 0 for rows that take no part.
      observations: (p, g) -> token ids, for rows that take part in a turn other than their first.
    """
    if hosts.any_host(bool(observations)):
      self.feed({place: [int(self._last[place]), *ids] for place, ids in observations.items()})
    limit, given = self._to_device(limit.astype(np.int32)), self.prepared
    self._state, written, ended = self._programs.take_turn(
      self._params, self._state, limit, given.stop_table, **given.how
    )
    tokens, mask, logp, entropy, ended = self._from_device((*written, ended))
    lengths = mask.sum(-1)
    last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[..., None], -1)[..., 0]
    self._last = np.where(lengths > 0, last, self._last)
    if self.row_steps is not None:
      self.row_steps += self._original.size * self._agreed(int(lengths.max()))
    return Turn(tokens, mask, logp, entropy, ended)

  def feed(self, rows: Mapping[tuple[int, int], Sequence[int]]) -> None:
    """Feeds tokens to the model, from the last token of each row on.

    Args:
      rows: (p, g) -> token ids.
    """
    width = padded_observation(self._agreed(max(map(len, rows.values()), default=1)))
    tokens = np.full((*self._size, width), self._sampler.sampler.tokenizer.pad_id, np.int32)
    number = np.zeros(self._size, np.int32)
    for place, ids in rows.items():
      number[place] = len(ids)
      tokens[place][: len(ids)] = ids
    arrays = (self._to_device(a) for a in (tokens, number))
    self._state = self._programs.read(self._params, self._state, *arrays)

  def _seat(self, live: Bool[np.ndarray, "P G"]) -> None:
    """Gives the seats of rows whose episode is over to the next of their shard."""
    flat, seats = live.reshape(-1), self._original.reshape(self._own_shards, -1)
    completion, fresh = np.zeros(seats.shape, np.int32), np.zeros(seats.shape, bool)
    rows = len(flat) // self._own_shards
    for shard, place in np.ndindex(seats.shape):
      if (held := seats[shard, place]) >= 0 and flat[held]:
        continue
      queue, seats[shard, place] = self._waiting[shard], -1
      if queue:
        seats[shard, place] = queue.popleft()
        completion[shard, place] = seats[shard, place] - shard * rows
        fresh[shard, place] = True
    self._original = seats.reshape(-1, 1)
    if hosts.any_host(bool(fresh.any())):
      arrays = hosts.to_global((completion, fresh), self._layout)
      self._state = self._programs.seat(self._episodes, self._state, *arrays)

  def _compact(self, live: Bool[np.ndarray, "P G"]) -> None:
    """Moves the live rows into the smallest shape that holds them on every shard."""
    per_prompt = live.reshape(self._own_shards, -1, live.shape[1]).sum(-1)
    shape = None
    for smaller in self._shapes:
      room = bool((-(-per_prompt // smaller.width)).sum(-1).max() <= smaller.chunks)
      if hosts.any_host(not room):
        break
      shape = smaller
    if shape is None:
      return
    self._state = self._programs.compact(self._state, self._to_device(live), shape)
    self._shapes = self._shapes[self._shapes.index(shape) + 1 :]
    self._original = self._read_rows()

  def _read_rows(self) -> Int[np.ndarray, "C g"]:
    """Returns the number of the completion in each place of this host, -1 where there is none."""
    index = np.asarray(hosts.to_local(self._programs.row_map(self._state)))
    rows = self._size[0] * self._size[1] // self._own_shards
    shard = np.arange(len(index)).reshape(-1, 1, 1) * rows
    index = np.where(index < rows, index + shard, -1)
    return index.reshape(-1, index.shape[-1])

  def _to_device(self, array: np.ndarray) -> jax.Array:
    """Returns rows [P, G, ...] in their present places."""
    flat = array.reshape(-1, *array.shape[2:])
    placed = flat[np.maximum(self._original, 0)]
    placed[self._original < 0] = 0
    return hosts.to_global((placed,), self._layout)[0]

  def _from_device(self, arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
    """Returns arrays [C, g, ...] as rows [P, G, ...], with zeros for rows that have no place."""

    def one(array: np.ndarray) -> np.ndarray:
      flat = np.zeros((self._size[0] * self._size[1], *array.shape[2:]), array.dtype)
      here = self._original >= 0
      flat[self._original[here]] = array[here]
      return flat.reshape(*self._size, *array.shape[2:])

    return [one(np.asarray(array)) for array in hosts.to_local(arrays)]

  def _agreed(self, number: int) -> int:
    """Returns the largest of a number on all hosts."""
    return int(hosts.gathered(number=np.array([number]))["number"].max())


def padded_observation(longest: int) -> int:
  """Returns the number of tokens that observations are padded to: `PIECE` times a power of 2.

  Example:
    >>> [padded_observation(longest) for longest in (3, 16, 17, 65)]
    [16, 16, 32, 128]
  """
  size = PIECE
  while size < longest:
    size *= 2
  return size
