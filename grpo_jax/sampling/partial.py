"""Samples completions in parts: a call adds a number of tokens, and a later one goes on from there.

Between two calls the parameters may change. Keys and values are not kept: a call reads the prompt
and all tokens so far under its own parameters. Token t of a completion uses `fold_in(key, t)` in
whichever call it is drawn, so with the same parameters the parts are the completions of `generate`.
Each token keeps its log-prob under the parameters that drew it.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.protocol import Cache, EpisodeModel, Params
from grpo_jax.sampling import compaction
from grpo_jax.sampling.generate import compactions, pick, row_keys
from grpo_jax.sampling.sampler import Sampler, for_decoding
from grpo_jax.tokens import Messages

# Share of the tokens of a step that were drawn in earlier ones, and rounds of sampling in the step.
METRICS = ("sampling/carried", "sampling/rounds")
READ = 32  # tokens of each completion that are read at once; more need more memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """Holds completions as far as they are, on the device or on the host.

  Attributes:
    tokens, logp, entropy: [P, G, T], as in `generate.Completions`.
    length: [P, G], tokens so far.
    state: [P, G], state in the stop table, whose last one is the end.
  """

  tokens: Int[Array, "P G T"]
  logp: Float[Array, "P G T"]
  entropy: Float[Array, "P G T"]
  length: Int[Array, "P G"]
  state: Int[Array, "P G"]


def nothing(prompts: int, group: int, length: int, pad_id: int) -> Parts:
  """Returns completions without any token, in NumPy."""
  shape = (prompts, group, length)
  zeros, none = np.zeros(shape, np.float32), np.zeros(shape[:2], np.int32)
  return Parts(np.full(shape, pad_id, np.int32), zeros, zeros, none, none)


def extend(
  model: EpisodeModel,
  params: Params,
  prompts: Int[Array, "P N"],
  prompt_mask: Bool[Array, "P N"],
  keys: jax.Array,
  stop_table: Int[Array, "S V"],
  parts: Parts,
  *,
  budget: int,
  temperature: float,
  max_compactions: int = 0,
  prompt_shards: int = 1,
) -> Parts:
  """Adds up to `budget` tokens to each completion that has not ended.

  Args:
    prompts, prompt_mask: left-padded.
    keys: typed random keys [P, G], the same in all calls for a completion.
    parts: the completions so far, with room for T tokens.
    stop_table, temperature, max_compactions, prompt_shards: as in `generate.generate`.
  """
  count, group, length = parts.tokens.shape
  table, end = model.head(params).T, stop_table.shape[0] - 1

  def live(parts: Parts) -> Bool[Array, "C g"]:
    return (parts.state != end) & (parts.length < length)

  def step(prefix: Cache, prompt_mask: Array, first: Array, carry: tuple) -> tuple:
    i, keys, token, parts, cache = carry
    index = jnp.maximum(parts.length - 1, 0)
    hidden, cache = model.decode(params, token, index, prefix, prompt_mask, cache)
    hidden = jnp.where((parts.length == 0)[..., None], first[:, None], hidden)
    softcap = model.config.softcap
    token, logp, entropy = pick(hidden, table, softcap, temperature, keys, parts.length)
    parts = _with_token(parts, live(parts), (token, logp, entropy), stop_table)
    return i + 1, keys, token, parts, cache

  def going(row_map: compaction.RowMap, smaller: compaction.Shape | None, carry: tuple) -> Array:
    i, parts = carry[0], carry[3]
    more = (i < budget) & live(parts).any()
    return more if smaller is None else more & ~compaction.fits(row_map, live(parts), smaller)

  first, prefix = model.prefill(params, prompts, prompt_mask)
  cache = _read(model, params, parts, live(parts), prefix, prompt_mask)
  last = jnp.maximum(parts.length - 1, 0)[..., None]
  token = jnp.take_along_axis(parts.tokens, last, axis=-1)[..., 0]
  carry, completed = (jnp.int32(0), keys, token, parts, cache), parts
  shape, *others = compaction.shapes(count // prompt_shards, group, max_compactions)
  row_map = compaction.start(prompt_shards, shape)
  for smaller in (*others, None):
    body = partial(step, prefix, prompt_mask, first)
    i, keys, token, parts, cache = jax.lax.while_loop(partial(going, row_map, smaller), body, carry)
    completed = compaction.scatter_rows(completed, row_map, parts)
    if smaller is not None:
      row_map, gather = compaction.regroup(row_map, live(parts), smaller)
      keys, token, parts = gather.rows((keys, token, parts))
      parts = dataclasses.replace(parts, state=jnp.where(gather.valid, parts.state, end))
      carry = (i, keys, token, parts, gather.flat_rows(cache, axis=-4))
      prefix = gather.chunks(prefix, axis=-4)
      prompt_mask, first = gather.chunks((prompt_mask, first))
  return completed


def _with_token(
  parts: Parts, live: Bool[Array, "C g"], drawn: tuple[Array, ...], stop_table: Array
) -> Parts:
  """Returns the rows with one more token, where they are live."""
  at = jnp.where(live, parts.length, compaction.NOWHERE)
  put = jax.vmap(jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop")))
  old = (parts.tokens, parts.logp, parts.entropy)
  tokens, logp, entropy = (put(array, at, values) for array, values in zip(old, drawn))
  state = jnp.where(live, stop_table[parts.state, drawn[0]], parts.state)
  return Parts(tokens, logp, entropy, parts.length + live, state)


def _read(
  model: EpisodeModel,
  params: Params,
  parts: Parts,
  live: Bool[Array, "P G"],
  prefix: Cache,
  prompt_mask: Bool[Array, "P N"],
) -> Cache:
  """Returns the cache of the live completions, without the last token of each."""
  count, group, length = parts.tokens.shape
  slots = max(length - 1, 1)
  size = min(READ, slots)
  longest = jnp.where(live, parts.length - 1, 0).max()

  def more(carry: tuple) -> tuple:
    start, cache = carry
    at = jnp.minimum(start, slots - size)  # a token that is read again gives the same
    tokens = jax.lax.dynamic_slice_in_dim(parts.tokens, at, size, axis=2)
    _, cache = model.extend(params, tokens, at, prefix, prompt_mask, cache)
    return start + size, cache

  carry = (jnp.int32(0), model.empty_cache(params, count, group, slots))
  return jax.lax.while_loop(lambda carry: carry[0] < longest, more, carry)[1]


class PartialSampler:
  """Adds tokens to completions of prompts given as text, with the settings of a `Sampler`.

  Args:
    sampler: model, tokenizer, lengths, stops and temperature.
    budget: tokens that a call adds to each completion at most.

  Raises:
    ValueError: the model cannot go on after tokens that it reads.
  """

  def __init__(self, sampler: Sampler, budget: int) -> None:
    model, layout = sampler.model, sampler.prompt_sharding
    if not isinstance(model, EpisodeModel):
      raise ValueError(
        f"{type(model).__name__} has no method 'extend', which partial rollouts need: see "
        "models.protocol.EpisodeModel"
      )
    self._sampler = sampler

    def program(params: Params, *arguments: Any, temperature: float) -> Parts:
      return extend(
        model,
        for_decoding(model, params, layout),
        *arguments,
        budget=budget,
        temperature=temperature,
        max_compactions=compactions(budget),
        prompt_shards=meshes.prompt_shards(layout),
      )

    self._program = jax.jit(program, static_argnames="temperature", out_shardings=layout)

  def __call__(
    self,
    params: Params,
    prompts: Sequence[str | Messages],
    keys: jax.Array,
    numbers: Int[np.ndarray, "P"],
    parts: Parts,
  ) -> Parts:
    """Returns the completions with up to `budget` more tokens each, in NumPy.

    Args:
      prompts: text or chat messages.
      keys: [P], a random key for each prompt. Completion g of it has the stream (key, number, g).
      numbers: of the prompts, for their streams.
      parts: the completions so far.
    """
    own, layout = self._sampler, self._sampler.prompt_sharding
    rows = hosts.to_global((*own.encode(prompts), numbers, parts), layout)
    tokens, mask, numbers, parts = rows
    keys = row_keys_of(keys, numbers, parts.length.shape[1])
    arguments = (tokens, mask, keys, own.table, parts)
    return hosts.to_local(self._program(params, *arguments, temperature=own.temperature))


@partial(jax.jit, static_argnums=2)
def row_keys_of(keys: jax.Array, numbers: jax.Array, group: int) -> jax.Array:
  """Returns `generate.row_keys` of prompts that have a key each."""
  return jax.vmap(lambda key, number: row_keys(key, number[None], group)[0])(keys, numbers)
