"""Which examples a step trains on: a pure function of the seed and the step."""

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
  """The examples of one step: positions [step * count, (step + 1) * count) of an endless shuffle.

  Epoch after epoch the split is gone through in a new order that depends on (seed, epoch), every
  example once; a step may reach into the next epoch. There is no iterator to save or to restore: a
  resumed run asks for step n and gets what the uninterrupted one got.

  Args:
    split: the examples; anything with a length and integer indices.
    step: from 0.
    count: examples in the step over all processes.
    seed: any integer.
    process_index, process_count: this process gets its block of count / process_count, in order, so
      that the blocks of all processes one after the other are the list that one process would get.
    stream: 0, or the number of another endless shuffle, independent of this one: what resamples a
      step, say, without moving the examples of the steps to come.

  Raises ValueError for an empty split, or a count that the processes cannot share evenly.

  >>> first, second = (examples("abcd", step, count=2, seed=0) for step in range(2))
  >>> sorted(first + second)
  ['a', 'b', 'c', 'd']
  """
  import grain  # here: it takes a second to load, which `import grpo_jax.data` need not

  if len(split) == 0:
    raise ValueError("the split has no examples: check the task's sizes or file")
  if step < 0 or count < 1:
    raise ValueError(f"step is {step} and count {count}: step must be >= 0 and count >= 1")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index is {process_index}: it must be in [0, {process_count})")
  if count % process_count:
    raise ValueError(
      f"{count} examples a step cannot be shared evenly by {process_count} processes: make the "
      f"count a multiple of {process_count}"
    )
  share = count // process_count
  start = step * count + process_index * share
  if stream:
    seed = int.from_bytes(hashlib.sha256(f"{seed}\n{stream}".encode()).digest()[:4])
  # Only indices are shuffled, and only those of this process's examples are computed: the split is
  # never gone through.
  order = grain.MapDataset.range(len(split)).shuffle(seed=seed % 2**32).repeat()
  return [split[order[start + i]] for i in range(share)]
