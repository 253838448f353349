"""A Llama-architecture decoder in which a prompt is computed once for its whole group.

Parameters are a plain dict; the layers are stacked on a leading axis L and scanned. A model whose
layers were unstacked into a tuple (`unstack`) runs them as straight-line code, which the CPU
backend decodes with about twice as fast. The layout of the tree decides; there is no flag.

Axes: P prompts, G completions per prompt, N prompt tokens, T completion tokens, D width,
H query heads, K key-value heads, R = H / K, Dh head width, F MLP width, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.types import Array

Params = dict[str, Any]
KeysValues = tuple[Array, Array]
# q [P, S, H, Dh], k and v [P, S, K, Dh] -> mixed values [P, S, H, Dh], and whatever to keep.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

MASKED = -1e30  # finite, so that a query without any visible key gives numbers, not NaN


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a decoder. Sizes in elements, `context` in tokens."""

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tied: bool = True
  context: int = 2048


class Block(nn.Module):
  """One layer: attention and a gated MLP, each behind an RMS norm."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, angles: Array, attend: Attend) -> tuple[Array, Any]:
    c = self.config

    def project(h: Array, name: str, size: int) -> Array:
      init = nn.initializers.normal(h.shape[-1] ** -0.5)
      return h @ self.param(name, init, (h.shape[-1], size)).astype(h.dtype)

    def norm(h: Array, name: str) -> Array:
      return rms_norm(h, self.param(name, nn.initializers.ones, (c.width,)), c.norm_eps)

    h = norm(x, "attn_norm")
    q = project(h, "q", c.heads * c.head_dim).reshape(*h.shape[:-1], c.heads, c.head_dim)
    k = project(h, "k", c.kv_heads * c.head_dim).reshape(*h.shape[:-1], c.kv_heads, c.head_dim)
    v = project(h, "v", c.kv_heads * c.head_dim).reshape(*h.shape[:-1], c.kv_heads, c.head_dim)
    mixed, kept = attend(rotate(q, angles), rotate(k, angles), v)
    x = x + project(mixed.reshape(*h.shape[:-1], c.heads * c.head_dim), "o", c.width)
    h = norm(x, "mlp_norm")
    gated = nn.silu(project(h, "gate", c.mlp)) * project(h, "up", c.mlp)
    return x + project(gated, "down", c.width), kept


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float) -> Array:
  """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32, in the dtype of `x`."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return (wide * scale * weight).astype(x.dtype)


def rope_angles(positions: Int[Array, "P S"], head_dim: int, theta: float) -> Array:
  """Rotation angles [P, S, Dh / 2], radians: `position * theta^(-2i / Dh)`, float32."""
  frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return positions[..., None].astype(jnp.float32) * frequency


