"""Sampling: one prefill per prompt, one decode step per token for the whole group.

The model is an argument with three functions: `prefill(params, tokens, mask)`,
`decode(params, tokens, index, prefix, mask, cache)`, `empty_cache(params, P, G, T)`, and
`head(params)`, as `models.decoder.Decoder` has them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.logprobs import token_logprobs


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


def draw(logits: Float[Array, "... V"], keys: jax.Array) -> Int[Array, "..."]:
  """An exact draw from `softmax(logits)` per row, by inverting the distribution function.

  The vocabulary is cut into about sqrt(V) blocks: one uniform picks the block, a second the
  token inside it. That needs two random numbers per row instead of V, sums at most sqrt(V)
  numbers in a row (so rare tokens keep their probability in float32), and never returns a token
  of probability 0.
  """
  vocab = logits.shape[-1]
  width = 1 << max(vocab.bit_length() // 2, 1)
  blocks = -(-vocab // width)
  p = jnp.exp(logits - logits.max(-1, keepdims=True))
  p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, blocks * width - vocab)])
  p = p.reshape(*p.shape[:-1], blocks, width)
  uniform = _per_key(lambda key: jax.random.uniform(key, (2,)), keys)
  block = _invert(p.sum(-1), uniform[..., 0])
  inside = jnp.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :]
  return block * width + _invert(inside, uniform[..., 1])


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

  The loop ends on the device as soon as every completion has stopped.
  """
  count, group = keys.shape
  head, softcap = model.head(params), model.config.softcap
  hidden, prefix = model.prefill(params, prompts, prompt_mask)
  hidden = jnp.broadcast_to(hidden[:, None], (count, group, hidden.shape[-1]))
  shape = (count, group, length)

  def pick(hidden, index):
    """The next token of each row, its log-probability and the entropy it was drawn from."""
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
      logits = softcap * jnp.tanh(logits / softcap)
    if temperature > 0:
      logits = logits / temperature
      tokens = draw(logits, _per_key(lambda key: jax.random.fold_in(key, index), keys))
    else:
      tokens = logits.argmax(-1)
    logp, entropy = token_logprobs(logits, tokens)
    return tokens.astype(jnp.int32), logp, entropy

  end = stop_table.shape[0] - 1

  def write(written, index, token, *measured):
    """Puts one token and its numbers in place, nothing in rows that have ended."""
    tokens, mask, arrays, state = written
    done = state == end
    token = jnp.where(done, pad_id, token)
    tokens, mask = _put(tokens, token, index), _put(mask, ~done, index)
    arrays = tuple(_put(a, jnp.where(done, 0.0, x), index) for a, x in zip(arrays, measured))
    state = jnp.where(done, end, stop_table[state, token])
    return token, (tokens, mask, arrays, state)

  def step(carry):
    index, token, written, cache = carry
    hidden, cache = model.decode(params, token, index - 1, prefix, prompt_mask, cache)
    token, written = write(written, index, *pick(hidden, index))
    return index + 1, token, written, cache

  def going(carry):
    index, _, (*_, state), _ = carry
    return (index < length) & (state != end).any()

  zeros = jnp.zeros(shape)
  blank = (
    jnp.full(shape, pad_id, jnp.int32),
    jnp.zeros(shape, bool),
    (zeros, zeros),
    jnp.zeros((count, group), stop_table.dtype),
  )
  token, written = write(blank, 0, *pick(hidden, 0))
  cache = model.empty_cache(params, count, group, max(length - 1, 1))
  carry = (jnp.int32(1), token, written, cache)
  _, _, (tokens, mask, (logp, entropy), state), _ = jax.lax.while_loop(going, step, carry)
  return Completions(tokens=tokens, mask=mask, ended=state == end, logp=logp, entropy=entropy)


def _put(array: jax.Array, values: jax.Array, index: jax.Array | int) -> jax.Array:
  """`array[:, :, index] = values`."""
  return jax.lax.dynamic_update_slice_in_dim(array, values[..., None], index, axis=2)
