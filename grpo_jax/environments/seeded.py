"""Gives code that draws from Python's and NumPy's global generators a stream of its own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np


class GlobalRandom:
  """Keeps the global random generators as one episode sees them, whatever else is drawn.

  Args:
    seed: two episodes with the same seed draw the same.

  Example:
    >>> ours, other = GlobalRandom(0), GlobalRandom(1)
    >>> def draw(generators):
    ...   with generators.in_place():
    ...     return random.random()
    >>> mixed = [draw(ours), draw(other), draw(ours)]
    >>> again = GlobalRandom(0)
    >>> [draw(again), draw(again)] == [mixed[0], mixed[2]]
    True
  """

  def __init__(self, seed: int) -> None:
    self._python = random.Random(seed).getstate()
    self._numpy = np.random.RandomState(seed % 2**32).get_state()

  @contextlib.contextmanager
  def in_place(self) -> Iterator[None]:
    """Puts the generators of the episode in the place of the global ones, for the block."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.setstate(self._python)
    np.random.set_state(self._numpy)  # noqa: NPY002
    try:
      yield
    finally:
      self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
      random.setstate(before[0])
      np.random.set_state(before[1])  # noqa: NPY002
