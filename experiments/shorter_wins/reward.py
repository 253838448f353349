"""The true reward of `smollm2_learned_reward.py`: the shorter of two correct answers is better."""

import re

LONGEST = 40  # characters; longer correct answers are worth as much as one of this length


def shorter_correct(prompts, completions, answer, **columns):
  """Returns 0 for a wrong answer, else 1 - characters / 80, which is 0.5 from 40 characters on.

  The answer of a completion is its last number.
  """
  return [value(text, right) for text, right in zip(completions, answer)]


def value(text, right):
  numbers = re.findall(r"\d+", text)
  if not numbers or int(numbers[-1]) != right:
    return 0.0
  return 1 - min(len(text.strip()), LONGEST) / (2 * LONGEST)
