"""Lets a model try again after a wrong answer, and says that it was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_jax.environments.base import Observation, Step

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Example


@dataclass(frozen=True)
class Retries:
  """Makes environments that take several answers to one problem.

  Attributes:
    score: (answer, example) -> reward; 1.0 is a right answer and ends the episode.
    feedback: (answer, example) -> what the model reads after a wrong one.
    tries: answers in an episode. The reward of the episode is that of the last one.
    stop: strings that end an answer.
  """

  score: Callable[[str, Any], float]
  feedback: Callable[[str, Any], Observation]
  tries: int
  stop: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.tries < 2:
      raise ValueError(f"tries is {self.tries}: it must be at least 2")

  def __call__(self) -> RetryEnvironment:
    """Returns the environment of one episode."""
    return RetryEnvironment(self)


class RetryEnvironment:
  """Takes several answers to one problem.

  Example:
    >>> from grpo_jax.tasks.base import Example
    >>> def score(text, example):
    ...   return float(text.strip() == example.columns["answer"])
    >>> episode = Retries(score, lambda text, example: "Wrong.\\n3 + 4 =", tries=2)()
    >>> episode.reset(Example("3 + 4 =", {"answer": "7"}, "3 + 4"), seed=0)
    >>> episode.step(" 8").observation, episode.step(" 7").reward
    ('Wrong.\\n3 + 4 =', 1.0)
  """

  def __init__(self, retries: Retries) -> None:
    self._retries = retries

  def reset(self, example: Example, seed: int) -> None:
    """Takes the problem; the prompt is the example's own."""
    self._example, self._tries = example, 0

  def step(self, text: str) -> Step:
    """Scores an answer."""
    self._tries += 1
    reward = self._retries.score(text, self._example)
    if reward == 1.0 or self._tries == self._retries.tries:
      return Step("", reward, True, {"retries": self._tries - 1.0})
    return Step(self._retries.feedback(text, self._example), None, False)
