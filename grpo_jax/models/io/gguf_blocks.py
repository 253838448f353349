"""Unpacks the quantized blocks of GGUF matrices into levels and scales, and stacks the layers.

A row of a matrix [out, in] is a sequence of blocks. Each number of a block is

    scale * scale_level * level + minimum * minimum_level

of small integers (levels) and float16 numbers, with fewer factors in the simpler types. Nothing is
computed here: the fields keep the bits of the file.

References:
  ggml/src/ggml-common.h of llama.cpp, structs `block_q4_0` to `block_q6_K`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

# Blocks [n, bytes] -> numbers [n, k], of which each belongs to inputs / k inputs of its block.
Unpack = Callable[[UInt8[np.ndarray, "n b"]], np.ndarray]


class BlockType(NamedTuple):
  """Describes the blocks of one type.

  Attributes:
    inputs: numbers in a block.
    size: bytes of a block.
    fields: name -> how it is unpacked; `levels` are int8.
    least: smallest level of a type whose levels have 4 bits; None for wider ones.
  """

  inputs: int
  size: int
  fields: dict[str, Unpack]
  least: int | None = None


def _half(at: int, sign: int = 1) -> Unpack:
  """Unpacks the float16 number at a byte."""
  return lambda blocks: sign * np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(start: int, run: int, count: int) -> Unpack:
  """Unpacks `count` numbers: the low bits of `run` bytes, then their high bits, and so on."""

  def unpack(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, start : start + count // 2].reshape(len(blocks), -1, run)
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(blocks), count)

  return unpack


def _levels(low: Unpack, high: Unpack | None = None, offset: int = 0) -> Unpack:
  """Unpacks int8 levels from their lower four bits, the bits above, and the value of zeros."""

  def unpack(blocks: np.ndarray) -> np.ndarray:
    values = low(blocks) | (0 if high is None else high(blocks) << 4)
    return values.astype(np.int8) + np.int8(offset)

  return unpack


def _signed(start: int, count: int) -> Unpack:
  return lambda blocks: blocks[:, start : start + count].view(np.int8)


def _bits(start: int) -> Unpack:
  """Unpacks 32 bits in the order of the numbers."""
  return lambda blocks: np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")


def _bits_across(start: int) -> Unpack:
  """Unpacks 256 bits: bit g of byte i belongs to number 32 g + i."""

  def unpack(blocks: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(blocks[:, start : start + 32], axis=1, bitorder="little")
    return bits.reshape(-1, 32, 8).swapaxes(1, 2).reshape(-1, 256)

  return unpack


def _pairs_of_bits(blocks: np.ndarray) -> np.ndarray:
  """Unpacks the high bits of Q6_K: 32 bytes hold two bits of each of 128 numbers."""
  packed = blocks[:, 128:192].reshape(-1, 2, 1, 32)
  return (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 256)


def _six_bits(first: int) -> Unpack:
  """Unpacks 8 numbers of 6 bits: of bytes `first` to `first + 4`, and of the last 4 of 12 bytes."""

  def unpack(blocks: np.ndarray) -> np.ndarray:
    own, shared = blocks[:, first : first + 4], blocks[:, 12:16]
    low = shared & 15 if first == 4 else shared >> 4
    return np.concatenate([own & 63, low | own >> 2 & 48], axis=1).astype(np.int8)

  return unpack


_K_SCALES = {
  "scales": _half(0),
  "minimums": _half(2, sign=-1),
  "scale_levels": _six_bits(4),
  "minimum_levels": _six_bits(8),
}
TYPES: dict[str, BlockType] = {
  "Q4_0": BlockType(
    32, 18, {"levels": _levels(_nibbles(2, 16, 32), offset=-8), "scales": _half(0)}, -8
  ),
  "Q4_1": BlockType(
    32,
    20,
    {"levels": _levels(_nibbles(4, 16, 32)), "scales": _half(0), "minimums": _half(2)},
    0,
  ),
  "Q5_0": BlockType(
    32, 22, {"levels": _levels(_nibbles(6, 16, 32), _bits(2), -16), "scales": _half(0)}
  ),
  "Q5_1": BlockType(
    32,
    24,
    {"levels": _levels(_nibbles(8, 16, 32), _bits(4)), "scales": _half(0), "minimums": _half(2)},
  ),
  "Q8_0": BlockType(32, 34, {"levels": _signed(2, 32), "scales": _half(0)}),
  "Q4_K": BlockType(256, 144, {"levels": _levels(_nibbles(16, 32, 256)), **_K_SCALES}, 0),
  "Q5_K": BlockType(
    256, 176, {"levels": _levels(_nibbles(48, 32, 256), _bits_across(16)), **_K_SCALES}
  ),
  "Q6_K": BlockType(
    256,
    210,
    {
      "levels": _levels(_nibbles(0, 64, 256), _pairs_of_bits, -32),
      "scales": _half(208),
      "scale_levels": _signed(192, 16),
    },
  ),
}
WIDE = ("F32", "F16", "BF16", "F64")  # types without blocks


class Stored(NamedTuple):
  """Holds a tensor as it lies in the file.

  Attributes:
    kind: name of its type.
    rows: bytes of the rows in a slice, [O, bytes]; a row belongs to an output.
  """

  kind: str
  rows: Callable[[slice], np.ndarray]


@dataclass(frozen=True)
class StoredMatrix:
  """Gives the fields of a matrix [in, out] of all layers, each stacked as [L, in / per, out].

  `values` are the levels; two in a byte, above the smallest one, if they have 4 bits. Layers of
  several types take a form that holds all of them with the same numbers: levels of 8 bits if theirs
  differ, and the smallest of their blocks.

  Attributes:
    layers: the matrix of each layer, [out, in], of types in `TYPES`.
    shape: [L, in, out].
  """

  layers: tuple[Stored, ...]
  shape: tuple[int, int, int]

  @property
  def types(self) -> list[BlockType]:
    """The types that occur."""
    return [TYPES[kind] for kind in sorted({layer.kind for layer in self.layers})]

  @property
  def scheme(self) -> str:
    """The form of the values: `uint4` from 0 to 15, `int4` from -8 to 7, or `int8`."""
    least = {kind.least for kind in self.types}
    return {0: "uint4", -8: "int4"}.get(least.pop() if len(least) == 1 else None, "int8")

  @property
  def fields(self) -> dict[str, tuple[int, np.dtype]]:
    """The number of inputs that share an entry of a field, and the dtype; by name."""
    packed = self.scheme != "int8"
    fields = {"values": (2 if packed else 1, np.dtype(np.uint8 if packed else np.int8))}
    for kind in self.types:
      for name, unpack in kind.fields.items():
        entries = unpack(np.zeros((1, kind.size), np.uint8))
        per = math.gcd(kind.inputs // entries.shape[1], fields.get(name, (0,))[0])
        fields |= {name: (per, entries.dtype)} if name != "levels" else {}
    return fields

  def read(self, field: str, index: tuple[slice, slice, slice]) -> np.ndarray:
    """Returns a part of a field; the index is of its entries."""
    layers, entries, outputs = index
    read = self._values if field == "values" else partial(self._entries, field)
    return np.stack([read(layer, outputs)[entries] for layer in self.layers[layers]])

  def _values(self, layer: Stored, outputs: slice) -> np.ndarray:
    levels = self._unpacked("levels", layer, outputs).T
    if self.scheme == "int8":
      return levels
    above = (levels - TYPES[layer.kind].least).astype(np.uint8)
    return above[::2] | above[1::2] << 4

  def _entries(self, field: str, layer: Stored, outputs: slice) -> np.ndarray:
    """Returns a field of one layer, [in / per, out]; neutral numbers if another layer has it."""
    per, dtype = self.fields[field]
    count = self.shape[1] // per
    if field not in TYPES[layer.kind].fields:
      return np.full((count, len(range(self.shape[2])[outputs])), field != "minimums", dtype)
    entries = self._unpacked(field, layer, outputs)
    return np.repeat(entries, count // entries.shape[1], axis=1).T

  def _unpacked(self, field: str, layer: Stored, outputs: slice) -> np.ndarray:
    kind, rows = TYPES[layer.kind], layer.rows(outputs)
    return kind.fields[field](rows.reshape(-1, kind.size)).reshape(len(rows), -1)


def stacked(
  name: str, layers: Sequence[Stored], shape: tuple[int, int, int]
) -> StoredMatrix | None:
  """Returns a matrix of all layers as the file has it, or None if a layer has no blocks.

  Args:
    name: of the matrix, for errors.
    layers, shape: as in `StoredMatrix`.

  Raises:
    ValueError: blocks of a type that is not in `TYPES`.
  """
  for number, layer in enumerate(layers):
    if layer.kind not in (*TYPES, *WIDE):
      raise ValueError(
        f"layers/{name} of layer {number} is of type {layer.kind}, which is not kept as it is "
        f"(known: {', '.join(TYPES)}); int8 and nf4 quantize any type again"
      )
  kept = all(layer.kind in TYPES for layer in layers)
  return StoredMatrix(tuple(layers), shape) if kept else None
