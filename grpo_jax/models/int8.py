"""Multiplies rounded activations by rounded weights, in 8-bit integers, for sampling alone.

A row of activations and a column of weights each become whole numbers from -127 to 127, their
levels, times a scale: the largest magnitude / 127. An output is

    sum(levels of the row * levels of the column) * scale of the row * scale of the column

and its sum is exact in int32. Rounding has no gradient, so nothing here is trained.

A few channels of activations are far above the others, and would make the levels of their rows
coarse. So both factors are first rotated by the same orthogonal matrix, which spreads each channel
over the `BLOCK` next to it and leaves the product as it is.

References:
  Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise quantization),
  without its outlier columns.
  Ashkboos et al. 2024, QuaRot, arXiv 2404.00456: rotation by Hadamard matrices; here in blocks, and
  at each product.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from grpo_jax.core.checks import Array
from grpo_jax.models.io.weights import MATRICES
from grpo_jax.models.protocol import Params

BLOCK = 64  # channels that are rotated with each other, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
  """A matrix [in, out] of rotated and rounded weights, or a stack of them.

  Attributes:
    values: int8 [..., in, out], from -127 to 127.
    scales: float32 [..., 1, out].
  """

  values: Any
  scales: Any


def rounded(matrix: Float[Array, "... I O"], axis: int) -> tuple[Array, Array]:
  """Returns levels in int8, and the float32 scales of the vectors along an axis, which stays.

  Example:
    >>> levels, scales = rounded(jnp.array([[2.54, -1.0], [0.0, 0.0]]), axis=-1)
    >>> levels.tolist(), scales.round(3).tolist()
    ([[127, -50], [0, 0]], [[0.0...], [0.0]])
  """
  wide = matrix.astype(jnp.float32)
  scales = jnp.max(jnp.abs(wide), axis, keepdims=True) / 127
  levels = jnp.round(wide / jnp.where(scales > 0, scales, 1))
  return levels.astype(jnp.int8), scales


def rotate(x: Float[Array, "... I"]) -> Float[Array, "... I"]:
  """Returns vectors rotated by blocks of a Hadamard matrix that is scaled to be orthogonal.

  Blocks are as large as the largest power of 2 that divides the axis, up to `BLOCK`.

  Example:
    >>> rotate(jnp.array([8.0, 0.0, 0.0, 0.0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
  """
  size = min(x.shape[-1] & -x.shape[-1], BLOCK)
  signs = np.array([[1]])
  while len(signs) < size:
    signs = np.block([[signs, signs], [signs, -signs]])
  matrix = jnp.asarray(signs / np.sqrt(size), jnp.float32)
  blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
  return jnp.matmul(blocks, matrix, precision="highest").reshape(x.shape)


def int8_matmul(h: Float[Array, "... I"], matrix: Int8Matrix) -> Float[Array, "... O"]:
  """Returns the product of both factors rotated and rounded, in the dtype of `h`.

  Args:
    h: activations, each row of which gets a scale of its own.
    matrix: [in, out].
  """
  levels, scales = rounded(rotate(h), axis=-1)
  sums = jnp.matmul(levels, matrix.values, preferred_element_type=jnp.int32)
  return (sums.astype(jnp.float32) * scales * matrix.scales[0]).astype(h.dtype)


def int8_matrix(matrix: Float[Array, "... I O"]) -> Int8Matrix:
  """Returns a matrix, or a stack of them, rotated and rounded."""
  rotated = rotate(matrix.swapaxes(-1, -2)).swapaxes(-1, -2)
  return Int8Matrix(*rounded(rotated, axis=-2))


def with_int8_matrices(params: Params) -> Params:
  """Returns the parameters of a model with the matrices of its layers rotated and rounded.

  Embedding, head, norms, biases, router and the matrices of experts stay as they are.
  """
  layers = {
    name: int8_matrix(leaf) if name in MATRICES else leaf for name, leaf in params["layers"].items()
  }
  return params | {"layers": layers}
