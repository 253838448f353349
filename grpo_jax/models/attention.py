"""Attention in which the completions of a group read the keys of their one prompt.

`tiled_attention` is the plain implementation, which runs everywhere; `kernels.py` has those for TPUs and
GPUs. Axes: P prompts, G completions per prompt, S queries, N prompt tokens, T' tokens of a
completion, H query heads, K key-value heads, d head width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array

KeysValues = tuple[Array, Array]

# Scores of one head and sequence, queries x keys: up to how many they are computed all at once, and
# how many at a time where there are more.
AT_ONCE, BLOCK = 2**22, 2**19
MASKED = -1e30  # finite, so that a query without any visible key gives numbers, not NaN
EVERYTHING = 2**30  # the window of a layer that sees all tokens


def prompt_positions(mask: Bool[Array, "P N"]) -> Int[Array, "P N"]:
  """Position of each real prompt token, counted from 0 whatever the padding."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def window_of(local: Array | bool | None, window: int) -> Int[Array, ""] | None:
  """What `near` takes in a layer that is `local` or not; None where a model has no local layers."""
  return None if local is None else jnp.where(local, window, EVERYTHING)


def tiled_attention(
  q: Float[Array, "P S H d"],
  k: Float[Array, "P S K d"],
  v: Float[Array, "P S K d"],
  prompt_mask: Bool[Array, "P N"],
  local: Array | bool | None = None,
  *,
  group: int = 0,
  window: int = 0,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "P S H d"]:
  """Attention of whole rows: a prompt, then its completions one after another, S = N + G T'.

  A prompt is left-padded and sees itself causally. A completion sees the whole prompt and itself
  causally, none of the others. What padding sees is of no meaning, and nothing else sees padding.
  All scores at once, or in blocks of queries where there are many (`over_queries`).

  Args:
    local: whether this layer is one with a window, which may be known at run time only.
    group: G; 0 for prompts alone.
    window: of local layers: a query sees the last so many real tokens, itself included.
    scale, softcap: as in `group_attention`.
  """
  n, last = prompt_mask.shape[1], window_of(local, window)
  options = {"scale": scale, "softcap": softcap}
  slots = jnp.arange(n)

  def of_prompt(q, at):
    visible = near(at[:, None] >= slots, at, slots, last) & prompt_mask[:, None, :]
    own = k[:, None, :n], v[:, None, :n]
    return group_attention(q, own, visible[:, None, None, None], **options)

  first = over_queries(of_prompt, q[:, None, :n], n)[:, 0]
  if q.shape[1] == n:
    return first
  length = (q.shape[1] - n) // group
  index, start = jnp.arange(length), prompt_mask.sum(-1)[:, None]
  in_prompt = prompt_positions(prompt_mask)
  own_q, *own = (x[:, n:].reshape(x.shape[0], group, length, *x.shape[2:]) for x in (q, k, v))

  def of_completions(q, at):
    causal = near(at[:, None] >= index, at, index, last)
    seen = near(prompt_mask[:, None], start + at, in_prompt, last)
    return group_attention(q, tuple(own), causal, (k[:, :n], v[:, :n]), seen, **options)

  mixed = over_queries(of_completions, own_q, n + length)
  return jnp.concatenate([first, mixed.reshape(q[:, n:].shape)], axis=1)


