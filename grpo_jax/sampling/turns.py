"""Samples the turns of episodes. Keys and values of earlier turns stay on the device.

An episode is one row of tokens: what the policy writes in its turns, and observations in between.
Each token passes the model once (`episode_state.py`). A row whose environment has not answered is
left out of turns until it has. There are three ways to place rows:

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
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import deterministic
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.models.protocol import EpisodeModel, Params
from grpo_jax.sampling import compaction, episode_state
from grpo_jax.sampling.episode_state import PIECE, State, slots_of
from grpo_jax.sampling.sampler import Prepared, Sampler, for_decoding
from grpo_jax.tokens import Messages

MAX_COMPACTIONS = 3  # each shape compiles its own programs


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
    take_turn, read, seats, seat, compact: the functions of `episode_state`; the last two have no
      model.
    row_map: `state -> [shards, C, g]`, the index of the completion in each place of a part.
  """

  def __init__(self, sampler: Sampler, budget: Budget, chunks: Chunks | None) -> None:
    model, layout, pad_id = sampler.model, sampler.prompt_sharding, sampler.tokenizer.pad_id
    self.shards = chunks.count if chunks else meshes.prompt_shards(layout)
    shards_inside = 1 if chunks else self.shards
    slots = slots_of(sampler.completion_length)

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
        return episode_state.start(
          model, params, *rows, slots=own, prompt_shards=shards_inside
        ), None

      return over_rows(first, params, None, rows)[0]

    def turn(
      params: Params, state: State, limit: Array, stop_table: Array, **how: Any
    ) -> tuple[State, tuple[Array, ...], Array]:
      def one(params: Params, state: State, limit: Array, stop_table: Array) -> Any:
        options = {"length": budget.turn_length, "pad_id": pad_id, **how}
        state, *rows = episode_state.take_turn(model, params, state, limit, stop_table, **options)
        return state, rows

      state, rows = over_rows(one, params, state, (limit,), stop_table)
      return state, *rows

    def go_on(params: Params, state: State, tokens: Array, number: Array) -> State:
      def one(params: Params, state: State, tokens: Array, number: Array) -> Any:
        return episode_state.read(model, params, state, tokens, number), None

      return over_rows(one, params, state, (tokens, number))[0]

    def move(state: State, live: Array, shape: compaction.Shape) -> State:
      def one(_: None, state: State, live: Array) -> Any:
        return episode_state.compact(state, live, shape), None

      return over_rows(one, None, state, (live,))[0]

    def row_map(state: State) -> Array:
      index = state.row_map.original_index
      return chunks.undeal(index) if chunks else index

    def new_seats(params: Params, episodes: State, rows: int) -> State:
      return episode_state.seats(model, params, episodes, rows, slots)

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
    self.seat = jax.jit(episode_state.seat, donate_argnums=1)
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
