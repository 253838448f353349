"""Is slow at times: the environment of `turns`. Worker processes import this file, without jax."""

import time
from functools import partial
from typing import Any

import numpy as np

from grpo_jax.environments.base import Step
from grpo_jax.tasks.base import Example, Task


def stalls(seed: int, turns: int, share: float) -> np.ndarray:
  """Returns whether the environment with this seed is slow, for each turn."""
  return np.random.default_rng(seed).random(turns) < share


class Slow:
  """Says that it goes on, and is slow at times.

  Args:
    stall: seconds of a slow turn.
    share: share of the turns that are slow.
    turns: length of an episode.
  """

  def __init__(self, stall: float, share: float, turns: int) -> None:
    self._stall, self._share, self._turns, self._number = stall, share, turns, 0

  def reset(self, example: Example, seed: int) -> None:
    """Draws the slow turns of an episode, by the problem."""
    self._slow = stalls(example.columns["seed"], self._turns, self._share)

  def step(self, text: str) -> Step:
    """Answers a turn, possibly late."""
    if self._slow[self._number]:
      time.sleep(self._stall)
    self._number += 1
    return Step(" Go on.", 0.0, self._number == self._turns)


def slow_task(stall: float, share: float, turns: int) -> Task:
  """Returns a task of slow environments."""
  make = partial(Slow, stall, share, turns)
  return Task("slow", {}, {"none": (_none, 1.0)}, _none, environment=make)


def _none(completions: list[str], **columns: Any) -> list[float]:
  return [0.0] * len(completions)
