"""Implements a decoder-only transformer in which a prompt is computed once for its whole group.

One decoder serves all families of `io.families`: fields of ModelConfig say what differs between
them. Parameters are a plain dict whose layers are stacked on a leading axis L and
scanned. If the layers were unstacked into a tuple (`unstack`), they run as straight-line code
instead. The layout of the tree decides; there is no flag.

Axes: P prompts, G completions per prompt, N prompt tokens, T completion tokens, D hidden size,
H query heads, K key-value heads, Dh head size, F hidden size of the MLP, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, DTypeLike, Float, Int, Integer

from grpo_jax.core.checks import Array, lookup
from grpo_jax.models.attention import (
  cached_attention,
  join_rows,
  layer_window,
  prompt_positions,
  split_rows,
  tiled_attention,
  within_window,
)
from grpo_jax.models.block import Block, rms_norm
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.experts import Form, Routing, blocked
from grpo_jax.models.protocol import Cache, Params
from grpo_jax.models.quantized import is_quantized
from grpo_jax.models.rope import frequencies, query_factor, rotation

LANES = 16  # float32 numbers in the widest vector register of a CPU
# What the forward pass of a layer saves for its backward pass, which recomputes the rest:
# everything (None, no recomputation); the products with weights, since norms, activations and
# attention are cheap to recompute; or only the layer's input.
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "layers": jax.checkpoint_policies.nothing_saveable,
}


def unstack(params: Params) -> Params:
  """Returns the same parameters with `layers` as a tuple of L trees, the layout for decoding.

  On CPU, XLA decodes faster from straight-line code than from a scan over stacked layers.

  Example:
    >>> params = {"embed": jnp.zeros((5, 4)), "layers": {"q": jnp.zeros((3, 4, 4))}}
    >>> [layer["q"].shape for layer in unstack(params)["layers"]]
    [(4, 4), (4, 4), (4, 4)]
  """
  layers = params["layers"]
  count = jax.tree.leaves(layers)[0].shape[0]
  return params | {"layers": tuple(jax.tree.map(lambda a: a[i], layers) for i in range(count))}  # noqa: B023


def _if_any(sinks: Array | None) -> dict[str, Array]:
  """Returns the keyword arguments for sinks; kernels do not take them."""
  return {} if sinks is None else {"sinks": sinks}


def _run_layers(body: Callable, carry: Any, layers: Params, flags: Any, per_layer: Any) -> tuple:
  """Runs `lax.scan` over stacked layers, or straight-line code over a tuple of them.

  Args:
    body: maps `carry` and (layer, its entries of `flags`, its entry of `per_layer`, layer index) to
      (new carry, output of the layer).
    flags: a tree of arrays with a leading axis of layers.

  Returns:
    The last carry, and the outputs of the layers: stacked, or a tuple.
  """
  if not isinstance(layers, tuple):
    indices = jnp.arange(jax.tree.leaves(layers)[0].shape[0])
    return jax.lax.scan(body, carry, (layers, flags, per_layer, indices))
  outputs = []
  for i, layer in enumerate(layers):
    here = jax.tree.map(lambda flag: flag[i], flags)  # noqa: B023
    entry = per_layer if per_layer is None else per_layer[i]
    carry, output = body(carry, (layer, here, entry, i))
    outputs.append(output)
  return carry, tuple(outputs)


def _write_layer(cache: tuple, layer: int, index: Array, new: tuple) -> tuple[tuple, tuple]:
  """Writes tokens from slot `index` on into one layer; returns the cache, and this layer's part.

  XLA:CPU: keys are stored as [R, K, Dh, T], the order in which the product for scores reads them.

  Args:
    new: keys and values, [R, M, K, Dh].
  """
  keys, values = cache[layer]
  own = (
    _write_slots(keys, new[0].transpose(0, 2, 3, 1), index, axis=3),
    _write_slots(values, new[1].swapaxes(1, 2), index, axis=2),
  )
  return (*cache[:layer], own, *cache[layer + 1 :]), own


def _write_slots(old: Array, new: Array, index: Array, axis: int) -> Array:
  """Writes [R, ...] from slot `index` on along an axis; an index [R] gives each row its own."""
  write = jax.lax.dynamic_update_slice_in_dim
  if index.ndim == 0:
    return write(old, new, index, axis=axis)
  return jax.vmap(lambda a, x, i: write(a, x, i, axis=axis - 1))(old, new, index)


def _write_stacked(cache: tuple, layer: Array, index: Array, new: tuple) -> tuple[tuple, tuple]:
  """Does the same as `_write_layer` for a cache in which all layers are one array.

  The array is updated in place. Keys are stored as [L, R, K, T, Dh], so that the values written for
  one token are contiguous.
  """
  if index.ndim:  # [R]
    rows, slots = jnp.arange(len(index))[:, None], index[:, None] + jnp.arange(new[0].shape[1])
    cache = tuple(old.at[layer, rows, :, slots].set(x, mode="drop") for old, x in zip(cache, new))
  else:
    start = (layer, 0, 0, index, 0)
    cache = tuple(
      jax.lax.dynamic_update_slice(old, x.swapaxes(1, 2)[None], start) for old, x in zip(cache, new)
    )
  keys, values = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
  return cache, (keys.swapaxes(-1, -2), values)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Implements the `Model` protocol; parameters are always an argument.

  Attributes:
    config: shape and family of the model.
    dtype: dtype of activations. Parameters keep their own and are cast where they are used.
    remat: what the backward pass recomputes, a key of `REMAT`.
    lora_scale: factor on the product of a low-rank pair, alpha / rank.
    place: maps (kind, array) to the array with a sharding constraint. Called with the residual
      stream between layers ("hidden") and with the embedding or head where it is used ("table");
      see `mesh.placer`.
    vocab_shards: number of shards along V in which the devices hold the head; see
      `mesh.vocab_shards`.
    prompt_shards: number of shards along P in which the devices hold a batch; see
      `mesh.prompt_shards`.
    token_shards: number of shards in which the devices hold the tokens of a row while it is scored,
      in the order of `attention.join_rows`; see `mesh.over_context`, which `attention` then needs.
    attention: computes attention over whole rows, with the signature of
      `attention.tiled_attention`; `build.attention_of` chooses it.
    length: longest sequence in tokens, prompt and completion, that the program computes. A
      "longrope" scaling chooses its divisors by it, once for all sequences; 0 chooses those for
      short ones.
    form: how products with the matrices of experts are grouped, see `experts.grouping_of`.
    record_routes: `prefill` and `decode` keep the chosen experts in their caches (`routes_of`), so
      that `score` can use the same.

  Example:
    >>> model = Decoder(ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1,
    ...                             head_dim=2, mlp=6))
    >>> params = model.init(jax.random.key(0))
    >>> prompts, completions = jnp.ones((1, 3), int), jnp.ones((1, 2, 5), int)
    >>> hidden = model.score(params, prompts, prompts > 0, completions)
    >>> (hidden @ model.head(params)).shape  # [P, G, T, V]
    (1, 2, 5, 8)
  """

  config: ModelConfig
  dtype: DTypeLike = jnp.float32
  remat: str = "none"
  lora_scale: float = 1.0
  place: Callable[[str, Array], Array] = lambda kind, array: array
  vocab_shards: int = 1
  prompt_shards: int = 1
  token_shards: int = 1
  attention: Callable[..., Array] = tiled_attention
  length: int = 0
  form: Form = blocked
  record_routes: bool = False

  def init(self, key: Array) -> Params:
    """Returns random float32 parameters, layers stacked."""
    c = self.config
    block_key, embed_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, c.width))
    unrotated = (jnp.zeros((1, 1, (c.rotary or c.head_dim) // 2)),) * 2

    def init_layer(key):
      return Block(c).init(key, x, unrotated, lambda q, *_: (q, None))["params"]

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
    """Returns the output projection: logits are `hidden @ head`, capped by `config.softcap`."""
    return self.place("table", params["embed" if self.config.tied else "head"]).T

  def _layers(
    self,
    params: Params,
    tokens: Int[Array, "P S"],
    positions: Int[Array, "P S"],
    attend: Callable,
    per_layer: Any = None,
    cache: Cache = None,
    policy: Callable | None = None,
    chosen: Int[Array, "L P S k"] | None = None,
    summarize: Callable[[Routing], Any] = lambda routing: routing,
  ) -> tuple[Float[Array, "P S D"], Any, Cache, Any]:
    """Runs all layers and the final norm.

    Args:
      tokens: input tokens.
      positions: position of each token in its own sequence.
      attend: maps (q, k, v, local, entry of per_layer, cache, layer index, sinks) to
        (attention outputs, (cache, output)). `local` says whether the layer is local; it is None
        for a model without local layers, and the sinks are None for one without sinks. The cache
        is passed from layer to layer.
      per_layer: a tree with one entry per layer.
      cache: the cache given to the first layer.
      policy: what a layer saves for its backward pass, a value of `REMAT`.
      chosen: experts of each token that were chosen before; None chooses them here.
      summarize: maps the routing of a layer, with axes [P, S, ...], to what is kept of it.

    Returns:
      Final hidden states, the outputs of `attend` for all layers, the new cache, and what is kept
      of the routing, with an axis of layers in front; None for a model without experts.
    """
    c = self.config
    scaling, rotary = c.rope_scaling, c.rotary or c.head_dim
    amplitude = scaling.amplitude if scaling else 1.0
    by_angle = frequencies(rotary, c.rope_theta, scaling, self.length)
    by = rotation(positions, by_angle, amplitude)
    local, unrotated = (
      np.array(flags) if flags else None for flags in (c.local_layers, c.unrotated_layers)
    )
    if local is not None and c.local_rope_theta is not None:
      local_by = rotation(positions, frequencies(rotary, c.local_rope_theta))
    else:
      local_by = by
    factor = None
    if c.query_growth:
      factor = query_factor(positions, c.query_growth, scaling.original).astype(self.dtype)

    def body(carry, inputs):
      (x, cache), (layer, (is_local, is_unrotated, experts), entry, index) = carry, inputs
      x = self.place("hidden", x)
      layer_by = by
      if is_local is not None:
        layer_by = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local_by, by)
      if is_unrotated is not None:
        cos, sin = layer_by
        layer_by = jnp.where(is_unrotated, 1.0, cos), jnp.where(is_unrotated, 0.0, sin)

      def attend_here(q, k, v, sinks=None):
        q = q if factor is None else q * factor
        return attend(q, k, v, is_local, entry, cache, index, sinks)

      block = Block(c, self.lora_scale, self.form)
      x, (cache, output), routing = block.apply(
        {"params": layer}, x, layer_by, attend_here, experts
      )
      if routing is not None:
        routing = summarize(jax.tree.map(lambda a: a.reshape(*tokens.shape, -1), routing))
      return (self.place("hidden", x), cache), (output, routing)

    if policy is not None:
      body = jax.checkpoint(body, policy=policy)
    table = self.place("table", params["embed"])
    x = table[tokens].astype(self.dtype) * jnp.asarray(c.embed_scale, self.dtype)
    flags = local, unrotated, chosen
    (x, cache), outputs = _run_layers(body, (x, cache), params["layers"], flags, per_layer)
    if isinstance(params["layers"], tuple):
      outputs, routings = zip(*outputs)
      routing = jax.tree.map(lambda *each: jnp.stack(each), *routings)
    else:
      outputs, routing = outputs
    x = rms_norm(x, params["final_norm"], c.norm_eps, c.norm_offset)
    return (x if c.hidden_divisor == 1 else x / c.hidden_divisor), outputs, cache, routing

  @property
  def _score_options(self) -> dict[str, float | None]:
    """Returns the scale and the soft cap of attention scores."""
    c = self.config
    scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale
    return {"scale": scale, "softcap": c.attn_softcap}

  def for_decoding(self, params: Params, platform: str) -> Params:
    """Returns the parameters in the layout that decodes fastest: layers unstacked on CPUs.

    Quantized ones stay stacked: in straight-line code, all wide matrices would exist at once.
    """
    if platform != "cpu" or isinstance(params["layers"], tuple) or is_quantized(params):
      return params
    return unstack(params)

  def prefill(
    self, params: Params, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]
  ) -> tuple[Float[Array, "P D"], Cache]:
    """Returns the hidden state of each prompt's last token, and the keys and values of all tokens.

    The cache is 2 x [P, K, N, Dh] per layer: the values that `decode` reads for a head are
    contiguous.

    Args:
      params: parameters, layers stacked or unstacked.
      tokens: left-padded prompts.
      mask: true on prompt tokens, false on padding.
    """

    def attend(q, k, v, local, entry, cache, layer, sinks):
      prefix = (k.swapaxes(1, 2), v.swapaxes(1, 2))
      options = {"window": self.config.window, **self._score_options, **_if_any(sinks)}
      return self.attention(q, k, v, mask, local, **options), (None, prefix)

    hidden, prefix, _, routing = self._layers(params, tokens, prompt_positions(mask), attend)
    if self.record_routes:
      prefix = (prefix, self._routes(routing)[:, None])
    return hidden[:, -1], prefix

  def routes_of(self, cache: Cache) -> Integer[Array, "R S C"] | None:
    """Returns the experts of each token in a cache, layer by layer, C = L k; None without them.

    Args:
      cache: of prompts, R = P and S = N, or of completions, R = P G and S slots.
    """
    return cache[1][:, 0] if self.record_routes else None

  def _routes(self, routing: Routing) -> Integer[Array, "P S C"]:
    """Returns the chosen experts of all layers in a compact dtype."""
    experts = jnp.moveaxis(routing.experts, 0, 2)  # [L, P, S, k] -> [P, S, L, k]
    return experts.reshape(*experts.shape[:2], -1).astype(route_dtype(self.config.experts))

  def empty_cache(self, params: Params, prompts: int, group: int, length: int) -> Cache:
    """Returns zeros for the keys and values of `length` completion tokens.

    For R = prompts · group rows: [R, K, Dh, T] and [R, K, T, Dh] per layer if the layers are a
    tuple, with T rounded up to the width of a vector register; 2 x [L, R, K, T, Dh] if they are
    stacked.

    Args:
      params: parameters, of which only the layout is read.
      prompts: number of prompts, P.
      group: completions per prompt, G.
      length: completion tokens, T.
    """
    c = self.config
    # XLA:CPU: a cache whose axes are merged or split inside the decode loop is copied at every
    # step, so prompts and completions are one axis.
    rows = (prompts * group, c.kv_heads)
    if isinstance(params["layers"], tuple):
      padded = -(-length // LANES) * LANES
      shapes = (*rows, c.head_dim, padded), (*rows, padded, c.head_dim)
      empty = (tuple(jnp.zeros(shape, self.dtype) for shape in shapes),) * c.layers
    else:
      empty = (jnp.zeros((c.layers, *rows, length, c.head_dim), self.dtype),) * 2
    if not self.record_routes:
      return empty
    size = c.layers * c.experts_per_token
    return empty, jnp.zeros((prompts * group, 1, length, size), route_dtype(c.experts))

  def decode(
    self,
    params: Params,
    tokens: Int[Array, "P G"],
    index: Int[Array, ""] | Int[Array, "P G"],
    prefix: Cache,
    prompt_mask: Bool[Array, "P N"],
    cache: Cache,
  ) -> tuple[Float[Array, "P G D"], Cache]:
    """Returns the hidden states after completion token number `index`, and the new cache.

    Args:
      params: parameters, layers stacked or unstacked.
      tokens: the token of each completion.
      index: number of tokens before it: one for all completions, or [P, G].
      prefix: the prompts' cache, from `prefill`.
      prompt_mask: true on prompt tokens, false on padding.
      cache: the completions' cache, from `empty_cache` or the step before.
    """
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
    """Returns the hidden states after M more tokens of each completion, and the new cache.

    A completion that has fewer new tokens is padded with any. What they leave in the cache is seen
    by nothing: the next tokens are written over it.

    Args:
      params: parameters, layers stacked or unstacked.
      tokens: the new tokens.
      index: number of tokens before them: one for all completions, or [P, G]. The cache has room
        for M tokens behind it.
      prefix, prompt_mask, cache: as in `decode`.
    """
    c = self.config
    count, group, length = tokens.shape
    # Number of each new token in its completion, [M] or [P, G, M], and row by row, [M] or [R, M].
    numbers = index[..., None] + jnp.arange(length)
    by_row = numbers.reshape(-1, length) if index.ndim else numbers
    repeats = c.heads // c.kv_heads
    prefix_positions = prompt_positions(prompt_mask)
    write = _write_layer if isinstance(params["layers"], tuple) else _write_stacked
    positions = prompt_mask.sum(-1)[:, None, None] + numbers
    all_positions = jnp.broadcast_to(positions, tokens.shape).reshape(count, -1)
    positions = all_positions if length > 1 else positions.reshape(count, -1)  # [P, #GM]

    def by_head(x):  # [P, G M, H, Dh] -> [P, G, K M r, Dh], one query head per token
      x = x.reshape(count, group, length, c.kv_heads, repeats, c.head_dim).swapaxes(2, 3)
      return x.reshape(count, group, -1, c.head_dim)

    def by_token(x):
      x = x.reshape(count, group, c.kv_heads, length, repeats, c.head_dim).swapaxes(2, 3)
      return x.reshape(count, group * length, c.heads, c.head_dim)

    def attend(q, k, v, local, shared, cache, layer, sinks):
      window = layer_window(local, c.window)
      new = tuple(x.reshape(-1, length, *x.shape[2:]) for x in (k, v))
      cache, (keys, values) = write(cache, layer, index.reshape(-1) if index.ndim else index, new)
      slots = jnp.arange(values.shape[2])
      visible = within_window(slots <= by_row[..., None], by_row, slots, window)
      if index.ndim:
        visible = visible[:, None]  # [R, 1, M, slots]
      prefix_mask = within_window(prompt_mask[:, None], positions, prefix_positions, window)
      if length > 1:
        visible = jnp.repeat(visible, repeats, axis=-2)
      if prefix_mask.shape[1] > 1:
        prefix_mask = jnp.repeat(prefix_mask, repeats, axis=1)
      if sinks is not None:  # [H] -> [K, M r]
        by_kv_head = sinks.reshape(c.kv_heads, 1, repeats)
        sinks = jnp.broadcast_to(by_kv_head, (c.kv_heads, length, repeats)).reshape(c.kv_heads, -1)
      options = self._score_options | _if_any(sinks)
      mixed = cached_attention(by_head(q), (keys, values), visible, shared, prefix_mask, **options)
      return by_token(mixed), (cache, None)

    flat = tokens.reshape(count, group * length)
    routes = None
    if self.record_routes:
      (cache, routes), (prefix, _) = cache, prefix
    hidden, _, cache, routing = self._layers(params, flat, all_positions, attend, prefix, cache)
    if self.record_routes:
      new = self._routes(routing).reshape(count * group, 1, length, -1)
      cache = (cache, jax.lax.dynamic_update_slice_in_dim(routes, new, index, axis=2))
    return hidden.reshape(count, group, length, -1), cache

  def score(
    self,
    params: Params,
    prompts: Int[Array, "P N"],
    prompt_mask: Bool[Array, "P N"],
    completions: Int[Array, "P G T"],
    routes: tuple[Integer[Array, "P N C"], Integer[Array, "P G T C"]] | None = None,
  ) -> Float[Array, "P G T D"]:
    """Returns the hidden states that predict completion tokens: `hidden[p, g, t]` predicts token t.

    Each prompt is one row of `N + G (T - 1)` tokens: the prompt once, followed by its completions.
    The gradients of all completions flow into the one computation of the prompt. The prompt's last
    hidden state predicts the first token of every completion. The last token of a completion
    predicts nothing and is not an input.

    With several `token_shards`, N and T are padded to multiples of them, and the last token of a
    prompt is computed with each completion instead of once: hidden states then lie as the
    completions do.

    Args:
      params: parameters, layers stacked or unstacked.
      prompts: left-padded prompts.
      prompt_mask: true on prompt tokens, false on padding.
      completions: right-padded completions.
      routes: experts of prompts and completions that were chosen before (`routes_of`), C = L k;
        None chooses the most probable ones.

    Raises:
      ValueError: `remat` is not a key of `REMAT`, or the routes are of another model.
    """
    return self.score_with_routing(params, prompts, prompt_mask, completions, routes)[0]

  def score_with_routing(
    self,
    params: Params,
    prompts: Int[Array, "P N"],
    prompt_mask: Bool[Array, "P N"],
    completions: Int[Array, "P G T"],
    routes: tuple[Integer[Array, "P N C"], Integer[Array, "P G T C"]] | None = None,
    summarize: Callable[[Routing], Any] = lambda routing: routing,
  ) -> tuple[Float[Array, "P G T D"], Any]:
    """Returns the hidden states of `score`, and the routing of all layers.

    Args:
      params, prompts, prompt_mask, completions, routes: as in `score`.
      summarize: maps the routing of a layer, [P, N + G (T - 1), ...], to what is kept of it; by
        default all of it. Layers are stacked on the first axis.
    """
    policy = lookup("remat", REMAT, self.remat)
    full, (group, length) = prompts.shape[1], completions.shape[1:]
    shards, inputs = self.token_shards, completions[..., :-1]
    if shards > 1:
      prompts, inputs = _with_last(prompts, completions, shards)
      prompt_mask = _pad(prompt_mask[:, :-1], shards, axis=1, front=True)
      if routes is not None:
        routes = _with_last(*routes, shards)
    elif routes is not None:
      routes = routes[0], routes[1][:, :, :-1]
    count, n = prompts.shape
    in_prompt = prompt_positions(prompt_mask)
    in_completion = prompt_mask.sum(-1)[:, None, None] + jnp.arange(inputs.shape[2])
    options = {"group": group, "window": self.config.window, **self._score_options}

    def attend(q, k, v, local, entry, cache, layer, sinks):
      mixed = self.attention(q, k, v, prompt_mask, local, **options, **_if_any(sinks))
      return mixed, (None, None)

    tokens = join_rows(prompts, inputs, shards)
    in_completion = jnp.broadcast_to(in_completion, inputs.shape)
    positions = join_rows(in_prompt, in_completion, shards)
    chosen = None if routes is None else self._chosen(join_rows(*routes, shards))

    def whole(layer):  # [P, S, ...] -> [P, N + G (T - 1), ...]
      if shards == 1:
        return layer
      of_prompts, of_completions = split_rows(layer, n, group, shards)
      last = of_completions[:, 0, :1]
      of_prompts = jnp.concatenate([of_prompts[:, n + 1 - full :], last], axis=1)
      return join_rows(of_prompts, of_completions[:, :, 1:length])

    hidden, _, _, routing = self._layers(
      params, tokens, positions, attend, policy=policy, chosen=chosen,
      summarize=lambda routing: summarize(jax.tree.map(whole, routing)),
    )  # fmt: skip
    _, own = split_rows(hidden, n, group, shards)
    if shards > 1:
      return own[:, :, :length], routing
    first = jnp.broadcast_to(hidden[:, None, n - 1 : n], (count, group, 1, hidden.shape[-1]))
    return jnp.concatenate([first, own], axis=2), routing

  def _chosen(self, routes: Integer[Array, "P S C"]) -> Int[Array, "L P S k"]:
    """Returns the routes of whole rows, layer by layer."""
    c = self.config
    if routes.shape[-1] != c.layers * c.experts_per_token:
      raise ValueError(
        f"the routes have {routes.shape[-1]} experts a token, and the model chooses "
        f"{c.experts_per_token} in each of {c.layers} layers: they are of another model"
      )
    routes = routes.astype(jnp.int32).reshape(*routes.shape[:2], c.layers, -1)
    return jnp.moveaxis(routes, 2, 0)


def _with_last(prompts: Array, completions: Array, shards: int) -> tuple[Array, Array]:
  """Moves the last token of each prompt before its completions, which lose theirs; pads both.

  Args:
    prompts, completions: [P, N, ...] and [P, G, T, ...].
    shards: the padded lengths are multiples of it.
  """
  last = jnp.broadcast_to(prompts[:, None, -1:], completions[:, :, :1].shape)
  completions = jnp.concatenate([last, completions[:, :, :-1]], axis=2)
  return (
    _pad(prompts[:, :-1], shards, axis=1, front=True),
    _pad(completions, shards, axis=2),
  )


def _pad(x: Array, multiple: int, *, axis: int, front: bool = False) -> Array:
  """Pads an axis with zeros at its end, or at its front, to a multiple, at least one of it."""
  missing = multiple * max(-(-x.shape[axis] // multiple), 1) - x.shape[axis]
  widths = [(0, 0)] * x.ndim
  widths[axis] = (missing, 0) if front else (0, missing)
  return jnp.pad(x, widths)


def route_dtype(experts: int) -> DTypeLike:
  """Returns the smallest dtype that numbers the experts.

  Example:
    >>> route_dtype(128).__name__, route_dtype(512).__name__
    ('uint8', 'uint16')
  """
  return jnp.uint8 if experts <= 256 else jnp.uint16