def group_attention(
  q: Float[Array, "P G S H d"],
  own: KeysValues,
  own_mask: Bool[Array, "..."],
  prefix: KeysValues | None = None,
  prefix_mask: Bool[Array, "P #S N"] | None = None,
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "P G S H d"]:
  """Attention of each sequence to its own keys [P, G, S', K, d] and to its prompt's [P, N, K, d].

  One softmax over both sources. The prompt's keys are read by all G sequences and never repeated.

  Args:
    own_mask: true where a query sees one of its own keys; broadcastable to [S, S'].
    prefix, prefix_mask: keys and values of the prompt, and which of its tokens a query sees.
    scale: of `q · k`.
    softcap: `scores = softcap * tanh(scores / softcap)`, as Gemma 2 does; None = not capped.
  """
  k, v = own
  prompts, group, length, heads, dim = q.shape
  q = q.reshape(prompts, group, length, k.shape[-2], heads // k.shape[-2], dim) * scale
  to_own = _scores("pgtkrd,pgskd->pgkrts", q, k, own_mask, softcap)
  if prefix is None:
    weights = jax.nn.softmax(to_own, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("pgkrts,pgskd->pgtkrd", weights, v)
  else:
    seen = prefix_mask[:, None, None, None]
    to_prefix = _scores("pgtkrd,pnkd->pgkrtn", q, prefix[0], seen, softcap)
    to_prefix, to_own = _weights(to_prefix, to_own, v.dtype)
    mixed = jnp.einsum("pgkrtn,pnkd->pgtkrd", to_prefix, prefix[1])
    mixed += jnp.einsum("pgkrts,pgskd->pgtkrd", to_own, v)
  return mixed.reshape(prompts, group, length, heads, dim)


def over_queries(
  attend: Callable[[Array, Array], Array], q: Float[Array, "P G S H d"], keys: int
) -> Float[Array, "P G S H d"]:
  """`attend(q, arange(S))`, for long sequences in blocks of queries, each of which sees all keys.

  The backward pass recomputes a block's scores, so that memory grows with queries + keys and not
  with their product (Rabe and Staats 2021, arXiv 2112.05682, with whole rows of scores).

  Args:
    attend: queries [P, G, B, H, d] and their numbers [B] -> what they see, [P, G, B, H, d].
    keys: how many keys a query meets.
  """
  length = q.shape[2]
  if length * keys <= AT_ONCE:
    return attend(q, jnp.arange(length))
  size = max(BLOCK // keys, 1)
  count = -(-length // size)
  whole = jnp.pad(q, [(0, 0), (0, 0), (0, count * size - length), (0, 0), (0, 0)])
  blocks = jnp.moveaxis(whole.reshape(*q.shape[:2], count, size, *q.shape[3:]), 2, 0)
  numbers = jnp.minimum(jnp.arange(count * size), length - 1).reshape(count, size)
  mixed = jax.lax.map(jax.checkpoint(lambda block: attend(*block)), (blocks, numbers))
  return jnp.moveaxis(mixed, 0, 2).reshape(whole.shape)[:, :, :length]


def cached_attention(
  q: Float[Array, "P G H d"],
  own: KeysValues,
  own_mask: Bool[Array, "..."],
  prefix: KeysValues,
  prefix_mask: Bool[Array, "P 1 N"],
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "P G H d"]:
  """`group_attention` of one query, keys and values as they are kept while decoding.

  They lie as the products read them, so that nothing of their size is copied: heads before tokens,
  and one axis R = P·G for the completions of all prompts.

  Args:
    own: keys [R, K, d, T] and values [R, K, T, d] of completions.
    own_mask: [T] or broadcastable, true where a query sees one of its own keys.
    prefix: [P, K, N, d], of prompts.
  """
  prompts, group, heads, dim = q.shape
  kv_heads = own[0].shape[1]
  q = q.reshape(prompts, group, kv_heads, -1, dim) * scale

  def by_prompt(x):  # [R, K, r, ...] -> [P, K, G r, ...]
    x = x.reshape(prompts, group, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(prompts, kv_heads, -1, *x.shape[4:])

  def by_row(x):  # and back
    x = x.reshape(prompts, kv_heads, group, -1, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(prompts * group, *x.shape[2:])

  rows = q.reshape(-1, *q.shape[2:])
  to_prefix = _scores("pkqd,pknd->pkqn", by_prompt(rows), prefix[0], prefix_mask[:, None], softcap)
  to_own = _scores("akrd,akdt->akrt", rows, own[0], own_mask, softcap)
  # One softmax over both, without putting them together.
  top = jnp.maximum(by_row(to_prefix.max(-1)), to_own.max(-1))
  to_prefix = jnp.exp(to_prefix - by_prompt(top)[..., None])
  to_own = jnp.exp(to_own - top[..., None])
  total = by_row(to_prefix.sum(-1)) + to_own.sum(-1)
  mixed = by_row(jnp.einsum("pkqn,pknd->pkqd", to_prefix.astype(q.dtype), prefix[1]))
  mixed += jnp.einsum("akrt,aktd->akrd", to_own.astype(q.dtype), own[1])
  return (mixed / total[..., None]).astype(q.dtype).reshape(prompts, group, heads, dim)


def _scores(equation: str, q: Array, keys: Array, mask: Array, softcap: float | None) -> Array:
  """Scores in float32 or wider, `MASKED` where a query does not see a key."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  values = jnp.einsum(equation, q, keys, preferred_element_type=wide)
  if softcap is not None:
    values = softcap * jnp.tanh(values / softcap)
  return jnp.where(mask, values, MASKED)


def _weights(to_prefix: Array, to_own: Array, dtype: Any) -> list[Array]:
  """One softmax over scores of both sources, in its two parts."""
  weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_own], axis=-1), axis=-1)
  return jnp.split(weights.astype(dtype), [to_prefix.shape[-1]], axis=-1)


def near(
  mask: Bool[Array, "..."],
  queries: Int[Array, "... q"],
  keys: Int[Array, "... k"],
  window: Int[Array, ""] | None,
) -> Bool[Array, "..."]:
  """`mask`, and with a window only where a key is among the last `window` tokens of its query.

  Args:
    mask: broadcastable to [..., q, k].
    queries, keys: their positions; a query is itself the last token of its window.
  """
  if window is None:
    return mask
  return mask & (queries[..., :, None] - keys[..., None, :] < window)
