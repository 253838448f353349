"""Computes rotary position embeddings, including the scalings that extend them to longer contexts.

The frequencies are constants of a model: numpy, float32, in the order of operations of Hugging Face
transformers, so that angles at large positions are the same.

References:
  Su et al. 2021, RoFormer, arXiv 2104.09864.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from grpo_jax.core.checks import Array
from grpo_jax.models.config import RopeScaling

# cos and sin of the angle at each position and frequency, each [P, S, Dh / 2].
Rotation = tuple[Array, Array]


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None, length: int = 0
) -> Float[np.ndarray, "half"]:
  """Returns the frequency of each pair of dimensions, `theta^(-2i / Dh)`, in radians per token.

  Args:
    head_dim: head size, Dh, or the part of it that rotates.
    theta: base of the frequencies.
    scaling: scaling applied to them.
    length: longest sequence in tokens, by which "longrope" chooses its divisors.

  Example:
    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.10000000149011612]
    >>> frequencies(4, 100.0, RopeScaling("linear", factor=2.0)).tolist()
    [0.5, 0.05000000074505806]
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  unscaled = np.float32(1.0) / np.float32(theta) ** exponent
  if scaling is None:
    return unscaled
  if scaling.kind == "longrope":
    divisors = scaling.long if length > scaling.original else scaling.short
    powers = np.float32(theta) ** exponent
    return np.float32(1.0) / (np.array(divisors, np.float32) * powers)
  scaled = unscaled / np.float32(scaling.factor)
  if scaling.kind == "linear":
    return scaled
  if scaling.kind == "llama3":
    turns = np.float32(scaling.original) * unscaled / np.float32(2 * math.pi)
    share = (turns - scaling.low) / (scaling.high - scaling.low)
  else:
    # YaRN interpolates linearly in the index of the frequency, not in its number of turns.
    limits = [
      head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
      for turns in (scaling.high, scaling.low)
    ]
    if scaling.rounded:
      limits = [math.floor(limits[0]), math.ceil(limits[1])]
    first, last = max(limits[0], 0), min(limits[1], head_dim - 1)
    index = np.arange(head_dim // 2, dtype=np.float32)
    share = 1 - (index - first) / max(last - first, 0.001)
  share = np.clip(share, 0, 1).astype(np.float32)  # share of the unscaled frequency
  return scaled * (1 - share) + unscaled * share


def rotation(
  positions: Int[Array, "P S"], frequencies: Float[np.ndarray, "half"], amplitude: float = 1.0
) -> Rotation:
  """Returns cos and sin of `position * frequency`, times `amplitude`, in float32.

  Example:
    >>> cos, sin = rotation(jnp.array([[0, 1]]), np.array([1.0, 0.1], np.float32))
    >>> cos.shape, float(cos[0, 0, 0]), float(sin[0, 0, 0])
    ((1, 2, 2), 1.0, 0.0)
  """
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def query_factor(
  positions: Int[Array, "P S"], growth: float, original: int
) -> Float[Array, "P S 1 1"]:
  """Returns the factor on the queries at each position, `1 + growth ln(1 + floor(p / original))`.

  Example:
    >>> query_factor(jnp.array([[3, 4]]), growth=2 / np.log(2), original=4).ravel().tolist()
    [1.0, 3.0]
  """
  return (1 + growth * jnp.log1p(jnp.floor(positions / original)))[..., None, None]


def rotate(
  x: Float[Array, "P S h d"], rotation: Rotation, interleaved: bool = False
) -> Float[Array, "P S h d"]:
  """Rotates pairs of dimensions (i, i + r/2) of each head, the layout of most Hugging Face files.

  The rotation has r/2 angles a position. Dimensions from r on stay as they are.

  Args:
    interleaved: the pairs are (2 i, 2 i + 1) instead.

  Returns:
    `x` rotated, computed in the dtype of `rotation` and returned in the dtype of `x`.

  Example:
    >>> quarter = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))  # cos and sin of 90 degrees
    >>> rotate(jnp.array([[[[3.0, 4.0]]]]), quarter).tolist()
    [[[[-4.0, 3.0]]]]
    >>> rotate(jnp.array([[[[3.0, 4.0, 5.0]]]]), quarter).tolist()
    [[[[-4.0, 3.0, 5.0]]]]
  """
  cos, sin = (part[..., None, :] for part in rotation)
  size = 2 * cos.shape[-1]
  if size < x.shape[-1]:
    rotated = rotate(x[..., :size], rotation, interleaved)
    return jnp.concatenate([rotated, x[..., size:]], axis=-1)
  wide = x.astype(cos.dtype)
  if interleaved:
    first, second = wide[..., ::2], wide[..., 1::2]
  else:
    first, second = jnp.split(wide, 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  if interleaved:
    rotated = jnp.stack(parts, axis=-1).reshape(wide.shape)
  else:
    rotated = jnp.concatenate(parts, axis=-1)
  return rotated.astype(x.dtype)
