"""Multiplies rounded activations by rounded weights, in 8-bit integers, for sampling alone.

A row of activations and a column of weights each become whole numbers from -127 to 127, their
levels, times a scale: the largest magnitude / 127. An output is

    sum(levels of the row * levels of the column) * scale of the row * scale of the column

and its sum is exact in int32. Rounding has no gradient, so nothing here is trained.

References:
  Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise quantization),
  without its outlier columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.core.checks import Array
from grpo_jax.models.io.weights import MATRICES
from grpo_jax.models.protocol import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
  """A matrix [in, out] of rounded weights, or a stack of them.

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


def int8_matmul(h: Float[Array, "... I"], matrix: Int8Matrix) -> Float[Array, "... O"]:
  """Returns the product of both factors rounded, in the dtype of `h`.

  Args:
    h: activations, each row of which gets a scale of its own.
    matrix: [in, out].
  """
  levels, scales = rounded(h, axis=-1)
  sums = jnp.matmul(levels, matrix.values, preferred_element_type=jnp.int32)
  return (sums.astype(jnp.float32) * scales * matrix.scales[0]).astype(h.dtype)


def with_int8_matrices(params: Params) -> Params:
  """Returns the parameters of a model with the matrices of its layers rounded.

  Embedding, head, norms, biases, router and the matrices of experts stay as they are.
  """
  layers = {
    name: Int8Matrix(*rounded(leaf, axis=-2)) if name in MATRICES else leaf
    for name, leaf in params["layers"].items()
  }
  return params | {"layers": layers}
