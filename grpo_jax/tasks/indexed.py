"""Creates the items of a sequence on access, so that a split never holds all of its examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Indexed(Sequence[T], Generic[T]):
  """A sequence whose item i is `make(order[i])`, created at each access. Slices are lazy too.

  `Indexed(split.__getitem__, indices)` selects items of any other sequence.

  Args:
    make: index -> item.
    order: the indices of the items, in order.

  Example:
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
  """Returns a permutation of 0 .. count - 1 that depends on the seed alone.

  It is the same on every machine and with every version of Python.

  Example:
    >>> shuffled(4, seed=0) == shuffled(4, seed=0), sorted(shuffled(4, seed=0))
    (True, [0, 1, 2, 3])
  """
  return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}\n{i}".encode()).digest())
