"""Defines an environment: what an episode of several turns talks to.

An environment is plain Python on the host and holds the state of one completion's episode. The
policy writes a turn, `step` gets its text and returns what the policy reads next. `workers.py` runs
environments; `tools.py` has the one that calls tools.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Example, Prompt

# Text, or chat messages such as {"role": "tool", "content": "..."}.
Observation: TypeAlias = str | list[dict[str, Any]]
Key: TypeAlias = tuple[int, int]  # (p, g): number of the prompt, number of the completion
OBSERVATION_LENGTH = 1_000_000  # characters; a longer observation fails its episode


class EnvironmentFault(Exception):
  """Says what is wrong with an environment; it costs the episode."""


@dataclass(frozen=True)
class Step:
  """Holds the answer of an environment to a turn.

  Attributes:
    observation: what the policy reads next; may be empty.
    reward: of this turn, in reward units; None = not scored here. The rewards of an episode are
      summed and added to those of the task's reward functions, which read its last turn.
    done: whether the episode is over.
    metrics: name -> number. A run logs the sum over an episode, averaged over episodes.
  """

  observation: Observation
  reward: float | None = None
  done: bool = False
  metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
  """Holds the state of one episode. It must not vary, given the example, the seed and the texts.

  It may also have

  - `finish() -> float | None`, called if the episode runs out of its budget of turns or tokens: a
    last reward, for its last turn;
  - `close()`, called when the episode is over, however it ends.

  A factory of environments may have `prepare()`. It is called once in each worker process before
  network, writing and starting of programs are taken away from it.
  """

  def reset(self, example: Example, seed: int) -> Prompt | None:
    """Starts the episode and returns its prompt; None stands for the example's own.

    All completions of a group get the same example and seed, and must return the same prompt. An
    environment without chance may leave out the parameter `seed`.
    """

  def step(self, text: str) -> Step | tuple[Observation, float | None, bool]:
    """Takes the text of a turn; returns a `Step`, or (observation, reward, done)."""


@dataclass(frozen=True)
class Outcome:
  """Reports one step of one episode, as a runner returns it.

  Attributes:
    observation, reward, done, metrics: as in `Step`.
    failure: None, or why the environment failed. The episode is then over and not scored.
  """

  observation: Observation
  reward: float | None
  done: bool
  failure: str | None = None
  metrics: Mapping[str, float] = field(default_factory=dict)


class EnvironmentRunner(Protocol):
  """Runs the environments of a batch of episodes, numbered (prompt, completion)."""

  def reset(
    self, examples: Sequence[Example], group: int, seeds: Sequence[int]
  ) -> list[Prompt | None]:
    """Starts `group` episodes of each example and returns one prompt per example.

    Episodes that were still going on are closed. An episode whose environment fails here reports
    it at its first step; the prompt is that of the others of its group.

    Raises:
      EnvironmentFault: the prompts of a group differ.
    """

  def begin(
    self, examples: Sequence[Example], group: int, seeds: Sequence[int], numbers: Sequence[int]
  ) -> list[Prompt | None]:
    """Does the same beside the episodes that are going on.

    Args:
      numbers: of the prompts; no episode that is going on has them.
    """

  def forget(self, prompts: Collection[int]) -> None:
    """Drops episodes that are over, by the numbers of their prompts."""

  def submit(self, texts: Mapping[Key, str], finish: Collection[Key] = ()) -> None:
    """Begins to pass on the text of a turn of some episodes; the others wait.

    Args:
      finish: episodes that ran out of their budget, to be ended. Their outcome has the last reward.
    """

  def answers(self, timeout: float | None = None) -> dict[Key, Outcome]:
    """Returns the outcomes that have come since the last call.

    Args:
      timeout: how long to wait for the first one, in seconds; None waits until it is there. There
        is none if nothing is under way.
    """

  def close(self) -> None:
    """Ends everything. A later `reset` starts again."""


def failed(reason: str) -> Outcome:
  """Returns the outcome of a step whose environment failed.

  Example:
    >>> failed("step raised KeyError: 3").done
    True
  """
  return Outcome("", None, True, reason)


def checked_step(result: object) -> Step:
  """Returns what `step` of an environment returned as a `Step`.

  Raises:
    EnvironmentFault: it is something else; the message says what is allowed.

  Example:
    >>> checked_step(("Higher", 0, False))
    Step(observation='Higher', reward=0.0, done=False, metrics={})
    >>> checked_step(("Higher", "0", False))
    Traceback (most recent call last):
    grpo_jax.environments.base.EnvironmentFault: step returned the reward '0' (str): it must be ...
  """
  if isinstance(result, Step):
    observation, reward, done = result.observation, result.reward, result.done
    metrics = result.metrics
  elif isinstance(result, tuple) and len(result) == 3:
    (observation, reward, done), metrics = result, {}
  else:
    what = f"a tuple of {len(result)}" if isinstance(result, tuple) else _shown(result)
    raise EnvironmentFault(
      f"step returned {what}: it must return a Step, or a tuple (observation, reward, done)"
    )
  if not isinstance(done, bool) and type(done).__name__ not in ("bool_", "bool"):
    raise EnvironmentFault(f"step returned done={_shown(done)}: it must be True or False")
  done = bool(done)
  observation = checked_observation(observation, "step returned the observation")
  return Step(observation, checked_reward(reward, "step"), done, _checked_metrics(metrics))


def checked_reward(reward: object, method: str) -> float | None:
  """Returns a reward as a float; None stays.

  Raises:
    EnvironmentFault: it is not a finite number. The message names `method`, which returned it.

  Example:
    >>> checked_reward(True, "step"), checked_reward(None, "step")
    (1.0, None)
  """
  from grpo_jax.tasks.rewards.scoring import LARGEST  # lazy: tasks import this module

  if getattr(reward, "ndim", None) == 0 and hasattr(reward, "item"):  # a zero-dimensional array
    reward = reward.item()
  if reward is None:
    return None
  if isinstance(reward, numbers.Real):
    try:
      number = float(reward)
    except OverflowError:
      number = math.inf
    if abs(number) <= LARGEST:
      return number
  raise EnvironmentFault(
    f"{method} returned the reward {_shown(reward)}: it must be a finite number of at most "
    f"{LARGEST:g} either way, or None"
  )


def checked_observation(observation: object, what: str) -> Observation:
  """Returns text or chat messages that can be encoded.

  Args:
    what: starts the error message, such as "step returned the observation".

  Raises:
    EnvironmentFault: it is something else, or longer than `OBSERVATION_LENGTH`.

  Example:
    >>> checked_observation([{"role": "tool", "content": "84"}], "it returned")
    [{'role': 'tool', 'content': '84'}]
  """
  is_messages = isinstance(observation, list) and all(map(_is_message, observation))
  if not isinstance(observation, str) and not is_messages:
    raise EnvironmentFault(
      f"{what} {_shown(observation)}: it must be text, or a list of chat messages such as "
      '{"role": "tool", "content": "..."}'
    )
  try:
    written = json.dumps(observation)
  except (TypeError, ValueError, RecursionError) as error:
    raise EnvironmentFault(f"{what} {_shown(observation)}: not plain data: {error}") from None
  length = len(observation if isinstance(observation, str) else written)
  if length > OBSERVATION_LENGTH:
    raise EnvironmentFault(
      f"{what} of {length:,} characters: at most {OBSERVATION_LENGTH:,} are allowed"
    )
  # Half of a surrogate pair is not text: no tokenizer encodes it.
  return _encodable(json.loads(written))


def _is_message(message: object) -> bool:
  return isinstance(message, dict) and all(
    isinstance(message.get(name), str) for name in ("role", "content")
  )


def _encodable(value: Any) -> Any:
  if isinstance(value, str):
    return value.encode("utf-8", "replace").decode("utf-8")
  if isinstance(value, list):
    return [_encodable(item) for item in value]
  if isinstance(value, dict):
    return {_encodable(name): _encodable(item) for name, item in value.items()}
  return value


def _checked_metrics(metrics: object) -> dict[str, float]:
  if isinstance(metrics, Mapping) and all(isinstance(name, str) for name in metrics):
    try:
      numbers_ = {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError):
      numbers_ = {"": math.nan}
    if all(math.isfinite(value) for value in numbers_.values()):
      return numbers_
  raise EnvironmentFault(f"step returned metrics={_shown(metrics)}: it must be name -> number")


def _shown(value: object) -> str:
  """Returns the value, abridged, and its type, for a message."""
  try:
    text = repr(value)
  except Exception:
    text = "something"
  if len(text) > 120:
    text = f"{text[:60]} ... {text[-60:]}"
  return f"{text} ({type(value).__name__})"
