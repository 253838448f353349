"""Rewards lower-case letters: a task that a random model learns in seconds, for smoke tests."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from grpo_jax.tasks.base import Example, Task


def letters_task(*, train_size: int = 100, eval_size: int = 20) -> Task:
  """Builds the task: prompts are numbers, the reward is the fraction of lower-case letters.

  The reward is dense, since one byte in ten is a lower-case letter: a random byte-level model
  improves from the first step. It tests a whole run without a pretrained model.

  Args:
    train_size: number of training problems.
    eval_size: number of evaluation problems.

  Raises:
    ValueError: a size is out of range.

  Example:
    >>> letters_task(train_size=3, eval_size=1).splits["eval"][0].prompt
    '3:'
  """
  if train_size < 1 or eval_size < 0:
    raise ValueError(f"train_size is {train_size} and eval_size {eval_size}: need at least 1 and 0")
  numbers = range(train_size + eval_size)
  examples = [Example(prompt=f"{n}:", columns={}, key=str(n)) for n in numbers]
  return Task(
    name="letters",
    splits={"train": examples[:train_size], "eval": examples[train_size:]},
    rewards={"letters": (fraction_of_letters, 1.0)},
    accuracy=all_letters,
    answer=whole_completion,
  )


def fraction_of_letters(completions: Sequence[str], **columns: Any) -> list[float]:
  """Returns the fraction of characters that are lower-case ASCII letters; 0 if there are none.

  Example:
    >>> fraction_of_letters(["abc", "a1", ""])
    [1.0, 0.5, 0.0]
  """
  return [
    sum(c in string.ascii_lowercase for c in text) / max(len(text), 1) for text in completions
  ]


def all_letters(completions: Sequence[str], **columns: Any) -> list[float]:
  """Returns 1.0 for completions of lower-case letters only, 0.0 for others and empty ones.

  Example:
    >>> all_letters(["abc", "a1", ""])
    [1.0, 0.0, 0.0]
  """
  return [float(fraction == 1.0) for fraction in fraction_of_letters(completions)]


def whole_completion(text: str) -> str | None:
  """Returns the completion without surrounding space as its answer; None if it is empty.

  Example:
    >>> whole_completion(" ab "), whole_completion(" ")
    ('ab', None)
  """
  return text.strip() or None
