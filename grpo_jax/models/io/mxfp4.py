"""Reads matrices in MXFP4: 4-bit floats in blocks of 32 with a power of two as their scale.

References:
  Rouhani et al. 2023, OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

from grpo_jax.models.io.safetensors import MXFP4_PARTS, Index, Tensor

# Of e2m1: the sign is the highest of the four bits.
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
VALUES = np.concatenate([_VALUES, -_VALUES])
BIAS = 127  # of the exponent, e8m0
NO_NUMBER = 255  # the scale that stands for NaN


def dequantize(
  blocks: UInt8[np.ndarray, "... g 16"], scales: UInt8[np.ndarray, "... g"]
) -> Float32[np.ndarray, "... n"]:
  """Returns the numbers of g blocks, n = 32 g; exact in float32.

  Each byte holds two numbers, the first in its lower half. A scale s stands for `2^(s - 127)`, and
  255 for NaN.

  Example:
    >>> row = np.zeros((1, 16), np.uint8)
    >>> row[0, :2] = 0x72, 0x9F  # 1.0 and 6.0, -6.0 and -0.5
    >>> dequantize(row, np.array([128], np.uint8))[:5].tolist()
    [2.0, 12.0, -12.0, -1.0, 0.0]
  """
  numbers = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
  exponents = np.where(scales == NO_NUMBER, 0, scales.astype(np.int32) - BIAS)
  numbers = np.ldexp(numbers.reshape(*blocks.shape[:-1], -1), exponents[..., None])
  numbers[scales == NO_NUMBER] = np.nan
  return numbers.reshape(*scales.shape[:-1], -1)


def joined(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
  """Returns the tensors with one of numbers in place of each pair `X_blocks`, `X_scales`.

  Blocks [E, out, g, 16] and scales [E, out, g] become X, [E, 32 g, out], as it is in files in wide
  numbers.

  Raises:
    ValueError: a tensor has no partner, or their shapes do not fit.
  """
  packed = {name: t for name, t in tensors.items() if name.endswith(MXFP4_PARTS)}
  plain = {name: t for name, t in tensors.items() if name not in packed}
  for name in sorted({name[: -len(MXFP4_PARTS[0])] for name in packed}):
    blocks, scales = (packed.get(name + part) for part in MXFP4_PARTS)
    shapes = [None if t is None else list(t.shape) for t in (blocks, scales)]
    if blocks is None or scales is None or (*scales.shape, 16) != blocks.shape:
      raise ValueError(
        f"{where}: {name} in MXFP4 has blocks of shape {shapes[0]} and scales of shape "
        f"{shapes[1]}: blocks must be [experts, out, groups, 16] and scales the same without 16"
      )
    experts, out, groups = scales.shape
    plain[name] = Tensor((experts, 32 * groups, out), _reader(blocks, scales))
  return plain


def _reader(blocks: Tensor, scales: Tensor) -> Callable[[Index], np.ndarray]:
  """Returns the function that reads a part of the numbers, [experts, in, out]."""

  def read(index: Index) -> np.ndarray:
    experts, inputs, outputs = index
    everything = slice(None)
    numbers = dequantize(
      blocks.read((experts, outputs, everything, everything)),
      scales.read((experts, outputs, everything)),
    )
    return numbers.swapaxes(1, 2)[:, inputs]

  return read
