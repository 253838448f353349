"""Samples the turns of episodes. Keys and values of earlier turns stay on the device.

An episode is one row of tokens: what the policy writes in its turns, and observations in between.
Each token passes the model once. A turn is sampled token by token; the observation after it is one
forward pass of its own tokens, for all rows at once. Rows write into the same slots of the cache,
so a row with a shorter turn or observation has empty slots, which nothing ever sees.

Rows whose episode is over stop costing: between turns, the others move into arrays of half as many
rows (`compaction`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
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

SHORTEST = 16  # tokens; an observation is padded to at least as many
MAX_COMPACTIONS = 3  # each shape compiles its own programs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Holds what stays on the device between the turns, for rows in chunks [C, g].

  Attributes:
    hidden: [C, g, D], hidden state that predicts the next token of each row.
    keys: [C, g], random key of each row.
    count: [C, g], tokens of each row so far.
    mask: [C, g, S], true on slots of the cache that hold a token of the row.
    cache: keys and values of the rows.
    prefix, prompt_mask: keys and values of the prompts, and their mask.
    row_map: the completion that each row holds.
  """

  hidden: Float[Array, "C g D"]
  keys: Any
  count: Int[Array, "C g"]
  mask: Bool[Array, "C g S"]
  cache: Cache
  prefix: Cache
  prompt_mask: Bool[Array, "C N"]
  row_map: compaction.RowMap


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
    slots: room for tokens of each completion.
    prompt_shards: number of equal shards of the prompts.
  """
  count, group = keys.shape
  hidden, prefix = model.prefill(params, prompts, prompt_mask)
  shape = compaction.Shape(count // prompt_shards, group)
  return State(
    hidden=jnp.broadcast_to(hidden[:, None], (count, group, hidden.shape[-1])),
    keys=keys,
    count=jnp.zeros((count, group), jnp.int32),
    mask=jnp.zeros((count, group, slots), bool),
    cache=model.empty_cache(params, count, group, slots),
    prefix=prefix,
    prompt_mask=prompt_mask,
    row_map=compaction.start(prompt_shards, shape),
  )


def take_turn(
  model: EpisodeModel,
  params: Params,
  state: State,
  index: Int[Array, ""],
  limit: Int[Array, "C g"],
  stop_table: Int[Array, "V S"],
  *,
  length: int,
  temperature: float,
  pad_id: int,
  token_filter: TokenFilter | None = None,
) -> tuple[State, tuple[Array, ...], Bool[Array, "C g"]]:
  """Samples up to `length` tokens of each row.

  The last token of a row is not fed to the model: it is the first token of `observe`. So a turn of
  n tokens fills n - 1 slots. Token t of a row, observations included, uses `fold_in(key, t)`.

  Args:
    index: first empty slot.
    limit: tokens that each row may write in this turn; 0 for rows whose episode is over.
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
    i, rows, mask, cache = carry
    fed = (rows.state != end) & (i < limit)
    slot = index + i - 1
    mask = jax.lax.dynamic_update_slice_in_dim(mask, fed[..., None], slot, axis=2)
    hidden, cache = model.extend(
      params, rows.token[..., None], slot, mask, state.prefix, state.prompt_mask, cache
    )
    return i + 1, next_token(hidden[:, :, 0], i, rows), mask, cache

  rows = no_rows(state.keys, length, stop_table.dtype, pad_id)
  rows = next_token(state.hidden, 0, rows)
  carry = (jnp.int32(1), rows, state.mask, state.cache)
  _, rows, mask, cache = jax.lax.while_loop(going, step, carry)
  count = state.count + rows.written[1].sum(-1, dtype=jnp.int32)
  state = dataclasses.replace(state, count=count, mask=mask, cache=cache)
  return state, rows.written, rows.state == end


def observe(
  model: EpisodeModel,
  params: Params,
  state: State,
  index: Int[Array, ""],
  tokens: Int[Array, "C g M"],
  real: Bool[Array, "C g M"],
) -> State:
  """Computes the last token of each row's turn and the observation after it.

  Args:
    index: first empty slot.
    tokens, real: left-padded; no token at all for rows whose episode is over.
  """
  mask = jax.lax.dynamic_update_slice_in_dim(state.mask, real, index, axis=2)
  hidden, cache = model.extend(
    params, tokens, index, mask, state.prefix, state.prompt_mask, state.cache
  )
  count = state.count + jnp.maximum(real.sum(-1, dtype=jnp.int32) - 1, 0)
  return dataclasses.replace(state, hidden=hidden[:, :, -1], count=count, mask=mask, cache=cache)


