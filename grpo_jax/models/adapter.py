"""Adapts a model that knows nothing of groups or caches to the `Model` protocol."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.protocol import Cache, Params


@dataclasses.dataclass(frozen=True)
class _Shape:
  vocab_size: int
  softcap: float | None = None


class FunctionModel:
  """Makes a `Model` of a function from tokens to hidden states.

  Each completion is computed in a row of its own, prompt included, and decoding computes the whole
  row again for every token: `G (N + T)` tokens per prompt in the update, where the project's own
  decoder computes `N + G T`, and T times that while sampling. The results are the same.

  Args:
    hidden_states: (params, tokens [B, S], mask [B, S]) -> hidden states [B, S, D]; causal. Rows are
      left-padded: `mask` is False on padding, which must change nothing.
    head: params -> output projection [D, V]; logits are `hidden @ head`.
    vocab_size: V.
    softcap: logits become `softcap * tanh(logits / softcap)`; None leaves them alone.
  """

  # The head and the prompts lie on one device, or as the compiler likes.
  vocab_shards = 1
  prompt_shards = 1

  def __init__(
    self,
    hidden_states: Callable[[Params, Array, Array], Array],
    *,
    head: Callable[[Params], Array],
    vocab_size: int,
    softcap: float | None = None,
  ) -> None:
    self._hidden_states, self._head = hidden_states, head
    self.config = _Shape(vocab_size, softcap)

  def head(self, params: Params) -> Float[Array, "D V"]:
    """Returns the output projection."""
    return self._head(params)

  def score(
    self,
    params: Params,
    prompts: Int[Array, "P N"],
    prompt_mask: Bool[Array, "P N"],
    completions: Int[Array, "P G T"],
  ) -> Float[Array, "P G T D"]:
    """Returns the hidden states that predict each completion token; one row per completion."""
    count, group, length = completions.shape
    n = prompts.shape[1]
    tokens = jnp.concatenate([self._repeat(prompts, group), completions.reshape(-1, length)], 1)
    mask = self._repeat(prompt_mask, group)
    mask = jnp.concatenate([mask, jnp.ones((count * group, length), bool)], 1)
    hidden = self._hidden_states(params, tokens, mask)[:, n - 1 : -1]
    return hidden.reshape(count, group, length, -1)

  def prefill(
    self, params: Params, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]
  ) -> tuple[Float[Array, "P D"], Cache]:
    """Returns the hidden state of each prompt's last token; the cache is the prompt itself."""
    cache = tokens[:, None, :, None]  # the axes of keys: [P, K, N, Dh]
    return self._hidden_states(params, tokens, mask)[:, -1], cache

  def empty_cache(self, params: Params, prompts: int, group: int, length: int) -> Cache:
    """Returns room for the completion tokens so far, as [R, 1, T, 1]."""
    return jnp.zeros((prompts * group, 1, length, 1), jnp.int32)

  def decode(
    self,
    params: Params,
    tokens: Int[Array, "P G"],
    index: Int[Array, ""] | Int[Array, "P G"],
    prefix: Cache,
    prompt_mask: Bool[Array, "P N"],
    cache: Cache,
  ) -> tuple[Float[Array, "P G D"], Cache]:
    """Returns the hidden states after completion token number `index`, and the tokens so far."""
    hidden, cache = self.extend(params, tokens[..., None], index, prefix, prompt_mask, cache)
    return hidden[:, :, 0], cache

  def extend(
    self,
    params: Params,
    tokens: Int[Array, "P G M"],
    index: Int[Array, ""] | Int[Array, "P G"],
    prefix: Cache,
    prompt_mask: Bool[Array, "P N"],
    cache: Cache,
  ) -> tuple[Float[Array, "P G M D"], Cache]:
    """Returns the hidden states after M more tokens, and the tokens so far."""
    count, group, length = tokens.shape
    n = prompt_mask.shape[1]
    slots = jnp.broadcast_to(index, (count, group)).reshape(-1, 1) + jnp.arange(length)
    written = cache[:, 0, :, 0]
    written = written.at[jnp.arange(len(written))[:, None], slots].set(tokens.reshape(-1, length))
    row = jnp.concatenate([self._repeat(prefix[:, 0, :, 0], group), written], 1)
    real = jnp.arange(written.shape[1]) <= slots[:, -1:]
    mask = jnp.concatenate([self._repeat(prompt_mask, group), real], 1)
    hidden = self._hidden_states(params, row, mask)
    hidden = jnp.take_along_axis(hidden, n + slots[..., None], axis=1)
    return hidden.reshape(count, group, length, -1), written[:, None, :, None]

  def _repeat(self, rows: Array, group: int) -> Array:
    """Returns each prompt's row once per completion, [P, S] -> [P G, S]."""
    return jnp.repeat(rows, group, axis=0)
