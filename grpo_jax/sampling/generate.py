"""Samples completions on the device: one prefill per prompt, one decode step per token and group.

The model is an argument, as `models.protocol.Model` describes it. Keys and values are trees of
arrays: `[..., P, K, N, Dh]` for prompts, `[..., P·G, K, _, _]` for completions.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.logprobs import soft_cap, token_logprobs
from grpo_jax.models.protocol import Cache, Model, Params
from grpo_jax.sampling import compaction
from grpo_jax.sampling.filters import TokenFilter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
  """Sampled completions, on the device or fetched from it.

  Attributes:
    tokens: [P, G, T]; `pad_id` after the ending token.
    mask: [P, G, T], true up to and including the ending token.
    ended: [P, G], true for completions that reached an ending token; the others were cut off at
      the token budget.
    logp: [P, G, T], nats: log-probability of each token when it was drawn; 0 where masked.
    entropy: [P, G, T], nats, of the distribution each token was drawn from; 0 where masked.
    row_steps: [P], decode steps times rows, shared out over the prompts; None if not counted.
    routes, prompt_routes: [P, G, T, C] and [P, N, C], the experts of each token, from a model that
      records them (`routes_of`). The last token of a row is never read, and has none.
  """

  tokens: Any
  mask: Any
  ended: Any
  logp: Any
  entropy: Any
  row_steps: Any = None
  routes: Any = None
  prompt_routes: Any = None


def row_keys(key: jax.Array, prompt_ids: Int[Array, "P"], group: int) -> jax.Array:
  """Returns one random key per completion, [P, G], folded from prompt number and sample number.

  A key depends only on (key, prompt number, sample number), so splitting prompts over batches,
  hosts or devices changes no sample.

  Example:
    >>> key = jax.random.key(0)
    >>> both, second = row_keys(key, jnp.array([4, 7]), 3), row_keys(key, jnp.array([7]), 3)
    >>> both.shape, bool((both[1] == second[0]).all())
    ((2, 3), True)
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return jax.vmap(lambda k: fold(k, jnp.arange(group)))(fold(key, prompt_ids))