def rotate(x: Float[Array, "P S h d"], angles: Float[Array, "P S half"]) -> Array:
  """Rotary embedding of the halves of the head axis (the layout of Hugging Face checkpoints)."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def group_attention(
  q: Float[Array, "P G S H d"],
  own: KeysValues,
  own_mask: Bool[Array, "..."],
  prefix: KeysValues | None = None,
  prefix_mask: Bool[Array, "P N"] | None = None,
) -> Float[Array, "P G S H d"]:
  """Attention of each sequence to its own keys [P, G, S', K, d] and to its prompt's [P, N, K, d].

  One softmax over both sources. The prompt's keys are read by all G sequences and never repeated.

  Args:
    own_mask: true where a query sees one of its own keys; broadcastable to [S, S'].
    prefix, prefix_mask: keys and values of the prompt, and which of its tokens are real.
  """
  k, v = own
  prompts, group, length, heads, dim = q.shape
  q = q.reshape(prompts, group, length, k.shape[-2], heads // k.shape[-2], dim) * dim**-0.5
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("pgtkrd,pgskd->pgkrts", q, k, preferred_element_type=wide)
  scores = jnp.where(own_mask, scores, MASKED)
  if prefix is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("pgkrts,pgskd->pgtkrd", weights, v)
  else:
    seen = jnp.einsum("pgtkrd,pnkd->pgkrtn", q, prefix[0], preferred_element_type=wide)
    seen = jnp.where(prefix_mask[:, None, None, None, None, :], seen, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([seen, scores], axis=-1), axis=-1).astype(v.dtype)
    to_prefix, to_own = jnp.split(weights, [seen.shape[-1]], axis=-1)
    mixed = jnp.einsum("pgkrtn,pnkd->pgtkrd", to_prefix, prefix[1])
    mixed += jnp.einsum("pgkrts,pgskd->pgtkrd", to_own, v)
  return mixed.reshape(prompts, group, length, heads, dim)


def _prompt_attention(q, k, v, mask: Bool[Array, "P N"]) -> Array:
  """Causal attention among the real tokens of a prompt."""
  n = q.shape[1]
  visible = jnp.tril(jnp.ones((n, n), bool)) & mask[:, None, :]
  own = k[:, None], v[:, None]
  return group_attention(q[:, None], own, visible[:, None, None, None])[:, 0]


def prompt_positions(mask: Bool[Array, "P N"]) -> Int[Array, "P N"]:
  """Position of each real prompt token, counted from 0 whatever the padding."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def unstack(params: Params) -> Params:
  """The same parameters with `layers` as a tuple of L trees: the layout for decoding."""
  layers = params["layers"]
  count = jax.tree.leaves(layers)[0].shape[0]
  return params | {"layers": tuple(jax.tree.map(lambda a: a[i], layers) for i in range(count))}  # noqa: B023


def _over_layers(body: Callable, x: Array, layers: Any, per_layer: Any) -> tuple:
  """`lax.scan` over stacked layers; straight-line code over a tuple of them."""
  if not isinstance(layers, tuple):
    return jax.lax.scan(body, x, (layers, per_layer))
  kept = []
  for i, layer in enumerate(layers):
    x, keep = body(x, (layer, None if per_layer is None else per_layer[i]))
    kept.append(keep)
  return x, tuple(kept)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The functions of one model; parameters are always an argument.

  Attributes:
    config: its shape.
    dtype: dtype of activations; parameters keep their own and are cast where they are used.
    remat: recompute each layer in the backward pass instead of keeping its activations.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: bool = False

  def init(self, key: Array) -> Params:
    """Random float32 parameters."""
    c = self.config
    block_key, embed_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, c.width))
    angles = jnp.zeros((1, 1, c.head_dim // 2))

    def init_layer(key):
      return Block(c).init(key, x, angles, lambda q, k, v: (q, None))["params"]

    params = {
      "embed": jax.random.normal(embed_key, (c.vocab_size, c.width)) * c.width**-0.5,
      "layers": jax.vmap(init_layer)(jax.random.split(block_key, c.layers)),
      "final_norm": jnp.ones(c.width),
    }
    if not c.tied:
      params["head"] = jax.random.normal(head_key, (c.vocab_size, c.width)) * c.width**-0.5
    return params

  def head(self, params: Params) -> Float[Array, "D V"]:
    """The output projection: logits are `hidden @ head`."""
    return params["embed" if self.config.tied else "head"].T

  def _layers(
    self, params: Params, tokens: Array, positions: Array, attend: Callable, per_layer: Any
  ) -> tuple[Array, Any]:
    """Final hidden states [P, S, D] of tokens [P, S]; `attend(q, k, v, one of per_layer)`."""
    c = self.config
    angles = rope_angles(positions, c.head_dim, c.rope_theta)

    def body(x, inputs):
      layer, extra = inputs
      return Block(c).apply({"params": layer}, x, angles, lambda q, k, v: attend(q, k, v, extra))

    if self.remat:
      body = jax.checkpoint(body)
    x = params["embed"][tokens].astype(self.dtype)
    x, kept = _over_layers(body, x, params["layers"], per_layer)
    return rms_norm(x, params["final_norm"], c.norm_eps), kept

  def prefill(
    self, params: Params, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]
  ) -> tuple[Float[Array, "P D"], Any]:
    """Hidden state of each prompt's last token (prompts are left-padded), and its keys/values."""

    def attend(q, k, v, _):
      return _prompt_attention(q, k, v, mask), (k, v)

    hidden, prefix = self._layers(params, tokens, prompt_positions(mask), attend, None)
    return hidden[:, -1], prefix

  def empty_cache(self, params: Params, prompts: int, group: int, length: int) -> Any:
    """Room for the keys and values of `length` completion tokens [P, G, T, K, Dh] per layer."""
    c = self.config
    shape = (prompts, group, length, c.kv_heads, c.head_dim)
    if isinstance(params["layers"], tuple):
      return tuple((jnp.zeros(shape, self.dtype),) * 2 for _ in range(c.layers))
    return (jnp.zeros((c.layers, *shape), self.dtype),) * 2

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
    positions = jnp.broadcast_to(prompt_mask.sum(-1)[:, None] + index, tokens.shape)

    def attend(q, k, v, extra):
      shared, (k_cache, v_cache) = extra
      k_cache = jax.lax.dynamic_update_slice_in_dim(k_cache, k[:, :, None], index, axis=2)
      v_cache = jax.lax.dynamic_update_slice_in_dim(v_cache, v[:, :, None], index, axis=2)
      written = jnp.arange(k_cache.shape[2]) <= index
      mixed = group_attention(q[:, :, None], (k_cache, v_cache), written, shared, prompt_mask)
      return mixed[:, :, 0], (k_cache, v_cache)

    unrolled = isinstance(params["layers"], tuple)
    per_layer = tuple(zip(prefix, cache)) if unrolled else (prefix, cache)
    return self._layers(params, tokens, positions, attend, per_layer)

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
    count, n = prompts.shape
    group, length = completions.shape[1], completions.shape[2] - 1
    inputs = completions[..., :length].reshape(count, group * length)
    after = prompt_mask.sum(-1)[:, None, None] + jnp.arange(length)
    after = jnp.broadcast_to(after, (count, group, length)).reshape(count, group * length)
    causal = jnp.tril(jnp.ones((length, length), bool))

    def grouped(x):
      return x[:, n:].reshape(count, group, length, *x.shape[2:])

    def attend(q, k, v, _):
      in_prompt = _prompt_attention(q[:, :n], k[:, :n], v[:, :n], prompt_mask)
      own, prefix = (grouped(k), grouped(v)), (k[:, :n], v[:, :n])
      mixed = group_attention(grouped(q), own, causal, prefix, prompt_mask)
      return jnp.concatenate(
        [in_prompt, mixed.reshape(count, group * length, *q.shape[2:])], axis=1
      ), None

    tokens = jnp.concatenate([prompts, inputs], axis=1)
    positions = jnp.concatenate([prompt_positions(prompt_mask), after], axis=1)
    hidden, _ = self._layers(params, tokens, positions, attend, None)
    first = jnp.broadcast_to(hidden[:, None, n - 1 : n], (count, group, 1, hidden.shape[-1]))
    return jnp.concatenate([first, grouped(hidden)], axis=2)
