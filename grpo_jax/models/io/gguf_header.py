"""Checks the counts and lengths in the header of a GGUF file before the gguf package reads it.

That package trusts them: a damaged count makes it loop for hours or fill the memory.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

# Bytes of a value by its type in the file; the types of texts and lists follow.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# The gguf package makes several Python objects of every item of a list, some 400 bytes.
MAX_ITEMS = 2**21
MAX_TENSORS, MAX_FIELDS, MAX_DIMENSIONS, MAX_DEPTH = 2**18, 2**16, 8, 4


def check_header(path: Path) -> None:
  """Walks over the metadata and the list of tensors of a GGUF file.

  Raises:
    ValueError: a count or a length is beyond the file, or beyond what any model has.
  """
  with path.open("rb") as file:
    _Walk(file).check()


class _Walk:
  """Reads the numbers of a header one after another."""

  def __init__(self, file: BinaryIO) -> None:
    self._file, self._size = file, os.fstat(file.fileno()).st_size
    self._order, self._items = "<", 0

  def check(self) -> None:
    """Walks over the whole header."""
    self._skip(4)
    if self._number("I") & 0xFFFF == 0:  # the version, written in the other byte order
      self._order = ">"
    tensors = self._count("tensors", MAX_TENSORS)
    for _ in range(self._count("fields", MAX_FIELDS)):
      self._text()
      self._value(self._number("I"))
    for _ in range(tensors):
      self._text()
      dimensions = self._number("I")
      if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions, allowed: {MAX_DIMENSIONS}")
      self._skip(8 * dimensions + 4 + 8)

  def _value(self, kind: int, depth: int = 0) -> None:
    """Walks over one value of the metadata."""
    if kind in _SIZES:
      self._skip(_SIZES[kind])
    elif kind == _TEXT:
      self._text()
    elif kind == _LIST and depth < MAX_DEPTH:
      self._list(depth)
    else:
      raise ValueError(f"a field of unknown type {kind}")

  def _list(self, depth: int) -> None:
    kind, count = self._number("I"), self._number("Q")
    self._items += count
    if self._items > MAX_ITEMS:
      raise ValueError(f"lists of over {self._items:,} items, allowed: {MAX_ITEMS:,}")
    if kind in _SIZES:
      self._skip(_SIZES[kind] * count)
    else:
      for _ in range(count):
        self._value(kind, depth + 1)

  def _text(self) -> None:
    self._skip(self._number("Q"))

  def _count(self, what: str, limit: int) -> int:
    if (count := self._number("Q")) > limit:
      raise ValueError(f"{count:,} {what}, allowed: {limit:,}")
    return count

  def _number(self, kind: str) -> int:
    size = struct.calcsize(kind)
    data = self._file.read(size)
    if len(data) < size:
      raise ValueError("the header is cut off")
    return struct.unpack(self._order + kind, data)[0]

  def _skip(self, count: int) -> None:
    if self._file.tell() + count > self._size:
      raise ValueError(f"a length of {count:,} bytes is beyond the end of the file")
    self._file.seek(count, os.SEEK_CUR)
