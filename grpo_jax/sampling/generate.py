"""Sampling: one prefill per prompt, one decode step per token for the whole group.

The model is an argument with the functions `prefill(params, tokens, mask)`,
`decode(params, tokens, index, prefix, mask, cache)`, `empty_cache(params, P, G, T)` and
`head(params)`, as `models.decoder.Decoder` has them: keys and values are trees of arrays
[..., P, K, N, Dh] (of prompts) and [..., P·G, K, _, _] (of completions).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.logprobs import token_logprobs
from grpo_jax.sampling import compaction


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["tokens", "mask", "ended", "logp", "entropy"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Completions:
  """What the sampler returns.

  Attributes:
    tokens: [P, G, T]; after the ending token, `pad_id`.
    mask: [P, G, T], true up to and including the ending token.
    ended: [P, G], completions that stopped by themselves; the others ran into the budget.
    logp: [P, G, T], nats: log-probability of each token when it was drawn; 0 where masked.
    entropy: [P, G, T], nats, of the distribution each token was drawn from; 0 where masked.
  """

  tokens: Any  # arrays, on the device or fetched from it
  mask: Any
  ended: Any
  logp: Any
  entropy: Any


def row_keys(key: jax.Array, prompt_ids: Int[Array, "P"], group: int) -> jax.Array:
  """One random stream per completion [P, G]: folded from the prompt's and the sample's number.

  A stream belongs to (key, prompt id, sample), so how prompts are split over batches, hosts or
  devices changes no sample.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return jax.vmap(lambda k: fold(k, jnp.arange(group)))(fold(key, prompt_ids))


