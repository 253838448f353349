"""Defines one transformer layer (Block), the only flax module of this project.

Fields of ModelConfig say what differs between model families. Axes: P prompts, S tokens, D hidden
size, H query heads, K key-value heads, Dh head size.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from grpo_jax.core.checks import Array
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.experts import Form, Routing, blocked, route
from grpo_jax.models.int8 import Int8Matrix, int8_matmul
from grpo_jax.models.quantized import Quantized, quantized_matmul
from grpo_jax.models.rope import Rotation, rotate

Output = TypeVar("Output")
# Maps q [P, S, H, Dh], k and v [P, S, K, Dh], and the sinks [H] of a model that has them, to
# attention outputs [P, S, H, Dh] and another value.
Attend = Callable[..., tuple[Array, Output]]

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class Block(nn.Module):
  """Computes one layer: attention, and a gated MLP or a mixture of them, each with a residual.

  A projection whose parameters include a low-rank pair `<name>_lora_a` [in, r] and
  `<name>_lora_b` [r, out] adds `lora_scale * (h @ a) @ b`.

  Attributes:
    config: shape and family of the model.
    lora_scale: factor on the product of a low-rank pair, alpha / rank.
    form: how products with the matrices of experts are grouped, see `experts.grouping_of`.

  References:
    Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
  """

  config: ModelConfig
  lora_scale: float = 1.0
  form: Form = blocked

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "P S D"],
    rotation: Rotation,
    attend: Attend[Output],
    chosen: Int[Array, "P S k"] | None = None,
  ) -> tuple[Float[Array, "P S D"], Output, Routing | None]:
    """Applies the layer.

    Args:
      x: hidden states.
      rotation: rotary embedding of the tokens' positions.
      attend: computes attention from rotated queries, rotated keys, values, and sinks if any.
      chosen: experts that were chosen before; None chooses the most probable ones.

    Returns:
      New hidden states, the second value of `attend`, and the routing of the P S tokens; None
      without experts.
    """
    c = self.config
    h = self.norm(x, "attn_norm") if c.pre_norm else x
    q, k, v = (self.heads(h, name) for name in "qkv")
    if c.qk_norm is True:
      q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
    q, k = (rotate(part, rotation, c.interleaved) for part in (q, k))
    sinks = [self.param("sinks", nn.initializers.zeros, (c.heads,))] if c.sinks else []
    mixed, output = attend(q, k, v, *sinks)
    h = self.project(mixed.reshape(*h.shape[:-1], c.heads * c.head_dim), "o", c.width)
    x = self.add(x, h, "attn_post_norm")
    h = self.norm(x, "mlp_norm") if c.pre_norm else x
    h, routing = self.mixture(h, chosen) if c.experts else (self.mlp(h), None)
    return self.add(x, h, "mlp_post_norm"), output, routing

  def mlp(self, h: Float[Array, "P S D"]) -> Float[Array, "P S D"]:
    """Applies the gated MLP."""
    c = self.config
    gated = ACTIVATIONS[c.activation](self.project(h, "gate", c.mlp)) * self.project(h, "up", c.mlp)
    return self.project(gated, "down", c.width)

  def mixture(
    self, h: Float[Array, "P S D"], chosen: Int[Array, "P S k"] | None
  ) -> tuple[Float[Array, "P S D"], Routing]:
    """Applies the MLPs of each token's experts."""
    c, tokens = self.config, h.reshape(-1, h.shape[-1])
    if chosen is not None:
      chosen = chosen.reshape(len(tokens), -1)
    logits = self.project(tokens, "router", c.experts)
    routing = route(logits, c.experts_per_token, c.router_normalized, chosen)
    group = self.form(routing, c.experts)

    def project(rows: Array, name: str, size: int) -> Array:
      shape = (c.experts, rows.shape[-1], size)
      init = nn.initializers.normal(rows.shape[-1] ** -0.5)
      out = group.product(rows, self.param(name, init, shape))
      if name in c.biases:
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (c.experts, size))
        out = out + group.biases(bias).astype(out.dtype)
      return out

    rows = group.spread(tokens)
    gate, up = (project(rows, f"experts_{name}", c.mlp) for name in ("gate", "up"))
    rows = project(self.gated(gate, up), "experts_down", c.width)
    return group.combine(rows).reshape(h.shape), routing

  def gated(self, gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Combines the two projections of an expert."""
    c = self.config
    if not c.swiglu_alpha:
      return ACTIVATIONS[c.activation](gate) * up
    gate, up = jnp.minimum(gate, c.swiglu_limit), jnp.clip(up, -c.swiglu_limit, c.swiglu_limit)
    return gate * nn.sigmoid(c.swiglu_alpha * gate) * (up + 1)

  def heads(self, h: Float[Array, "P S D"], name: str) -> Float[Array, "P S h d"]:
    """Returns the queries, keys or values before rotation, and before a norm of each head."""
    c = self.config
    count = c.heads if name == "q" else c.kv_heads
    out = self.project(h, name, count * c.head_dim)
    if c.qk_norm == "all" and name != "v":
      out = self.norm(out, f"{name}_norm")
    if c.clip_qkv is not None:
      out = jnp.clip(out, -c.clip_qkv, c.clip_qkv)
    return out.reshape(*h.shape[:-1], count, c.head_dim)

  def add(
    self, x: Float[Array, "P S D"], h: Float[Array, "P S D"], norm: str
  ) -> Float[Array, "P S D"]:
    """Adds the output of attention or MLP to the residual stream."""
    c = self.config
    if c.post_norm:
      h = self.norm(h, norm)
    return x + (h if c.residual_scale == 1 else h * c.residual_scale)

  def project(self, h: Float[Array, "... I"], name: str, size: int) -> Float[Array, "... O"]:
    """Multiplies by the weight `name`, and adds its bias and its low-rank pair if it has them."""
    held = self.get_variable("params", name) if self.has_variable("params", name) else None
    if isinstance(held, Quantized):
      out = quantized_matmul(h, held)
    elif isinstance(held, Int8Matrix):
      out = int8_matmul(h, held)
    else:
      init = nn.initializers.normal(h.shape[-1] ** -0.5)
      out = matmul(h, self.param(name, init, (h.shape[-1], size)).astype(h.dtype))
    if name in self.config.biases:
      out = out + self.param(f"{name}_bias", nn.initializers.zeros, (size,)).astype(h.dtype)
    if self.has_variable("params", f"{name}_lora_a"):
      a, b = (self.get_variable("params", f"{name}_lora_{part}").astype(h.dtype) for part in "ab")
      out = out + (h @ a) @ b * self.lora_scale
    return out

  def norm(self, h: Float[Array, "... I"], name: str) -> Float[Array, "... I"]:
    """Applies the RMS norm whose weight is `name`."""
    c = self.config
    weight = self.param(name, nn.initializers.constant(1 - c.norm_offset), (h.shape[-1],))
    return rms_norm(h, weight, c.norm_eps, c.norm_offset)


@jax.custom_vjp
def matmul(h: Float[Array, "... I"], weight: Float[Array, "I O"]) -> Float[Array, "... O"]:
  """Computes `h @ weight`; its backward pass transposes the narrower factor.

  Forward-mode derivatives are not defined.

  Example:
    >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0], [2.0]])).tolist()
    [[3.0]]
  """
  return h @ weight


def _matmul_forward(h: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
  return h @ weight, (h, weight)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  h, weight = saved
  rows = tuple(range(h.ndim - 1))

  def over_rows(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))

  # XLA:CPU: contracting over all rows copies a transpose of the first factor and recomputes what
  # produced it. `h.T @ dy` and `(dy.T @ h).T` are equal, so put the narrower factor first: for the
  # activations of an MLP the copy costs as much as the product.
  narrow_in = weight.shape[0] <= weight.shape[1]
  return dy @ weight.T, over_rows(h, dy) if narrow_in else over_rows(dy, h).T


matmul.defvjp(_matmul_forward, _matmul_backward)


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float, offset: float = 0.0
) -> Float[Array, "... D"]:
  """Returns `x / sqrt(mean(x^2) + eps) * (offset + weight)` in the dtype of `x`.

  Computed in float32 or wider.

  References:
    Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.

  Example:
    >>> rms_norm(jnp.array([1.0, 7.0]), jnp.ones(2), eps=0.0).round(1)
    Array([0.2, 1.4], dtype=float32)
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return (wide * scale * (offset + weight.astype(wide.dtype))).astype(x.dtype)
