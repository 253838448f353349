"""Rewards completions for `soak.py`, and at times kills its process, hangs, or is slow.

What happens follows from the text of the completion alone, so that a run can be repeated.
"""

import hashlib
import os
import time

# Shares of the completions that kill the process, hang, are slow, and get no reward.
KILLS, HANGS, SLOW, NONE = 1 / 2000, 1 / 8000, 1 / 200, 1 / 100


def letters(prompts, completions, **columns):
  """Returns the share of lower-case letters."""
  return [_score(prompt, text) for prompt, text in zip(prompts, completions)]


def _score(prompt, text):
  draw = int.from_bytes(hashlib.sha256(f"{prompt}\n{text}".encode()).digest()[:6]) / 2**48
  for share, action in ((KILLS, _exit), (HANGS, _hang), (SLOW, _wait), (NONE, None)):
    draw -= share
    if draw < 0 and action is None:
      return None
    if draw < 0:
      action()
      break
  return sum(letter.isascii() and letter.islower() for letter in text) / max(len(text), 1)


def _exit():
  os._exit(3)


def _hang():
  time.sleep(3600)


def _wait():
  time.sleep(0.02)