def draw(
  logits: Float[Array, "... V"], keys: jax.Array
) -> tuple[Int[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
  """An exact draw from `softmax(logits)` per row, its log-probability and the row's entropy, nats.

  The vocabulary is cut into about sqrt(V) blocks: one uniform picks the block, a second the
  token inside it. That needs two random numbers per row instead of V, sums at most sqrt(V)
  numbers in a row (so rare tokens keep their probability in float32), and never returns a token
  of probability 0. What the blocks sum up to is the normalizer of the log-probability, too.
  """
  vocab = logits.shape[-1]
  width = 1 << max(vocab.bit_length() // 2, 1)
  blocks = -(-vocab // width)
  z = logits - logits.max(-1, keepdims=True)
  padding = [(0, 0)] * (z.ndim - 1) + [(0, blocks * width - vocab)]
  z = jnp.pad(z, padding, constant_values=-jnp.inf).reshape(*z.shape[:-1], blocks, width)
  p = jnp.exp(z)
  sums = p.sum(-1)
  uniform = _per_key(lambda key: jax.random.uniform(key, (2,)), keys)
  block = _invert(sums, uniform[..., 0])
  inside = jnp.take_along_axis(z, block[..., None, None], axis=-2)[..., 0, :]
  place = _invert(jnp.exp(inside), uniform[..., 1])
  total = sums.sum(-1)
  entropy = jnp.log(total) - jnp.where(p > 0, p * z, 0.0).sum((-2, -1)) / total
  chosen = jnp.take_along_axis(inside, place[..., None], axis=-1)[..., 0]
  return block * width + place, chosen - jnp.log(total), entropy


def _per_key(function: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
  """`function` of each key of an array of keys of any shape."""
  result = jax.vmap(function)(keys.reshape(-1))
  return result.reshape(*keys.shape, *result.shape[1:])


def _invert(p: Float[Array, "... n"], uniform: Float[Array, "..."]) -> Int[Array, "..."]:
  """Index i with probability `p[i] / sum(p)`: the first whose cumulative sum exceeds u · total."""
  cumulative = jnp.cumsum(p, axis=-1)
  total = cumulative[..., -1:]
  # u · total may round up to total; staying below it keeps the index on a token with p > 0.
  target = jnp.minimum(uniform[..., None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
  return jnp.sum(cumulative <= target, axis=-1)


def compactions(length: int) -> int:
  """How often rows are moved together in completions of up to so many tokens.

  Each halving compiles one more loop, which short completions do not earn back: none below 32
  tokens, one more with every doubling, three from 128 on.

  >>> [compactions(length) for length in (6, 32, 64, 128, 4096)]
  [0, 1, 2, 3, 3]
  """
  return min(max(length.bit_length() - 5, 0), 3)


def generate(
  model: Any,
  params: Any,
  prompts: Int[Array, "P N"],
  prompt_mask: Bool[Array, "P N"],
  keys: jax.Array,
  stop_table: Int[Array, "S V"],
  *,
  length: int,
  temperature: float,
  pad_id: int,
  max_compactions: int = 0,
  prompt_shards: int = 1,
) -> Completions:
  """Samples G completions of up to `length` tokens for each prompt.

  Args:
    prompts, prompt_mask: left-padded.
    keys: typed random keys [P, G], one stream per completion (`row_keys`); token t of a
      completion uses `fold_in(key, t)`.
    stop_table: state after each token, as `stopping.stop_table` makes it: a completion starts in
      state 0 and has ended in state S - 1. The ending token is part of it.
    temperature: 0 is greedy (the largest logit; its recorded log-probability is at temperature
      1), otherwise the softmax of logits / temperature is sampled, all of it.
    max_compactions: how often at most the rows that still live move into arrays of half as many rows
      (`compaction`); each is one more loop to compile. Completions do not depend on it.
    prompt_shards: equal parts of the prompts; no row moves from one into another.

  The loops end on the device, the last one as soon as every completion has stopped.
  """
  count, group = keys.shape
  # As an embedding lies; written as `hidden @ head`, the loop gets a transposed copy of it.
  table, end = model.head(params).T, stop_table.shape[0] - 1

  def next_token(hidden: Array, index: Any, rows: _Rows) -> _Rows:
    drawn = _pick(hidden, table, model.config.softcap, temperature, rows.keys, index)
    return _written(rows, index, drawn, stop_table, pad_id)

  def step(prefix: Any, prompt_mask: Array, carry: tuple) -> tuple:
    index, rows, cache = carry
    hidden, cache = model.decode(params, rows.token, index - 1, prefix, prompt_mask, cache)
    return index + 1, next_token(hidden, index, rows), cache

  def going(row_map: compaction.RowMap, smaller: compaction.Shape | None, carry: tuple) -> Array:
    index, rows, _ = carry
    live = rows.state != end
    more = (index < length) & live.any()
    return more if smaller is None else more & ~compaction.fits(row_map, live, smaller)

  hidden, prefix = model.prefill(params, prompts, prompt_mask)
  hidden = jnp.broadcast_to(hidden[:, None], (count, group, hidden.shape[-1]))
  rows = next_token(hidden, 0, _no_rows(keys, length, stop_table.dtype, pad_id))
  carry = (jnp.int32(1), rows, model.empty_cache(params, count, group, max(length - 1, 1)))
  shape, *others = compaction.shapes(count // prompt_shards, group, max_compactions)
  row_map, every = compaction.start(prompt_shards, shape), None
  for smaller in (*others, None):
    body = partial(step, prefix, prompt_mask)
    index, rows, cache = jax.lax.while_loop(partial(going, row_map, smaller), body, carry)
    done = (rows.state, rows.written)
    every = done if every is None else compaction.scatter_rows(every, row_map, done)
    if smaller is not None:
      row_map, moved = compaction.regroup(row_map, rows.state != end, smaller)
      rows = moved.rows(rows)
      rows = dataclasses.replace(rows, state=jnp.where(moved.valid, rows.state, end))
      carry = (index, rows, moved.flat_rows(cache, axis=-4))
      prefix, prompt_mask = moved.chunks(prefix, axis=-4), moved.chunks(prompt_mask)
  state, (tokens, mask, logp, entropy) = every
  return Completions(tokens=tokens, mask=mask, ended=state == end, logp=logp, entropy=entropy)


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "token", "state", "written"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Rows:
  """What the loops know of each row, [C, g] or [C, g, T].

  Attributes:
    token: the one drawn last.
    state: in the table of stops.
    written: tokens, mask, logp and entropy, as in `Completions`.
  """

  keys: Any
  token: Any
  state: Any
  written: tuple[Any, Any, Any, Any]


def _no_rows(keys: jax.Array, length: int, state_dtype: Any, pad_id: int) -> _Rows:
  """Before the first token."""
  shape = (*keys.shape, length)
  zeros, none = jnp.zeros(shape), jnp.zeros(keys.shape, jnp.int32)
  written = (jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), zeros, zeros)
  return _Rows(keys, none, none.astype(state_dtype), written)


def _pick(
  hidden: Float[Array, "C g D"],
  table: Float[Array, "V D"],
  softcap: float | None,
  temperature: float,
  keys: jax.Array,
  index: Any,
) -> tuple[Int[Array, "C g"], Float[Array, "C g"], Float[Array, "C g"]]:
  """Token number `index` of each row, its log-probability and the entropy it was drawn from."""
  table = table.astype(hidden.dtype)
  logits = jnp.einsum("cgd,vd->cgv", hidden, table, preferred_element_type=jnp.float32)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if temperature > 0:
    keys = _per_key(lambda key: jax.random.fold_in(key, index), keys)
    tokens, *measured = draw(logits / temperature, keys)
  else:
    tokens = logits.argmax(-1)
    measured = token_logprobs(logits, tokens)
  return tokens.astype(jnp.int32), *measured


def _written(rows: _Rows, index: Any, drawn: tuple, stop_table: Array, pad_id: int) -> _Rows:
  """With one token and its numbers in place; nothing in rows that have ended."""
  end = stop_table.shape[0] - 1
  done = rows.state == end
  token, logp, entropy = (jnp.where(done, no, x) for no, x in zip((pad_id, 0.0, 0.0), drawn))
  written = tuple(
    jax.lax.dynamic_update_slice_in_dim(array, values[..., None], index, axis=2)
    for array, values in zip(rows.written, (token, ~done, logp, entropy))
  )
  return _Rows(rows.keys, token, jnp.where(done, end, stop_table[rows.state, token]), written)
