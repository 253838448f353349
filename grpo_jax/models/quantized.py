"""Holds frozen matrices in 8 or 4 bits and dequantizes them where they are used (QLoRA).

A matrix [in, out] is cut into blocks of its inputs. A block of an output has a scale, and each of
its numbers is a level times that scale. `quantized_matmul` dequantizes one matrix of one layer, in
the forward pass and again in the backward pass, so that a wide copy of the model never exists.
Matrices are quantized as they are read, or keep the blocks that a GGUF file has.

References:
  Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E (NF4).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from grpo_jax.core.checks import Array
from grpo_jax.models.io.gguf_blocks import TYPES, Stored, StoredMatrix, stacked
from grpo_jax.models.io.weights import MATRICES, Part, Weights
from grpo_jax.models.protocol import Params

# Quantiles of a normal distribution, of which one is 0, scaled to [-1, 1].
NF4 = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
# Largest block of each scheme. Matrices from a GGUF file of type Q8_0, which has blocks of 32, get
# the numbers of the file again.
BLOCKS = {"int8": 32, "nf4": 64}


FROM_FILE = "file"  # in the place of a scheme: blocks as a GGUF file has them
PACKED = ("nf4", "uint4", "int4")  # schemes with two numbers in a byte
FIELDS = ("values", "scales", "minimums", "scale_levels", "minimum_levels")


@partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=["scheme"])
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix [in, out], or a stack of them [L, in, out], in few bits.

  Blocks of GGUF files may have minimums, which are added. Those of some types are blocks of smaller
  ones, whose scales (and minimums) are small integers times those of the large block.

  Attributes:
    values: levels. `int8`: [L, in, out], from -128 to 127. Others: [L, in / 2, out] in uint8, the
      lower four bits for the first of two inputs: indices into `NF4` (`nf4`), numbers from 0 to 15
      (`uint4`), or these minus 8 (`int4`).
    scheme: the form of the values.
    scales: [L, in / block, out]; float32, or float16 from a file.
    minimums: as the scales.
    scale_levels, minimum_levels: int8 [L, in / small block, out].
  """

  values: Any
  scales: Any
  scheme: str
  minimums: Any = None
  scale_levels: Any = None
  minimum_levels: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix."""
    *stack, rows, columns = self.values.shape
    return (*stack, rows * (2 if self.scheme in PACKED else 1), columns)

  @property
  def ndim(self) -> int:
    """The number of axes of the matrix."""
    return len(self.shape)


def block_of(inputs: int, scheme: str) -> int:
  """Returns the size of a block: the largest divisor of `inputs` up to that of the scheme.

  Blocks of nf4 are even.

  Raises:
    ValueError: the scheme is unknown, or an odd number of inputs cannot be packed in pairs.

  Example:
    >>> block_of(576, "int8"), block_of(576, "nf4"), block_of(24, "int8")
    (32, 64, 24)
  """
  if scheme not in BLOCKS:
    raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(BLOCKS)}")
  if scheme == "nf4" and inputs % 2:
    raise ValueError(f"nf4 packs two numbers in a byte, and a matrix has {inputs} inputs; use int8")
  sizes = range(min(inputs, BLOCKS[scheme]), 0, -2 if scheme == "nf4" else -1)
  return next(size for size in sizes if inputs % size == 0)


def quantize(matrix: Float[np.ndarray, "... I O"], scheme: str) -> Quantized:
  """Returns a matrix, or a stack of them, in few bits, as numpy arrays.

  Every number becomes the nearest level times the scale of its block, which is the largest
  magnitude in the block divided by that of the levels (127, or 1).

  Args:
    matrix: [in, out] or [L, in, out].
    scheme: `int8`: 255 equal steps. `nf4`: 16 quantiles of a normal distribution.

  Example:
    >>> small = quantize(np.array([[0.5], [-1.0]], np.float32), "int8")
    >>> small.values.tolist(), dequantize(small).round(3).tolist()
    ([[64], [-127]], [[0.504...], [-1.0]])
  """
  *stack, inputs, outputs = matrix.shape
  block = block_of(inputs, scheme)
  blocks = np.asarray(matrix, np.float32).reshape(*stack, inputs // block, block, outputs)
  largest = np.abs(blocks).max(-2, keepdims=True)
  scales = largest / np.float32(127 if scheme == "int8" else 1)
  levels = blocks / np.where(scales > 0, scales, 1)
  if scheme == "int8":
    with np.errstate(invalid="ignore"):  # a scale of NaN is found when it is read
      values = np.rint(levels).astype(np.int8).reshape(matrix.shape)
  else:
    middles = (NF4[1:] + NF4[:-1]) / 2
    indices = np.searchsorted(middles, levels).astype(np.uint8)
    first, second = (indices.reshape(*stack, inputs // 2, 2, outputs)[..., i, :] for i in (0, 1))
    values = first | second << 4
  return Quantized(values, scales.squeeze(-2), scheme)


def dequantize(matrix: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "... I O"]:
  """Returns the matrix that is stored, level times scale plus minimum, computed in float32.

  Args:
    matrix: [in, out] or [L, in, out].
    dtype: of the result.
  """
  if matrix.scheme == "int8":
    levels = matrix.values.astype(jnp.float32)
  else:
    pair = jnp.stack([matrix.values & 15, matrix.values >> 4], axis=-2)
    levels = jnp.asarray(NF4)[pair] if matrix.scheme == "nf4" else pair.astype(jnp.float32)
    levels = levels.reshape(matrix.shape) - (8 if matrix.scheme == "int4" else 0)
  wide = _scaled(levels, _scaled(matrix.scale_levels, matrix.scales))
  if matrix.minimums is not None:
    minimums = _scaled(matrix.minimum_levels, matrix.minimums)
    wide = wide + _scaled(jnp.ones_like(levels), minimums)
  return wide.astype(dtype)


def _scaled(
  numbers: Float[Array, "... I O"] | None, scales: Float[Array, "... B O"]
) -> Float[Array, "... I O"]:
  """Returns numbers times the scales of their blocks, or the scales if there are no numbers."""
  scales = scales.astype(jnp.float32)
  if numbers is None:
    return scales
  *stack, blocks, outputs = scales.shape
  blocked = numbers.astype(jnp.float32).reshape(*stack, blocks, -1, outputs)
  return (blocked * scales[..., None, :]).reshape(numbers.shape)


@jax.custom_vjp
def quantized_matmul(h: Float[Array, "... I"], matrix: Quantized) -> Float[Array, "... O"]:
  """Returns `h @ dequantize(matrix)`; only `h` has a gradient, and nothing is kept for it."""
  return h @ _here(h, matrix)


def _here(h: Array, matrix: Quantized) -> Array:
  """Returns the dequantized matrix, once for each product.

  XLA moves what does not change out of loops, and would keep all wide matrices while it decodes.
  """
  _, matrix = jax.lax.optimization_barrier((h, matrix))
  return dequantize(matrix, h.dtype)


def _forward(h: Array, matrix: Quantized) -> tuple[Array, Quantized]:
  return quantized_matmul(h, matrix), matrix


def _backward(matrix: Quantized, dy: Array) -> tuple[Array, None]:
  return dy @ _here(dy, matrix).T, None


quantized_matmul.defvjp(_forward, _backward)


# --- whole models ---------------------------------------------------------------------------------


def quantized_shapes(
  shapes: Params, scheme: str, stored: Mapping[str, Sequence[Stored]] | None = None
) -> Params:
  """Returns the shapes of the parameters of a model whose layers' matrices are quantized.

  Args:
    shapes: of the parameters that are read.
    scheme: as in `quantize`, or `file`.
    stored: as in `Weights`; needed for `file`. Matrices that have no blocks in the file stay wide.

  Raises:
    ValueError: as `block_of`, and for `file`: no matrix of the model has blocks, or they are of
      another type than in `gguf_blocks.TYPES`. The message names the matrix.
  """

  def one(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
    if name not in MATRICES:
      return leaf
    *stack, inputs, outputs = leaf.shape
    try:
      block = block_of(inputs, scheme)
    except ValueError as error:
      raise ValueError(f"layers/{name}: {error}") from error
    rows, dtype = (inputs // 2, jnp.uint8) if scheme == "nf4" else (inputs, jnp.int8)
    values = jax.ShapeDtypeStruct((*stack, rows, outputs), dtype)
    scales = jax.ShapeDtypeStruct((*stack, inputs // block, outputs), jnp.float32)
    return Quantized(values, scales, scheme)

  def as_stored(matrix: StoredMatrix) -> Quantized:
    count, inputs, outputs = matrix.shape
    return Quantized(scheme=matrix.scheme, **{
      name: jax.ShapeDtypeStruct((count, inputs // per, outputs), dtype)
      for name, (per, dtype) in matrix.fields.items()
    })  # fmt: skip

  layers = shapes["layers"]
  if scheme == FROM_FILE:
    kept = stored_matrices(shapes, stored or {})
    return shapes | {"layers": layers | {name: as_stored(kept[name]) for name in kept}}
  return shapes | {"layers": {name: one(name, leaf) for name, leaf in layers.items()}}


def stored_matrices(
  shapes: Params, stored: Mapping[str, Sequence[Stored]]
) -> dict[str, StoredMatrix]:
  """Returns the matrices that have blocks in a GGUF file, by name.

  Raises:
    ValueError: as `quantized_shapes`.
  """
  matrices = {
    name: stacked(name, layers, shapes["layers"][name].shape) for name, layers in stored.items()
  }
  kept = {name: matrix for name, matrix in matrices.items() if matrix is not None}
  if not kept:
    raise ValueError(
      "no matrix of the layers is quantized in the model's files: keeping quantized blocks needs a "
      f"GGUF file that has them ({', '.join(TYPES)}); {' and '.join(BLOCKS)} quantize any model"
    )
  return kept


def quantized_weights(weights: Weights, scheme: str) -> Weights:
  """Returns a model whose layers' matrices are quantized as they are read, part by part.

  Args:
    weights: the model in its files.
    scheme: as in `quantize`, or `file`: the blocks of a GGUF file are kept.

  Raises:
    ValueError: as `quantized_shapes`.
  """
  shapes = quantized_shapes(weights.shapes, scheme, weights.stored)
  layers = dict(weights.parts["layers"])
  if scheme == FROM_FILE:
    for name, matrix in stored_matrices(weights.shapes, weights.stored).items():
      fields = {field: partial(matrix.read, field) for field in matrix.fields}
      layers[name] = Quantized(scheme=matrix.scheme, **fields)
  else:
    for name in MATRICES.keys() & layers.keys():
      read = partial(_read_blocks, layers[name], weights.shapes["layers"][name].shape, scheme)
      layers[name] = Quantized(partial(read, "values"), partial(read, "scales"), scheme)
  return dataclasses.replace(weights, shapes=shapes, parts=weights.parts | {"layers": layers})


def _read_blocks(
  part: Part, shape: tuple[int, ...], scheme: str, field: str, index: tuple[slice, ...]
) -> np.ndarray:
  """Reads a part of the values or of the scales of a matrix: whole blocks, of which it cuts out."""
  *stack, rows, columns = index
  block = block_of(shape[-2], scheme)
  size = block if field == "scales" else 2 if scheme == "nf4" else 1  # inputs of a row
  start, stop, _ = rows.indices(shape[-2] // size)
  low, high = start * size // block * block, -(-stop * size // block) * block
  found = getattr(quantize(part((*stack, slice(low, high), columns)), scheme), field)
  return found[..., start - low // size : stop - low // size, :]


def dequantized(params: Params) -> Params:
  """Returns the parameters of a model with wide matrices in place of quantized ones."""

  def one(leaf: Any) -> Any:
    return dequantize(leaf) if isinstance(leaf, Quantized) else leaf

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def is_quantized(params: Mapping[str, Any]) -> bool:
  """Returns whether a model has quantized matrices."""
  leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
  return any(isinstance(leaf, Quantized) for leaf in leaves)