def draw(
  logits: Float[Array, "... V"], keys: jax.Array
) -> tuple[Int[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
  """Draws one token per row, exactly from `softmax(logits)`.

  The vocabulary is cut into about sqrt(V) blocks: one uniform number picks the block, a second one
  the token inside it. This takes two random numbers per row instead of V. It sums at most about
  sqrt(V) numbers in a row, so rare tokens keep their probability in float32, and it never returns
  a token of probability 0. The sum over blocks also normalizes the log-probability.

  Args:
    logits: unnormalized log-probabilities; -inf is probability 0.
    keys: one typed random key per row.

  Returns:
    (token, its log-probability in nats, entropy of the row in nats).

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> tokens, logp, entropy = draw(jnp.array([[0.0, -jnp.inf]]), keys)
    >>> int(tokens[0]), abs(float(logp[0])), abs(float(entropy[0]))
    (0, 0.0, 0.0)
  """
  vocab = logits.shape[-1]
  width = 1 << max(vocab.bit_length() // 2, 1)
  blocks = -(-vocab // width)
  z = logits - logits.max(-1, keepdims=True)
  padding = [(0, 0)] * (z.ndim - 1) + [(0, blocks * width - vocab)]
  z = jnp.pad(z, padding, constant_values=-jnp.inf).reshape(*z.shape[:-1], blocks, width)
  p = jnp.exp(z)
  sums = p.sum(-1)
  # The middle of a float's cell: exactly 0 would pick the first entry that is not impossible, with
  # a chance of 2^-23, however small its probability is.
  uniform = _per_key(lambda key: jax.random.uniform(key, (2,)) + 2.0**-24, keys)
  block = _invert(sums, uniform[..., 0])
  inside = jnp.take_along_axis(z, block[..., None, None], axis=-2)[..., 0, :]
  column = _invert(jnp.exp(inside), uniform[..., 1])
  total = sums.sum(-1)
  entropy = jnp.log(total) - jnp.where(p > 0, p * z, 0.0).sum((-2, -1)) / total
  chosen = jnp.take_along_axis(inside, column[..., None], axis=-1)[..., 0]
  return block * width + column, chosen - jnp.log(total), entropy


def draw_filtered(
  logits: Float[Array, "... V"], keys: jax.Array, token_filter: TokenFilter
) -> tuple[Int[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
  """Draws one token per row from the tokens that a filter leaves, renormalized.

  Args:
    logits: at the sampling temperature.
    keys: one typed random key per row.
    token_filter: applies to the logits.

  Returns:
    (token, log-probability and entropy in nats), both of the filtered distribution.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> tokens, _, _ = draw_filtered(jnp.array([[0.0, 0.1]]), keys, TokenFilter(top_k=1))
    >>> int(tokens[0])
    1
  """
  order = jnp.argsort(-logits, axis=-1)  # stable: of equal tokens, the first comes first
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  rank, logp, entropy = draw(token_filter.apply(ranked), keys)
  return jnp.take_along_axis(order, rank[..., None], axis=-1)[..., 0], logp, entropy


def _per_key(function: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
  """Applies `function` to each key of an array of any shape."""
  result = jax.vmap(function)(keys.reshape(-1))
  return result.reshape(*keys.shape, *result.shape[1:])


def _invert(p: Float[Array, "... n"], uniform: Float[Array, "..."]) -> Int[Array, "..."]:
  """Returns index i with probability `p[i] / sum(p)`: the first with cumulative sum > u · sum."""
  cumulative = jnp.cumsum(p, axis=-1)
  total = cumulative[..., -1:]
  # u · total may round up to total; staying below it keeps the index on a token with p > 0.
  target = jnp.minimum(uniform[..., None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
  return jnp.sum(cumulative <= target, axis=-1)


def compactions(length: int) -> int:
  """Returns how often the rows of completions of up to `length` tokens are compacted.

  Each compaction compiles one more loop, which short completions do not earn back: none below 32
  tokens, one more with every doubling, three from 128 on.

  Example:
    >>> [compactions(length) for length in (6, 32, 64, 128, 4096)]
    [0, 1, 2, 3, 3]
  """
  return min(max(length.bit_length() - 5, 0), 3)


def generate(
  model: Model,
  params: Params,
  prompts: Int[Array, "P N"],
  prompt_mask: Bool[Array, "P N"],
  keys: jax.Array,
  stop_table: Int[Array, "S V"],
  *,
  length: int,
  temperature: float,
  pad_id: int,
  token_filter: TokenFilter | None = None,
  max_compactions: int = 0,
  prompt_shards: int = 1,
) -> Completions:
  """Samples G completions of up to `length` tokens for each prompt.

  The loops end on the device, the last one as soon as every completion has stopped.

  Args:
    prompts, prompt_mask: left-padded.
    keys: typed random keys [P, G], one per completion (`row_keys`); token t of a completion uses
      `fold_in(key, t)`.
    stop_table: state after each token, as `stopping.stop_table` makes it: a completion starts in
      state 0 and has ended in state S - 1. The ending token belongs to the completion.
    temperature: divides the logits. The softmax over the whole vocabulary is sampled. 0 is greedy:
      it takes the largest logit, and records its log-probability at temperature 1.
    pad_id: token after the end of a completion.
    token_filter: samples from part of the vocabulary, for evaluation; None samples from all of it.
    max_compactions: largest number of times that the live rows move into arrays of half as many
      rows (`compaction`). Each one compiles one more loop. Completions do not depend on it.
    prompt_shards: number of equal shards of the prompts; no row moves from one to another.
  """
  count, group = keys.shape
  # The transpose is how an embedding is stored. With `hidden @ head`, XLA copies the transposed
  # matrix into the loop.
  table, end = model.head(params).T, stop_table.shape[0] - 1

  def next_token(hidden: Array, index: Any, rows: Rows) -> Rows:
    drawn = pick(hidden, table, model.config.softcap, temperature, rows.keys, index, token_filter)
    return write_token(rows, index, drawn, stop_table, pad_id)

  def step(prefix: Cache, prompt_mask: Array, carry: tuple) -> tuple:
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
  rows = next_token(hidden, 0, no_rows(keys, length, stop_table.dtype, pad_id))
  prompt_routes = _routes_of(model, prefix)
  carry = (jnp.int32(1), rows, model.empty_cache(params, count, group, max(length - 1, 1)))
  shape, *others = compaction.shapes(count // prompt_shards, group, max_compactions)
  row_map, completed = compaction.start(prompt_shards, shape), None
  for smaller in (*others, None):
    body = partial(step, prefix, prompt_mask)
    index, rows, cache = jax.lax.while_loop(partial(going, row_map, smaller), body, carry)
    current = (rows.state, rows.written, _routes_of(model, cache, rows.state.shape))
    if completed is None:
      completed = current
    else:
      completed = compaction.scatter_rows(completed, row_map, current)
    if smaller is not None:
      row_map, gather = compaction.regroup(row_map, rows.state != end, smaller)
      rows = gather.rows(rows)
      rows = dataclasses.replace(rows, state=jnp.where(gather.valid, rows.state, end))
      carry = (index, rows, gather.flat_rows(cache, axis=-4))
      prefix, prompt_mask = gather.chunks(prefix, axis=-4), gather.chunks(prompt_mask)
  state, (tokens, mask, logp, entropy), routes = completed
  if routes is not None:
    routes = jnp.pad(routes, [(0, 0), (0, 0), (0, length - routes.shape[2]), (0, 0)])
  return Completions(
    tokens, mask, state == end, logp, entropy, routes=routes, prompt_routes=prompt_routes
  )


def _routes_of(model: Model, cache: Cache, shape: tuple[int, ...] | None = None) -> Array | None:
  """Returns the experts in a cache, with its rows in `shape`; None of a model without records."""
  routes = model.routes_of(cache) if hasattr(model, "routes_of") else None
  if routes is None or shape is None:
    return routes
  return routes.reshape(*shape, *routes.shape[1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Loop state of each row, [C, g] or [C, g, T].

  Attributes:
    keys: random key of the row.
    token: the last token.
    state: state in the stop table.
    written: tokens, mask, logp and entropy, as in `Completions`.
  """

  keys: Any
  token: Any
  state: Any
  written: tuple[Any, Any, Any, Any]


def no_rows(keys: jax.Array, length: int, state_dtype: Any, pad_id: int) -> Rows:
  """Returns the rows before the first token."""
  shape = (*keys.shape, length)
  zeros, none = jnp.zeros(shape), jnp.zeros(keys.shape, jnp.int32)
  written = (jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), zeros, zeros)
  return Rows(keys, none, none.astype(state_dtype), written)


def pick(
  hidden: Float[Array, "C g D"],
  table: Float[Array, "V D"],
  softcap: float | None,
  temperature: float,
  keys: jax.Array,
  number: Any,
  token_filter: TokenFilter | None = None,
) -> tuple[Int[Array, "C g"], Float[Array, "C g"], Float[Array, "C g"]]:
  """Returns token `number` of each row, its log-probability and its entropy.

  Args:
    number: number of the token in its row: one for all rows, or [C, g].
  """
  table = table.astype(hidden.dtype)
  logits = jnp.einsum("cgd,vd->cgv", hidden, table, preferred_element_type=jnp.float32)
  logits = soft_cap(logits, softcap)
  if temperature > 0:
    numbers = jnp.broadcast_to(number, keys.shape).reshape(-1)
    keys = jax.vmap(jax.random.fold_in)(keys.reshape(-1), numbers).reshape(keys.shape)
    if token_filter is None:
      tokens, logp, entropy = draw(logits / temperature, keys)
    else:
      tokens, logp, entropy = draw_filtered(logits / temperature, keys, token_filter)
  else:
    tokens = logits.argmax(-1)
    logp, entropy = token_logprobs(logits, tokens)
  return tokens.astype(jnp.int32), logp, entropy


def write_token(rows: Rows, index: Any, drawn: tuple, stop_table: Array, pad_id: int) -> Rows:
  """Returns the rows with one more token; rows that have ended get padding."""
  end = stop_table.shape[0] - 1
  ended = rows.state == end
  token, logp, entropy = (jnp.where(ended, no, x) for no, x in zip((pad_id, 0.0, 0.0), drawn))
  written = tuple(
    jax.lax.dynamic_update_slice_in_dim(array, values[..., None], index, axis=2)
    for array, values in zip(rows.written, (token, ~ended, logp, entropy))
  )
  return Rows(rows.keys, token, jnp.where(ended, end, stop_table[rows.state, token]), written)
