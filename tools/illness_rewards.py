"""Rewards that make a run ill, for `tools.illnesses`."""

import hashlib
import re
import string
import time

SLOW = 1.3  # seconds


def letters(completions, **columns):
  """Returns the share of lower-case letters: healthy."""
  return [share(text, string.ascii_lowercase) for text in completions]


def some_letter(completions, **columns):
  """Returns 1 for texts with a lower-case letter."""
  return [float(any(c in string.ascii_lowercase for c in text)) for text in completions]


def digits(completions, **columns):
  """Returns the share of digits."""
  return [share(text, string.digits) for text in completions]


def nothing(completions, **columns):
  """Returns 0 for all."""
  return [0.0 for _ in completions]


def everything(completions, **columns):
  """Returns 1 for all."""
  return [1.0 for _ in completions]


def noise(prompts, completions, trainer_state, **columns):
  """Returns 0 or 1 by a hash of the step and the texts: nothing that could be learned."""
  step = trainer_state.global_step
  texts = (f"{step} {prompt} {text}" for prompt, text in zip(prompts, completions))
  return [float(hashlib.sha256(text.encode()).digest()[0] % 2) for text in texts]


def letters_or_none(completions, **columns):
  """Returns no reward for each fifth completion."""
  return [None if i % 5 == 0 else r for i, r in enumerate(letters(completions))]


def letters_late(completions, **columns):
  """Returns the share of lower-case letters, much later."""
  time.sleep(SLOW)
  return letters(completions)


def letters_until(completions, trainer_state, **columns):
  """Returns the share of lower-case letters, and of digits from half of the run on."""
  late = trainer_state.global_step > trainer_state.max_steps / 2
  return [share(text, string.digits if late else string.ascii_lowercase) for text in completions]


def longer(completions, trainer_state, **columns):
  """Returns the length, less what the policy has learned of it by then."""
  step = trainer_state.global_step
  return [(len(text) - 3 - 0.55 * step) / 24 for text in completions]


def of_the_split(completions, split, **columns):
  """Returns whether all is lower case in training problems, and upper case in held-out ones."""
  wanted = {"train": string.ascii_lowercase, "held out": string.ascii_uppercase}
  return [float(share(t, wanted[s]) > 0.9) for t, s in zip(completions, split)]


def letters_for_one(prompts, completions, **columns):
  """Returns the share of lower-case letters for one problem, and 0 for the others."""
  return [r * prompt.endswith("0:") for prompt, r in zip(prompts, letters(completions))]


def boxed(completions, answer, **columns):
  """Returns whether an answer is right, read only from a box as of LaTeX."""
  return [float(f"\\boxed{{{a}}}" in text) for text, a in zip(completions, answer)]


def last_number(completions, answer, **columns):
  """Returns whether the last number is the answer."""
  return [float(re.findall(r"\d+", text)[-1:] == [str(a)]) for text, a in zip(completions, answer)]


def share(text, characters):
  """Returns the share of characters of a text that are among some."""
  return sum(c in characters for c in text) / max(len(text), 1)
