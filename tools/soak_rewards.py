"""The reward of `soak.py`: now and then it kills its process, hangs, or takes its time.

Which completion does what follows from its text alone, so that a run can be had a second time.
"""

import hashlib
import os
import time

DIES, HANGS, SLOW, NONE = 1 / 2000, 1 / 8000, 1 / 200, 1 / 100  # shares of the completions


def letters(prompts, completions, **columns):
  """Share of lower-case letters."""
  return [_score(prompt, text) for prompt, text in zip(prompts, completions)]


def _score(prompt, text):
  draw = int.from_bytes(hashlib.sha256(f"{prompt}\n{text}".encode()).digest()[:6]) / 2**48
  for share, happen in ((DIES, _die), (HANGS, _hang), (SLOW, _wait), (NONE, None)):
    draw -= share
    if draw < 0 and happen is None:
      return None
    if draw < 0:
      happen()
      break
  return sum(letter.isascii() and letter.islower() for letter in text) / max(len(text), 1)


def _die():
  os._exit(3)


def _hang():
  time.sleep(3600)


def _wait():
  time.sleep(0.02)
