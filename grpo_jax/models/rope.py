"""Rotary position embedding, with the ways that checkpoints stretch it to longer contexts.

Su et al. 2021, arXiv 2104.09864. Frequencies are constants of a model: numpy, float32, in the order
of operations of Hugging Face transformers, so that long contexts turn by the same angles.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from grpo_jax.core.checks import Array
from grpo_jax.models.config import RopeScaling

# cos and sin of the angle of every position and frequency, each [P, S, Dh / 2].
Rotation = tuple[Array, Array]


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "half"]:
  """Radians per token of each pair of dimensions: `theta^(-2i / Dh)`, scaled.

  >>> frequencies(4, 100.0).tolist()
  [1.0, 0.10000000149011612]
  >>> frequencies(4, 100.0, RopeScaling("linear", factor=2.0)).tolist()
  [0.5, 0.05000000074505806]
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  plain = np.float32(1.0) / np.float32(theta) ** exponent
  if scaling is None:
    return plain
  slow = plain / np.float32(scaling.factor)
  if scaling.kind == "linear":
    return slow
  if scaling.kind == "llama3":
    turns = np.float32(scaling.original) * plain / np.float32(2 * math.pi)
    kept = (turns - scaling.low) / (scaling.high - scaling.low)
  else:
    # YaRN's ramp is linear in the number of the frequency, not in its turns.
    limits = [
      head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
      for turns in (scaling.high, scaling.low)
    ]
    if scaling.rounded:
      limits = [math.floor(limits[0]), math.ceil(limits[1])]
    first, last = max(limits[0], 0), min(limits[1], head_dim - 1)
    number = np.arange(head_dim // 2, dtype=np.float32)
    kept = 1 - (number - first) / max(last - first, 0.001)
  kept = np.clip(kept, 0, 1).astype(np.float32)
  return slow * (1 - kept) + plain * kept


def rotation(
  positions: Int[Array, "P S"], turn: Float[np.ndarray, "half"], amplitude: float = 1.0
) -> Rotation:
  """cos and sin of `position * frequency`, times `amplitude`, float32."""
  angles = positions[..., None].astype(jnp.float32) * turn
  return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x: Float[Array, "P S h d"], by: Rotation) -> Array:
  """`x` with the halves of its head axis turned (the layout of Hugging Face checkpoints)."""
  cos, sin = (part[..., None, :] for part in by)
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
