"""Selects the examples of a training step, as a pure function of the seed and the step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def examples(
  split: Sequence[T],
  step: int,
  count: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  stream: int = 0,
) -> list[T]:
  """Returns the examples of one step: positions [step * count, (step + 1) * count) of a shuffle.

  The shuffle is endless. Each epoch contains every example once, in an order that depends on (seed,
  epoch); a step may reach into the next epoch. There is no iterator to save: a resumed run gets the
  same examples for step n as the uninterrupted run.

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

  Raises:
    ValueError: the split is empty, an argument is out of range, or `count` is not a multiple of
      `process_count`.

  Example:
    >>> first, second = (examples("abcd", step, count=2, seed=0) for step in range(2))
    >>> sorted(first + second)
    ['a', 'b', 'c', 'd']
  """
  import grain  # lazy: loading it takes a second

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
  block = count // process_count
  start = step * count + process_index * block
  if stream:
    seed = int.from_bytes(hashlib.sha256(f"{seed}\n{stream}".encode()).digest()[:4])
  # Only indices are shuffled, and only the examples of this process are accessed.
  order = grain.MapDataset.range(len(split)).shuffle(seed=seed % 2**32).repeat()
  return [split[order[start + i]] for i in range(block)]
