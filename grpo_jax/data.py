"""Selects the examples of a training step, as a pure function of the seed and the step.

With a curriculum (`curriculum.py`), the order is also a function of the run's counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")
# (number of examples, seed, stream, epoch) -> index in the split by position in the epoch
Order = Callable[[int, int, int, int], Sequence[int]]


def _hashed(size: int, seed: int, stream: int, epoch: int) -> Sequence[int]:
  """Shuffles with a hash of (seed, stream, epoch), so that no two seeds share later epochs.

  Epoch 0 has the order of version 0.1.0, so that results of runs within one epoch stay.
  """
  if epoch == 0:
    return _added(size, seed, stream, epoch)
  return _shuffled(size, _digest(seed, stream, epoch))


def _added(size: int, seed: int, stream: int, epoch: int) -> Sequence[int]:
  """Shuffles with seed + epoch, as version 0.1.0 did: epoch 1 of seed 0 is epoch 0 of seed 1."""
  seed = _digest(seed, stream) if stream else seed
  return _shuffled(size, seed + epoch)


def _file(size: int, seed: int, stream: int, epoch: int) -> Sequence[int]:
  """Keeps the order of the split. Further draws of a step are shuffled all the same."""
  return _hashed(size, seed, stream, epoch) if stream else range(size)


def _shuffled(size: int, seed: int) -> Sequence[int]:
  import grain  # lazy: loading it takes a second

  return grain.MapDataset.range(size).shuffle(seed=seed % 2**32)


def _digest(*numbers: int) -> int:
  text = "\n".join(map(str, numbers))
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


ORDERS: dict[str, Order] = {"hashed": _hashed, "added": _added, "file": _file}


def examples(
  split: Sequence[T],
  step: int,
  count: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  stream: int = 0,
  *,
  order: str | Order = "hashed",
) -> list[T]:
  """Returns the examples of one step: positions [step * count, (step + 1) * count) of all epochs.

  Each epoch contains every example once, in an order that depends on (seed, epoch); epochs follow
  each other without a gap. A step always has `count` examples: one that reaches the end of an epoch
  takes the rest from the beginning of the next. There is no iterator to save: a resumed run gets
  the same examples for step n as the uninterrupted run.

  Args:
    split: the examples; any object with a length and integer indices.
    step: number of the step, from 0.
    count: number of examples in the step, over all processes.
    seed: any integer.
    process_index: index of this process. It gets the block of that index, of count / process_count
      examples; the concatenated blocks are the list that a single process would get.
    process_count: number of processes.
    stream: 0, or the number of another shuffle that is independent of this one, for example to
      resample a step without changing the examples of later steps.
    order: a key of `ORDERS`: "hashed" (shuffled), "file" (as in the split), or "added" (shuffled as
      in version 0.1.0); or a function with the arguments of those.

  Raises:
    ValueError: the split is empty, an argument is out of range, the order is unknown, or `count` is
      not a multiple of `process_count`.

  Example:
    >>> first, second = (examples("abcd", step, count=2, seed=0) for step in range(2))
    >>> sorted(first + second)
    ['a', 'b', 'c', 'd']
    >>> examples("abcd", 1, count=3, seed=0, order="file")
    ['d', 'a', 'b']
  """
  if len(split) == 0:
    raise ValueError("the split has no examples: check the task's sizes or file")
  if step < 0 or count < 1:
    raise ValueError(f"step is {step} and count {count}: step must be >= 0 and count >= 1")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index is {process_index}: it must be in [0, {process_count})")
  if count % process_count:
    raise ValueError(
      f"{count} examples per step cannot be divided evenly among {process_count} processes: make "
      f"the count a multiple of {process_count}"
    )
  if not callable(order) and order not in ORDERS:
    raise ValueError(f"order is {order!r}, known: {', '.join(ORDERS)}")
  size, block = len(split), count // process_count
  start = step * count + process_index * block
  # Only indices are shuffled, and only the examples of this process are accessed.
  make = order if callable(order) else ORDERS[order]
  epochs = range(start // size, (start + block - 1) // size + 1)
  orders = {epoch: make(size, seed, stream, epoch) for epoch in epochs}
  places = (divmod(start + i, size) for i in range(block))
  return [split[orders[epoch][index]] for epoch, index in places]


def steps_of(epochs: float, size: int, count: int) -> int:
  """Returns the number of steps of `count` examples that cover `epochs` passes over a split.

  The last step is a whole one: if the examples do not divide evenly, it reaches into the next
  epoch.

  Args:
    epochs: number of passes; may be a fraction.
    size: number of examples in the split.
    count: number of examples in a step.

  Example:
    >>> [steps_of(epochs, size=10, count=4) for epochs in (0.5, 1, 2)]
    [2, 3, 5]
  """
  # A decimal such as 0.1 counts as written: 0.1 * 30 must not become 4 steps of 1.
  return max(math.ceil(Fraction(str(epochs)) * size / count), 1)
