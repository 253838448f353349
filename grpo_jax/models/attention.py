"""Computes attention in which the completions of a group share the keys of their one prompt.

`tiled_attention` is the plain implementation and runs everywhere; `kernels.py` holds those for TPUs
and GPUs. Axes: P prompts, G completions per prompt, S queries, N prompt tokens, T' tokens of a
completion, H query heads, K key-value heads, d head size.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, DTypeLike, Float, Int, Shaped

from grpo_jax.core.checks import Array
from grpo_jax.core.logprobs import soft_cap

KeysValues = tuple[Array, Array]

# Number of scores (queries x keys) of one head of one sequence: up to UNTILED_SCORES are computed
# at once; longer sequences are cut into tiles of queries with about TILE_SCORES scores each.
UNTILED_SCORES, TILE_SCORES = 2**22, 2**19
MASKED = -1e30  # finite, so that a query without any visible key gives numbers instead of NaN
UNLIMITED = 2**30  # window of a layer that sees all tokens


def prompt_positions(mask: Bool[Array, "P N"]) -> Int[Array, "P N"]:
  """Returns the position of each prompt token, counted from the first token that is not padding.

  Example:
    >>> prompt_positions(jnp.array([[False, True, True]])).tolist()
    [[0, 0, 1]]
  """
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def layer_window(local: Array | bool | None, window: int) -> Int[Array, ""] | None:
  """Returns the window of a layer for `within_window`; None for a model without local layers."""
  return None if local is None else jnp.where(local, window, UNLIMITED)


def join_rows(
  prompts: Shaped[Array, "P N ..."], completions: Shaped[Array, "P G T ..."], shards: int = 1
) -> Shaped[Array, "P S ..."]:
  """Returns rows: each prompt followed by its completions, S = N + G T.

  Args:
    shards: number of equal shards of each row, which divides N and T. Shard i holds part i of the
      prompt, followed by part i of each completion.

  Example:
    >>> join_rows(jnp.array([[0, 1]]), jnp.array([[[2, 3], [4, 5]]]), shards=2).tolist()
    [[0, 2, 4, 1, 3, 5]]
  """
  count, group, length, *rest = completions.shape
  own = completions.reshape(count, group, shards, length // shards, *rest).swapaxes(1, 2)
  own = own.reshape(count, shards, group * length // shards, *rest)
  of_prompts = prompts.reshape(count, shards, prompts.shape[1] // shards, *rest)
  rows = jnp.concatenate([of_prompts, own], axis=2)
  return rows.reshape(count, prompts.shape[1] + group * length, *rest)


def split_rows(
  rows: Shaped[Array, "P S ..."], prompt: int, group: int, shards: int = 1
) -> tuple[Shaped[Array, "P N ..."], Shaped[Array, "P G T ..."]]:
  """Returns the prompts and completions of rows; undoes `join_rows`.

  Args:
    prompt: tokens of a prompt, N.
    group: completions per prompt, G.

  Example:
    >>> [x.tolist() for x in split_rows(jnp.array([[0, 2, 4, 1, 3, 5]]), 2, 2, shards=2)]
    [[[0, 1]], [[[2, 3], [4, 5]]]]
  """
  count, slots, *rest = rows.shape
  length = (slots - prompt) // group
  parts = rows.reshape(count, shards, slots // shards, *rest)
  of_prompts = parts[:, :, : prompt // shards].reshape(count, prompt, *rest)
  own = parts[:, :, prompt // shards :].reshape(count, shards, group, length // shards, *rest)
  return of_prompts, own.swapaxes(1, 2).reshape(count, group, length, *rest)


def tiled_attention(
  q: Float[Array, "P Q H d"],
  k: Float[Array, "P S K d"],
  v: Float[Array, "P S K d"],
  prompt_mask: Bool[Array, "P N"],
  local: Array | bool | None = None,
  *,
  group: int = 0,
  window: int = 0,
  scale: float,
  softcap: float | None = None,
  sinks: Float[Array, "H"] | None = None,
  shard: tuple[Array | int, int] = (0, 1),
) -> Float[Array, "P Q H d"]:
  """Computes attention over whole rows: a prompt followed by its completions, S = N + G T'.

  A prompt is left-padded and attends to itself causally. A completion attends to the whole prompt
  and to itself causally, but not to the other completions. Outputs at padding positions are
  undefined; no real token attends to padding. Long rows are cut into tiles of queries.

  Args:
    local: whether this layer is local, possibly known at run time only; None for a model without
      local layers.
    group: completions per prompt, G; 0 if the rows are prompts only.
    window: number of real tokens that a query of a local layer sees, including itself.
    scale: factor on `q · k`.
    softcap, sinks: as in `group_attention`.
    shard: (i, count), if `q` is shard number i of `count` shards of the rows, and `k` and `v` are
      all of them, in the order of `join_rows`. The result is that of the shard.
  """
  n, window_here = prompt_mask.shape[1], layer_window(local, window)
  options = {"scale": scale, "softcap": softcap, "sinks": sinks}
  prompt_slots, (number, shards) = jnp.arange(n), shard
  if shards > 1:
    k, v = (join_rows(*split_rows(x, n, group, shards)) for x in (k, v))

  def attend_prompt(q, index):
    causal = within_window(index[:, None] >= prompt_slots, index, prompt_slots, window_here)
    visible = causal & prompt_mask[:, None, :]
    own = k[:, None, :n], v[:, None, :n]
    return group_attention(q, own, visible[:, None, None, None], **options)

  here = n // shards
  of_prompt = tile_queries(attend_prompt, q[:, None, :here], n, number * here)[:, 0]
  if k.shape[1] == n:
    return of_prompt
  slots, start = jnp.arange((k.shape[1] - n) // group), prompt_mask.sum(-1)[:, None]
  positions = prompt_positions(prompt_mask)
  _, own_q = split_rows(q, here, group)
  own = tuple(split_rows(x, n, group)[1] for x in (k, v))

  def attend_completions(q, index):
    causal = within_window(index[:, None] >= slots, index, slots, window_here)
    visible = within_window(prompt_mask[:, None], start + index, positions, window_here)
    return group_attention(q, own, causal, (k[:, :n], v[:, :n]), visible, **options)

  keys, first = n + len(slots), number * (len(slots) // shards)
  of_completions = tile_queries(attend_completions, own_q, keys, first)
  return join_rows(of_prompt, of_completions)


def group_attention(
  q: Float[Array, "P G S H d"],
  own: KeysValues,
  own_mask: Bool[Array, "..."],
  prefix: KeysValues | None = None,
  prefix_mask: Bool[Array, "P #S N"] | None = None,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "P G S H d"]:
  """Computes attention of each sequence to its own keys [P, G, S', K, d] and its prompt's keys.

  One softmax runs over both sources. All G sequences read the prompt's keys [P, N, K, d], which are
  never repeated.

  Args:
    own: keys and values of the sequences.
    own_mask: true where a query sees one of its own keys; broadcastable to [S, S'].
    prefix: keys and values of the prompts; None if there are none.
    prefix_mask: true where a query sees a prompt token.
    scale: factor on `q · k`.
    softcap: soft cap of the scores, `logprobs.soft_cap`; None disables it.
    sinks: a score of each head that takes part in its softmax and has no value (Xiao et al. 2023,
      arXiv 2309.17453, as gpt-oss learns it); None: the weights of the keys sum to one.
  """
  k, v = own
  prompts, group, length, heads, dim = q.shape
  q = q.reshape(prompts, group, length, k.shape[-2], heads // k.shape[-2], dim) * scale
  to_own = _scores("pgtkrd,pgskd->pgkrts", q, k, own_mask, softcap)
  if sinks is not None:
    sinks = sinks.astype(to_own.dtype).reshape(k.shape[-2], -1, 1, 1)
  if prefix is None:
    [weights] = _joint_softmax([to_own], sinks, v.dtype)
    mixed = jnp.einsum("pgkrts,pgskd->pgtkrd", weights, v)
  else:
    visible = prefix_mask[:, None, None, None]
    to_prefix = _scores("pgtkrd,pnkd->pgkrtn", q, prefix[0], visible, softcap)
    to_prefix, to_own = _joint_softmax([to_prefix, to_own], sinks, v.dtype)
    mixed = jnp.einsum("pgkrtn,pnkd->pgtkrd", to_prefix, prefix[1])
    mixed += jnp.einsum("pgkrts,pgskd->pgtkrd", to_own, v)
  return mixed.reshape(prompts, group, length, heads, dim)


def tile_queries(
  attend: Callable[[Array, Array], Array],
  q: Float[Array, "P G S H d"],
  keys: int,
  first: Array | int = 0,
) -> Float[Array, "P G S H d"]:
  """Computes `attend(q, first + arange(S))`, for long sequences one tile of queries at a time.

  Each tile sees all keys. The backward pass recomputes the scores of a tile, so that memory grows
  with queries + keys instead of with their product.

  Args:
    attend: maps queries [P, G, B, H, d] and their indices [B] to attention outputs [P, G, B, H, d].
    q: all queries.
    keys: number of keys that a query meets.
    first: index of the first query.

  References:
    Rabe and Staats 2021, arXiv 2112.05682; here with whole rows of scores.
  """
  length = q.shape[2]
  if length * keys <= UNTILED_SCORES:
    return attend(q, first + jnp.arange(length))
  size = max(TILE_SCORES // keys, 1)
  count = -(-length // size)
  padded = jnp.pad(q, [(0, 0), (0, 0), (0, count * size - length), (0, 0), (0, 0)])
  tiles = jnp.moveaxis(padded.reshape(*q.shape[:2], count, size, *q.shape[3:]), 2, 0)
  indices = first + jnp.minimum(jnp.arange(count * size), length - 1).reshape(count, size)
  mixed = jax.lax.map(jax.checkpoint(lambda tile: attend(*tile)), (tiles, indices))
  return jnp.moveaxis(mixed, 0, 2).reshape(padded.shape)[:, :, :length]


def cached_attention(
  q: Float[Array, "P G H d"],
  own: KeysValues,
  own_mask: Bool[Array, "..."],
  prefix: KeysValues,
  prefix_mask: Bool[Array, "P #q N"],
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Float[Array, "K q"] | None = None,
) -> Float[Array, "P G H d"]:
  """Computes `group_attention` of one token per sequence, with the cache layout of decoding.

  Keys and values are stored in the order in which the matrix products read them, so that nothing of
  their size is copied: heads before tokens, and one axis R = P·G for all completions.

  Args:
    q: the queries of each sequence; those that read one key head are neighbours.
    own: keys [R, K, d, T] and values [R, K, T, d] of the completions.
    own_mask: true where a query sees one of its own keys, broadcastable to [R, K, H / K, T].
    prefix: keys and values [P, K, N, d] of the prompts.
    prefix_mask: true where a query sees a prompt token, for all queries of a key head or for each,
      sequence by sequence.
    scale: factor on `q · k`.
    softcap: soft cap of the scores, as in `group_attention`.
    sinks: the same for each query of a key head.
  """
  prompts, group, heads, dim = q.shape
  kv_heads = own[0].shape[1]
  q = q.reshape(prompts, group, kv_heads, -1, dim) * scale

  def by_prompt(x):  # [R, K, r, ...] -> [P, K, G r, ...]
    x = x.reshape(prompts, group, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(prompts, kv_heads, -1, *x.shape[4:])

  def by_row(x):  # [P, K, G r, ...] -> [R, K, r, ...]
    x = x.reshape(prompts, kv_heads, group, -1, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(prompts * group, *x.shape[2:])

  rows = q.reshape(-1, *q.shape[2:])
  to_prefix = _scores("pkqd,pknd->pkqn", by_prompt(rows), prefix[0], prefix_mask[:, None], softcap)
  to_own = _scores("akrd,akdt->akrt", rows, own[0], own_mask, softcap)
  # One softmax over both sources, without concatenating them.
  top = jnp.maximum(by_row(to_prefix.max(-1)), to_own.max(-1))
  if sinks is not None:
    sinks = sinks.astype(to_own.dtype)
    top = jnp.maximum(top, sinks)
  to_prefix = jnp.exp(to_prefix - by_prompt(top)[..., None])
  to_own = jnp.exp(to_own - top[..., None])
  total = by_row(to_prefix.sum(-1)) + to_own.sum(-1)
  if sinks is not None:
    total += jnp.exp(sinks - top)
  mixed = by_row(jnp.einsum("pkqn,pknd->pkqd", to_prefix.astype(q.dtype), prefix[1]))
  mixed += jnp.einsum("akrt,aktd->akrd", to_own.astype(q.dtype), own[1])
  return (mixed / total[..., None]).astype(q.dtype).reshape(prompts, group, heads, dim)


def _scores(equation: str, q: Array, keys: Array, mask: Array, softcap: float | None) -> Array:
  """Returns scores in float32 or wider, `MASKED` where a query does not see a key."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum(equation, q, keys, preferred_element_type=dtype)
  return jnp.where(mask, soft_cap(scores, softcap), MASKED)


def _joint_softmax(
  scores: Sequence[Array], sinks: Float[Array, "K r 1 1"] | None, dtype: DTypeLike
) -> list[Array]:
  """Returns one softmax over the scores of all sources, split into its parts, without the sinks."""
  if sinks is not None:
    scores = [*scores, jnp.broadcast_to(sinks, (*scores[0].shape[:-1], 1))]
  if len(scores) == 1:
    return [jax.nn.softmax(scores[0], axis=-1).astype(dtype)]
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  ends = np.cumsum([part.shape[-1] for part in scores[:-1]])
  parts = jnp.split(weights.astype(dtype), ends, axis=-1)
  return parts if sinks is None else parts[:-1]


def within_window(
  mask: Bool[Array, "..."],
  queries: Int[Array, "... q"],
  keys: Int[Array, "... k"],
  window: Int[Array, ""] | None,
) -> Bool[Array, "..."]:
  """Restricts `mask` to the last `window` tokens before each query, including the query itself.

  Args:
    mask: true where a query sees a key; broadcastable to [..., q, k].
    queries: positions of the queries.
    keys: positions of the keys.
    window: window size in tokens; None returns `mask` unchanged.

  Example:
    >>> index = jnp.arange(3)
    >>> within_window(index[:, None] >= index, index, index, 2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
  """
  if window is None:
    return mask
  return mask & (queries[..., :, None] - keys[..., None, :] < window)
