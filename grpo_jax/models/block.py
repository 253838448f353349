"""Defines one transformer layer (Block), the only flax module of this project.

What differs between the families is a field of ModelConfig. Axes: P prompts, S tokens, D width,
H query heads, K key-value heads, Dh head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.core.checks import Array
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.rope import Rotation, rotate

# q [P, S, H, Dh], k and v [P, S, K, Dh] -> mixed values [P, S, H, Dh], and whatever to keep.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class Block(nn.Module):
  """One layer: attention and a gated MLP, each behind an RMS norm, each added to its input.

  A projection whose parameters come with a low-rank pair `<name>_lora_a` [in, r] and
  `<name>_lora_b` [r, out] adds `lora_scale * (h @ a) @ b` (Hu et al. 2021, arXiv 2106.09685).
  """

  config: ModelConfig
  lora_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Array, by: Rotation, attend: Attend) -> tuple[Array, Any]:
    c = self.config
    h = self.norm(x, "attn_norm")
    q, k, v = (
      self.project(h, name, heads * c.head_dim).reshape(*h.shape[:-1], heads, c.head_dim)
      for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
    )
    if c.qk_norm:
      q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
    mixed, kept = attend(rotate(q, by), rotate(k, by), v)
    h = self.project(mixed.reshape(*h.shape[:-1], c.heads * c.head_dim), "o", c.width)
    x = x + (self.norm(h, "attn_post_norm") if c.post_norm else h)
    h = self.norm(x, "mlp_norm")
    gated = ACTIVATIONS[c.activation](self.project(h, "gate", c.mlp)) * self.project(h, "up", c.mlp)
    h = self.project(gated, "down", c.width)
    return x + (self.norm(h, "mlp_post_norm") if c.post_norm else h), kept

  def project(self, h: Array, name: str, size: int) -> Array:
    init = nn.initializers.normal(h.shape[-1] ** -0.5)
    out = product(h, self.param(name, init, (h.shape[-1], size)).astype(h.dtype))
    if name in self.config.biases:
      out = out + self.param(f"{name}_bias", nn.initializers.zeros, (size,)).astype(h.dtype)
    if self.has_variable("params", f"{name}_lora_a"):
      a, b = (self.get_variable("params", f"{name}_lora_{part}").astype(h.dtype) for part in "ab")
      out = out + (h @ a) @ b * self.lora_scale
    return out

  def norm(self, h: Array, name: str) -> Array:
    c = self.config
    weight = self.param(name, nn.initializers.constant(1 - c.norm_offset), (h.shape[-1],))
    return rms_norm(h, weight, c.norm_eps, c.norm_offset)


@jax.custom_vjp
def product(h: Float[Array, "... I"], weight: Float[Array, "I O"]) -> Float[Array, "... O"]:
  """`h @ weight`, whose backward pass transposes what is narrow. No forward-mode derivatives.

  Of the two ways to contract over all rows, `h.T @ dy` and `(dy.T @ h).T`, XLA's CPU backend
  copies a transpose of the first factor, computing what made it once more. That factor should be
  the narrower one: for an MLP's activations the copy costs as much as the product.
  """
  return h @ weight


def _product_forward(h: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
  return h @ weight, (h, weight)


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  h, weight = saved
  rows = tuple(range(h.ndim - 1))

  def over_rows(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))

  narrow_in = weight.shape[0] <= weight.shape[1]
  return dy @ weight.T, over_rows(h, dy) if narrow_in else over_rows(dy, h).T


product.defvjp(_product_forward, _product_backward)


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float, offset: float = 0.0
) -> Float[Array, "... D"]:
  """`x / sqrt(mean(x^2) + eps) * (offset + weight)`, computed in float32, in the dtype of `x`."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return (wide * scale * (offset + weight.astype(wide.dtype))).astype(x.dtype)