def compact(state: State, live: Bool[Array, "C g"], shape: compaction.Shape) -> State:
  """Returns the state of the live rows only, in chunks of `shape`; they have to fit."""
  row_map, gather = compaction.regroup(state.row_map, live, shape)
  hidden, keys, count, mask = gather.rows((state.hidden, state.keys, state.count, state.mask))
  return State(
    hidden=hidden,
    keys=keys,
    count=count,
    mask=mask & gather.valid[..., None],
    cache=gather.flat_rows(state.cache, axis=-4),
    prefix=gather.chunks(state.prefix, axis=-4),
    prompt_mask=gather.chunks(state.prompt_mask),
    row_map=row_map,
  )


# --- on the host ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
  """Holds one turn of all rows, [P, G, L]; rows whose episode is over have no token.

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

  @property
  def slots(self) -> int:
    """Room for tokens that the cache of a completion needs, gaps included."""
    return self.turns * self.turn_length + (self.turns - 1) * self.observation_length


class TurnSampler:
  """Samples the turns of the episodes of some prompts with the model of a `Sampler`.

  Args:
    sampler: model, tokenizer, stops and temperature. With its `chunks`, episodes are sampled chunk
      by chunk where the number of prompts allows it; see `learning.deterministic`.
    budget: limits of an episode.

  Raises:
    ValueError: the model cannot go on after an observation.
  """

  def __init__(self, sampler: Sampler, budget: Budget) -> None:
    if not isinstance(sampler.model, EpisodeModel):
      raise ValueError(
        f"{type(sampler.model).__name__} has no method 'extend', which episodes need: see "
        "models.protocol.EpisodeModel"
      )
    self.sampler, self.budget = sampler, budget
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


class Programs:
  """Holds the compiled programs of episodes.

  A state is that of all prompts, whose rows lie in `shards` parts. With chunks, it is the states of
  the chunks, [rounds, devices, ...], and each chunk is a part.

  Attributes:
    shards: number of parts; no row leaves its own.
    start: `(params, prompts, prompt_mask, keys) -> state`.
    take_turn, observe, compact: the functions of this module; `compact` has no model.
    row_map: `state -> [shards, C, g]`, the index of the completion in each place of a part.
  """

  def __init__(self, sampler: Sampler, budget: Budget, chunks: Chunks | None) -> None:
    model, layout, pad_id = sampler.model, sampler.prompt_sharding, sampler.tokenizer.pad_id
    self.shards = chunks.count if chunks else meshes.prompt_shards(layout)
    shards_inside = 1 if chunks else self.shards

    def over_rows(function: Callable, params: Params, state: Any, rows: tuple, *shared: Any) -> Any:
      """Calls `(params, state, *rows, *shared) -> (state, rows)`, chunk by chunk if need be."""
      if chunks is None:
        return function(params, state, *rows, *shared)
      run = deterministic.by_chunk(
        lambda params, own, shared: function(params, own[0], *own[1], *shared), chunks
      )
      mask = rows[1] if state is None else state.mask
      state, results = run(params, (state, chunks.deal(rows)), shared, mask)
      return state, chunks.undeal(results)

    def begin(params: Params, *rows: Array) -> State:
      def first(params: Params, _: None, *rows: Array) -> Any:
        return start(model, params, *rows, slots=budget.slots, prompt_shards=shards_inside), None

      return over_rows(first, params, None, rows)[0]

    def turn(
      params: Params, state: State, index: Array, limit: Array, stop_table: Array, **how: Any
    ) -> tuple[State, tuple[Array, ...], Array]:
      def one(params: Params, state: State, limit: Array, index: Array, stop_table: Array) -> Any:
        options = {"length": budget.turn_length, "pad_id": pad_id, **how}
        state, *rows = take_turn(model, params, state, index, limit, stop_table, **options)
        return state, rows

      state, rows = over_rows(one, params, state, (limit,), index, stop_table)
      return state, *rows

    def read(params: Params, state: State, index: Array, tokens: Array, real: Array) -> State:
      def one(params: Params, state: State, tokens: Array, real: Array, index: Array) -> Any:
        return observe(model, params, state, index, tokens, real), None

      return over_rows(one, params, state, (tokens, real), index)[0]

    def move(state: State, live: Array, shape: compaction.Shape) -> State:
      def one(_: None, state: State, live: Array) -> Any:
        return compact(state, live, shape), None

      return over_rows(one, None, state, (live,))[0]

    def row_map(state: State) -> Array:
      index = state.row_map.original_index
      return chunks.undeal(index) if chunks else index

    self.start = jax.jit(begin)
    self.take_turn = jax.jit(
      turn,
      static_argnames=("temperature", "token_filter"),
      donate_argnums=1,
      out_shardings=(None, layout, layout),
    )
    self.observe = jax.jit(read, donate_argnums=1)
    self.compact = jax.jit(move, static_argnums=2)
    self.row_map = jax.jit(row_map, out_shardings=layout)  # each host reads its part


class Session:
  """Plays the episodes of some prompts on the device, turn by turn.

  Attributes:
    prepared: prompts, keys, stops, temperature and filter.
  """

  def __init__(
    self,
    sampler: TurnSampler,
    programs: Programs,
    params: Params,
    prepared: Prepared,
    group: int,
  ) -> None:
    layout, count = sampler.sampler.prompt_sharding, len(prepared.prompts)
    self.prepared = prepared
    self._sampler, self._params, self._layout = sampler, params, layout
    self._programs = programs
    self._state = programs.start(params, *prepared.on_device)
    self._index, self._size = 0, (count, group)
    self._last = np.zeros(self._size, np.int64)  # last token of each row's turn
    shards, host_count = programs.shards, hosts.own_shard()[1]
    self._shapes = compaction.shapes(count * host_count // shards, group, MAX_COMPACTIONS)[1:]
    self._own_shards = max(shards // host_count, 1)
    self._original = self._read_rows()

  def turn(self, limit: Int[np.ndarray, "P G"]) -> Turn:
    """Samples the next turn of each row.

    Args:
      limit: tokens that each row may write; 0 for rows whose episode is over.
    """
    limit, given = self._to_device(limit.astype(np.int32)), self.prepared
    self._state, written, ended = self._programs.take_turn(
      self._params, self._state, jnp.int32(self._index), limit, given.stop_table, **given.how
    )
    tokens, mask, logp, entropy, ended = self._from_device((*written, ended))
    lengths = mask.sum(-1)
    self._index += max(self._agreed(int(lengths.max())) - 1, 0)
    last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[..., None], -1)[..., 0]
    self._last = np.where(lengths > 0, last, self._last)
    return Turn(tokens, mask, logp, entropy, ended)

  def observe(self, observations: Mapping[tuple[int, int], Sequence[int]]) -> None:
    """Appends the observation of each row whose episode goes on; the other rows end here.

    Args:
      observations: (p, g) -> token ids.
    """
    live = np.zeros(self._size, bool)
    longest = 1 + max((len(ids) for ids in observations.values()), default=0)
    width = padded_observation(self._agreed(longest), 1 + self._sampler.budget.observation_length)
    tokens = np.full((*self._size, width), self._sampler.sampler.tokenizer.pad_id, np.int32)
    real = np.zeros(tokens.shape, bool)
    for (p, g), ids in observations.items():
      row = [int(self._last[p, g]), *ids]
      tokens[p, g, width - len(row) :], real[p, g, width - len(row) :] = row, True
      live[p, g] = True
    self._compact(live)
    arrays = (self._to_device(a) for a in (tokens, real))
    self._state = self._programs.observe(self._params, self._state, jnp.int32(self._index), *arrays)
    self._index += width

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
    """Returns arrays [C, g, ...] as rows [P, G, ...], with zeros for rows that are gone."""

    def one(array: np.ndarray) -> np.ndarray:
      flat = np.zeros((self._size[0] * self._size[1], *array.shape[2:]), array.dtype)
      here = self._original >= 0
      flat[self._original[here]] = array[here]
      return flat.reshape(*self._size, *array.shape[2:])

    return [one(np.asarray(array)) for array in hosts.to_local(arrays)]

  def _agreed(self, number: int) -> int:
    """Returns the largest of a number on all hosts."""
    return int(hosts.gathered(number=np.array([number]))["number"].max())


def padded_observation(longest: int, limit: int) -> int:
  """Returns the number of tokens that observations are padded to: a power of 2, or the limit.

  Example:
    >>> [padded_observation(longest, 100) for longest in (3, 16, 17, 65)]
    [16, 16, 32, 100]
  """
  size = SHORTEST
  while size < longest:
    size *= 2
  return min(size, max(limit, longest))
