"""Defines a task: where its examples come from, how a prompt looks and how an answer is scored.

A task is plain Python on the host and never touches the device.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import numbers
import os
import sys
import types
import typing
from collections.abc import (
  Awaitable,
  Callable,
  Hashable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
  from grpo_jax.environments.base import Environment

# Text, or chat messages such as {"role": "user", "content": "..."}.
Prompt: TypeAlias = str | list[dict[str, str]]
# Column name -> one value per prompt. A value may be anything that the task's data holds.
Columns: TypeAlias = Mapping[str, Sequence[Any]]
# `f(prompts=..., completions=..., **columns) -> list[float | None]`; it may be async.
RewardFunction: TypeAlias = Callable[
  ..., Sequence[float | None] | Awaitable[Sequence[float | None]]
]
# Name -> (function, weight).
Rewards: TypeAlias = Mapping[str, tuple[RewardFunction, float]]
# Called in the same way. Returns the steps of each completion, in order, as (end, reward); `end` is
# the number of characters of the completion up to and including the step.
StepRewards: TypeAlias = Callable[..., Sequence[Sequence[tuple[int, float]]]]


@dataclass(frozen=True)
class Example:
  """One problem.

  Attributes:
    prompt: text, or chat messages.
    columns: what the reward functions need to know, such as the right answer, by name.
    key: identifies the problem, independent of its wording (`"3 + 4"` for a sum). No key is in both
      the training and the evaluation split.
    row: the row of a data file that it is made of, from which its task makes it again; None for a
      problem that is not from a file. It does not count in comparisons.
  """

  prompt: Prompt
  columns: Mapping[str, Any]
  key: str
  row: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
  """Examples, and how the completions of their prompts are scored.

  Attributes:
    name: appears in messages.
    splits: examples by split, "train" and "eval".
    rewards: name -> (function, weight).
    accuracy: a reward function that returns exactly 1.0 for a correct answer.
    stop: strings that end the generation.
    answer: extracts the answer from a completion, None if there is none. Evaluation takes a
      majority vote over these answers.
    step_rewards: rewards the steps of a completion, for algorithms with process rewards.
    files: files of the data and the reward functions; a continued run needs the same contents.
    canary: a wrong answer that is scored after each batch; its rewards must never change.
    foreign: the rewards are other people's code, which runs in worker processes only.
    environment: makes the environment of one episode; None: a completion is a single turn.
    turns: that an episode may take; 0 if the task does not limit it.
    tools: JSON schemas of the tools that the chat template shows the model.
    note: shown at the start of a run, such as how code is isolated.
  """

  name: str
  splits: Mapping[str, Sequence[Example]]
  rewards: Rewards
  accuracy: RewardFunction
  stop: tuple[str, ...] = ()
  answer: Callable[[str], Hashable | None] | None = None
  step_rewards: StepRewards | None = None
  files: tuple[str, ...] = ()
  canary: str = ""
  foreign: bool = False
  environment: Callable[[], Environment] | None = None
  turns: int = 0
  tools: tuple[dict[str, Any], ...] = ()
  note: str = ""


def unknown_name(kind: str, name: object, names: Iterable[str]) -> ValueError:
  """Returns the error for a name that is not in a table, with close matches and all valid names.

  A table of more than 40 names is listed only if it has no close match.

  Args:
    kind: what the name stands for, such as "reward".
    name: the unknown name.
    names: the valid names.

  Example:
    >>> print(unknown_name("reward", "exactt", ["exact", "score"]))
    unknown reward 'exactt': did you mean 'exact'? Known (2): exact, score
  """
  names = sorted(names)
  close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
  hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
  if close and len(names) > 40:
    return ValueError(f"unknown {kind} {name!r}{hint} ({len(names)} are known)")
  return ValueError(f"unknown {kind} {name!r}{hint} Known ({len(names)}): {', '.join(names)}")


def check_settings(kind: str, function: Callable[..., object], settings: Iterable[str]) -> None:
  """Raises ValueError unless `function` takes these keyword arguments and needs no others.

  Args:
    kind: what has the settings, for the message, such as "task 'letters'".
    function: is called with the settings later.
    settings: names of the settings; if a mapping, the values are held to the annotations.

  Example:
    >>> check_settings("task 'plus'", lambda a, b=1: a + b, ["b"])
    Traceback (most recent call last):
    ValueError: task 'plus' needs the setting 'a', which was not given
  """
  parameters = inspect.signature(function).parameters
  for name in settings:
    if name not in parameters:
      raise unknown_name(f"setting of {kind}", name, parameters)
  for name, parameter in parameters.items():
    if parameter.default is parameter.empty and name not in settings:
      raise ValueError(f"{kind} needs the setting {name!r}, which was not given")
  if isinstance(settings, Mapping):
    try:
      annotations = typing.get_type_hints(function)
    except (NameError, TypeError):  # types that are imported for type checkers only; no function
      return
    for name, value in settings.items():
      if not _fits(value, annotations.get(name, Any)):
        allowed = " or ".join(dict.fromkeys(_words(annotations[name])))
        raise ValueError(f"the setting {name!r} of {kind} is {value!r:.200}: it must be {allowed}")


_WORDS = {
  bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
  type(None): "none",
}  # fmt: skip
_LARGEST = 2**63 - 1  # of a whole number in the settings of a task


def _fits(value: Any, annotation: Any) -> bool:
  """Returns whether a value has a type; of the types that settings have, others fit any value."""
  if annotation is Any:
    return True
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, argument) for argument in arguments)
  if annotation is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and (
      abs(value) <= _LARGEST
    )  # fmt: skip
  if annotation is float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max
  if origin is collections.abc.Mapping:
    return isinstance(value, Mapping) and all(
      _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
    )
  if origin in (collections.abc.Sequence, list, tuple):
    if isinstance(value, str):  # one string, where a list of strings is allowed
      return arguments[0] is str
    return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
  if origin is collections.abc.Callable:
    return callable(value)
  if annotation is str:
    return isinstance(value, str | os.PathLike)
  return not isinstance(annotation, type) or isinstance(value, annotation)


def _words(annotation: Any) -> Iterator[str]:
  """Yields the types that an annotation allows, in words."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    for argument in arguments:
      yield from _words(argument)
  elif origin in (collections.abc.Sequence, list, tuple):
    yield f"a list whose entries are {' or '.join(_words(arguments[0]))}"
  elif origin is collections.abc.Mapping:
    yield "a table of names and values"
  elif origin is collections.abc.Callable:
    yield "a function"
  else:
    yield _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


_MOVED_TO_SCORING = (
  "RewardError", "check_batch", "check_signature", "score", "weighted_sum",
)  # fmt: skip


def __getattr__(name: str) -> Any:
  """Returns a name that has moved to `rewards/scoring.py`, so that old imports keep working."""
  from grpo_jax.tasks.rewards import scoring

  if name in _MOVED_TO_SCORING:
    return getattr(scoring, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
