"""A task that a random model can learn in seconds: answer any prompt with lower-case letters."""

from __future__ import annotations

import string
from typing import Any

from grpo_jax.tasks.base import Example, Task


def letters_task(*, train_size: int = 100, eval_size: int = 20) -> Task:
  """Prompts are numbers; the reward is the share of lower-case letters in the answer.

  It is dense (one byte in ten is a letter), so a random byte-level model improves from the first
  step: for smoke tests of a whole run, where no pretrained model is at hand.
  """
  if train_size < 1 or eval_size < 0:
    raise ValueError(f"train_size is {train_size} and eval_size {eval_size}: need at least 1 and 0")
  numbers = range(train_size + eval_size)
  every = [Example(prompt=f"{n}:", columns={}, key=str(n)) for n in numbers]
  return Task(
    name="letters",
    splits={"train": every[:train_size], "eval": every[train_size:]},
    rewards={"letters": (share_of_letters, 1.0)},
    accuracy=all_letters,
    answer=whole_answer,
  )


def share_of_letters(completions: list[str], **columns: Any) -> list[float]:
  """Share of the characters that are lower-case ASCII letters; 0 for an empty answer.

  >>> share_of_letters(["abc", "a1", ""])
  [1.0, 0.5, 0.0]
  """
  return [
    sum(c in string.ascii_lowercase for c in text) / max(len(text), 1) for text in completions
  ]


def whole_answer(text: str) -> str | None:
  """The answer itself, without the space around it; None for an empty one."""
  return text.strip() or None


def all_letters(completions: list[str], **columns: Any) -> list[float]:
  """1.0 where the answer is nothing but letters, and not empty."""
  return [float(share == 1.0) for share in share_of_letters(completions)]
