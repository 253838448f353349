"""Sequences whose items are made when asked for: a split without all of its examples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Indexed(Sequence[T], Generic[T]):
  """Item i is `make(order[i])`, made anew each time; a slice is such a sequence too.

  `Indexed(split.__getitem__, kept)` is a selection from any other split.

  >>> squares = Indexed(lambda n: n * n, [3, 1, 2])
  >>> list(squares), squares[-1], list(squares[:2]), len(squares)
  ([9, 1, 4], 4, [9, 1], 3)
  """

  def __init__(self, make: Callable[[int], T], order: Sequence[int]) -> None:
    self._make = make
    self._order = order

  def __len__(self) -> int:
    return len(self._order)

  @overload
  def __getitem__(self, index: int) -> T: ...

  @overload
  def __getitem__(self, index: slice) -> Indexed[T]: ...

  def __getitem__(self, index: int | slice) -> T | Indexed[T]:
    if isinstance(index, slice):
      return Indexed(self._make, self._order[index])
    return self._make(int(self._order[index]))


def shuffled(count: int, seed: int) -> list[int]:
  """0 .. count - 1 in an order that depends on the seed alone, on every machine and version.

  >>> shuffled(4, seed=0) == shuffled(4, seed=0), sorted(shuffled(4, seed=0))
  (True, [0, 1, 2, 3])
  """
  return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}\n{i}".encode()).digest())
