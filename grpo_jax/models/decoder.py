"""A decoder-only transformer in which a prompt is computed once for its whole group.

One decoder for Llama, Qwen 2 and 3, Mistral and Gemma 2 and 3: what differs between them is a field
of ModelConfig. Parameters are a plain dict; the layers are stacked on a leading axis L and scanned.
A model whose layers were unstacked into a tuple (`unstack`) runs them as straight-line code, which
the CPU backend decodes with about twice as fast. The layout of the tree decides; there is no flag.

Axes: P prompts, G completions per prompt, N prompt tokens, T completion tokens, D width,
H query heads, K key-value heads, Dh head width, F MLP width, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array, lookup
from grpo_jax.models.attention import (
  cached_attention,
  near,
  prompt_positions,
  tiled_attention,
  window_of,
)
from grpo_jax.models.block import Block, rms_norm
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.rope import frequencies, rotation

Params = dict[str, Any]
LANES = 16  # float32 numbers in the widest vector of a CPU
# What the backward pass finds of a layer, the rest it computes again: everything; products with
# weights (norms, activations and attention are cheap); its input. None = no recomputation.
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "layers": jax.checkpoint_policies.nothing_saveable,
}


def unstack(params: Params) -> Params:
  """The same parameters with `layers` as a tuple of L trees: the layout for decoding."""
  layers = params["layers"]
  count = jax.tree.leaves(layers)[0].shape[0]
  return params | {"layers": tuple(jax.tree.map(lambda a: a[i], layers) for i in range(count))}  # noqa: B023


def _over_layers(body: Callable, carry: Any, layers: Any, local: Any, per_layer: Any) -> tuple:
  """`lax.scan` over stacked layers; straight-line code over a tuple of them.

  `body(carry, (layer, one of local, one of per_layer, number)) -> (carry, kept)`.
  """
  if not isinstance(layers, tuple):
    numbers = jnp.arange(jax.tree.leaves(layers)[0].shape[0])
    return jax.lax.scan(body, carry, (layers, local, per_layer, numbers))
  kept = []
  for i, layer in enumerate(layers):
    one = (each if each is None else each[i] for each in (local, per_layer))
    carry, keep = body(carry, (layer, *one, i))
    kept.append(keep)
  return carry, tuple(kept)


def _write_layer(cache: tuple, layer: int, index: Array, new: tuple) -> tuple[tuple, tuple]:
  """The cache with token `index` of one layer in it, and what that layer holds.

  Keys lie as [R, K, Dh, T], which is what the CPU backend's product for scores reads in order.
  """
  keys, values = cache[layer]
  own = (
    jax.lax.dynamic_update_slice_in_dim(keys, new[0][..., None], index, axis=3),
    jax.lax.dynamic_update_slice_in_dim(values, new[1][..., None, :], index, axis=2),
  )
  return (*cache[:layer], own, *cache[layer + 1 :]), own


def _write_stacked(cache: tuple, layer: Array, index: Array, new: tuple) -> tuple[tuple, tuple]:
  """`_write_layer` where all layers are one array, which is changed in place, not copied.

  Keys lie as [L, R, K, T, Dh]: what is written for a token lies together.
  """
  place = (layer, 0, 0, index, 0)
  cache = tuple(
    jax.lax.dynamic_update_slice(old, x[None, ..., None, :], place) for old, x in zip(cache, new)
  )
  keys, values = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
  return cache, (keys.swapaxes(-1, -2), values)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The functions of one model; parameters are always an argument.

  Attributes:
    config: its shape.
    dtype: dtype of activations; parameters keep their own and are cast where they are used.
    remat: what the backward pass recomputes instead of keeping it, a key of `REMAT`.
    lora_scale: what the product of a low-rank pair is multiplied by, alpha / rank.
    place: `(kind, array) -> array`, told how it lies: the residual stream between layers
      ("hidden"), and the embedding or head where it is used ("table"). See `sharding.placer`.
    vocab_shards: blocks of the vocabulary that devices hold the head in, `sharding.vocab_shards`.
    prompt_shards: blocks of the prompts that devices hold, `mesh.prompt_shards`.
    attention: of whole rows, as `attention.tiled_attention` says it; `build.attention_of` chooses it.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = "none"
  lora_scale: float = 1.0
  place: Callable[[str, Array], Array] = lambda kind, array: array
  vocab_shards: int = 1
  prompt_shards: int = 1
  attention: Callable[..., Array] = tiled_attention

  def init(self, key: Array) -> Params:
    """Random float32 parameters."""
    c = self.config
    block_key, embed_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, c.width))
    still = (jnp.zeros((1, 1, c.head_dim // 2)),) * 2

    def init_layer(key):
      return Block(c).init(key, x, still, lambda q, k, v: (q, None))["params"]

    params = {
      "embed": jax.random.normal(embed_key, (c.vocab_size, c.width)) * c.width**-0.5,
      "layers": jax.vmap(init_layer)(jax.random.split(block_key, c.layers)),
      "final_norm": jnp.full(c.width, 1 - c.norm_offset, jnp.float32),
    }
    if c.labels:
      params["score"] = jax.random.normal(head_key, (c.labels, c.width)) * c.width**-0.5
    elif not c.tied:
      params["head"] = jax.random.normal(head_key, (c.vocab_size, c.width)) * c.width**-0.5
    return params

  def head(self, params: Params) -> Float[Array, "D V"]:
    """The output projection: logits are `hidden @ head`, capped by `config.softcap`."""
    return self.place("table", params["embed" if self.config.tied else "head"]).T

  def _layers(
    self,
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Callable,
    per_layer: Any = None,
    cache: Any = None,
    policy: Callable | None = None,
  ) -> tuple[Array, Any, Any]:
    """Final hidden states [P, S, D] of tokens [P, S], what attention keeps, and the new cache.

    `attend(q, k, v, local, one of per_layer, cache, layer) -> mixed, (cache, kept)`: the cache
    goes from layer to layer. `local` says whether the layer has a window; None where none has.
    `policy` says what a backward pass finds of a layer.
    """
    c = self.config
    scaling = c.rope_scaling
    turn = frequencies(c.head_dim, c.rope_theta, scaling)
    by = rotation(positions, turn, scaling.amplitude if scaling else 1.0)
    local = np.array(c.local_layers) if c.local_layers else None
    if local is not None and c.local_rope_theta is not None:
      local_by = rotation(positions, frequencies(c.head_dim, c.local_rope_theta))
    else:
      local_by = by

    def body(carry, inputs):
      (x, cache), (layer, is_local, extra, number) = carry, inputs
      x = self.place("hidden", x)
      turned = by
      if is_local is not None:
        turned = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local_by, by)
      block = Block(c, self.lora_scale)
      x, (cache, keep) = block.apply(
        {"params": layer}, x, turned, lambda *qkv: attend(*qkv, is_local, extra, cache, number)
      )
      return (self.place("hidden", x), cache), keep

    if policy is not None:
      body = jax.checkpoint(body, policy=policy)
    table = self.place("table", params["embed"])
    x = table[tokens].astype(self.dtype) * jnp.asarray(c.embed_scale, self.dtype)
    (x, cache), kept = _over_layers(body, (x, cache), params["layers"], local, per_layer)
    return rms_norm(x, params["final_norm"], c.norm_eps, c.norm_offset), kept, cache

  @property
  def _scores(self) -> dict[str, Any]:
    """What the config says about scores."""
    c = self.config
    scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale
    return {"scale": scale, "softcap": c.attn_softcap}

  def prefill(
    self, params: Params, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]
  ) -> tuple[Float[Array, "P D"], Any]:
    """Hidden state of each prompt's last token (prompts are left-padded), and its keys/values.

    These are 2 x [P, K, N, Dh] per layer: for each head, what `decode` reads lies together.
    """

    def attend(q, k, v, local, *_):
      kept = (k.swapaxes(1, 2), v.swapaxes(1, 2))
      mixed = self.attention(q, k, v, mask, local, window=self.config.window, **self._scores)
      return mixed, (None, kept)

    hidden, prefix, _ = self._layers(params, tokens, prompt_positions(mask), attend)
    return hidden[:, -1], prefix

  def empty_cache(self, params: Params, prompts: int, group: int, length: int) -> Any:
    """Room for the keys and values of `length` completion tokens of R = prompts · group rows.

    [R, K, Dh, T] and [R, K, T, Dh] for each layer where the layers are a tuple, T rounded up to
    what vectors hold; else 2 x [L, R, K, T, Dh]. The rows are one axis, since the CPU backend
    copies a cache whose axes it merges or splits in the loop that changes it.
    """
    c = self.config
    rows = (prompts * group, c.kv_heads)
    if isinstance(params["layers"], tuple):
      length = -(-length // LANES) * LANES
      shapes = (*rows, c.head_dim, length), (*rows, length, c.head_dim)
      empty = tuple(jnp.zeros(shape, self.dtype) for shape in shapes)
      return (empty,) * c.layers
    return (jnp.zeros((c.layers, *rows, length, c.head_dim), self.dtype),) * 2

  def decode(
    self,
    params: Params,
    tokens: Int[Array, "P G"],
    index: Int[Array, ""],
    prefix: Any,
    prompt_mask: Bool[Array, "P N"],
    cache: Any,
  ) -> tuple[Float[Array, "P G D"], Any]:
    """Hidden states after completion token number `index` of every sequence, and the new cache."""
    position = prompt_mask.sum(-1)[:, None] + index
    in_prompt = prompt_positions(prompt_mask)

    write = _write_layer if isinstance(params["layers"], tuple) else _write_stacked

    def attend(q, k, v, local, shared, cache, number):
      window = window_of(local, self.config.window)
      new = tuple(x.reshape(-1, *x.shape[2:]) for x in (k, v))
      cache, (keys, values) = write(cache, number, index, new)
      slots = jnp.arange(values.shape[2])
      written = near(slots <= index, index[None], slots, window)
      seen = near(prompt_mask[:, None], position, in_prompt, window)
      mixed = cached_attention(q, (keys, values), written, shared, seen, **self._scores)
      return mixed, (cache, None)

    positions = jnp.broadcast_to(position, tokens.shape)
    hidden, _, cache = self._layers(params, tokens, positions, attend, prefix, cache)
    return hidden, cache

  def score(
    self,
    params: Params,
    prompts: Int[Array, "P N"],
    prompt_mask: Bool[Array, "P N"],
    completions: Int[Array, "P G T"],
  ) -> Float[Array, "P G T D"]:
    """Hidden states that predict each completion token: `hidden[p, g, t]` predicts token t.

    One row per prompt, `N + G (T - 1)` tokens long: the prompt stands once in front of its
    completions, and gradients of all of them flow into the one computation of the prompt. The
    first token of every completion is predicted by the prompt's last hidden state, the last
    token predicts nothing and is not an input.
    """
    policy = lookup("remat", REMAT, self.remat)
    count, n = prompts.shape
    group, length = completions.shape[1], completions.shape[2] - 1
    index = jnp.arange(length)
    in_prompt = prompt_positions(prompt_mask)
    start = prompt_mask.sum(-1)[:, None]

    options = {"group": group, "window": self.config.window, **self._scores}

    def attend(q, k, v, local, *_):
      return self.attention(q, k, v, prompt_mask, local, **options), (None, None)

    def grouped(x):  # [P, N + G T', ...] -> [P, G, T', ...]
      return x[:, n:].reshape(count, group, length, *x.shape[2:])

    def flat(x):  # [P, G, T', ...] -> [P, G T', ...]
      return x.reshape(count, group * length, *x.shape[3:])

    tokens = jnp.concatenate([prompts, flat(completions[..., :length])], axis=1)
    positions = jnp.concatenate([in_prompt, jnp.tile(start + index, (1, group))], axis=1)
    hidden, _, _ = self._layers(params, tokens, positions, attend, policy=policy)
    first = jnp.broadcast_to(hidden[:, None, n - 1 : n], (count, group, 1, hidden.shape[-1]))
    return jnp.concatenate([first, grouped(hidden)], axis=2)
