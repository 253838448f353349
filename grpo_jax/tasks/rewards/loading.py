"""Reward functions by name: a built-in one, 'module:function' or 'path/to/file.py:function'."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.tasks.base import RewardFunction, unknown
from grpo_jax.tasks.rewards.graders import ANSWERS, GRADERS, make_grader
from grpo_jax.tasks.rewards.scoring import RewardError, check_signature

Reward = str | Mapping[str, Any] | RewardFunction
"""A name, {"name": a built-in one, and its settings}, or the function itself."""
Rewards = dict[str, tuple[RewardFunction, float]]


def weighted(reward: Reward | Sequence[Reward], weights: Sequence[float] | None = None) -> Rewards:
  """name -> (function, weight) for one or several rewards; weights are 1.0 when not given.

  Raises ValueError for names that lead nowhere or appear twice, and for wrong numbers of weights.

  >>> {name: weight for name, (_, weight) in weighted(["numeric", "format"], [1, 0.1]).items()}
  {'numeric': 1.0, 'format': 0.1}
  """
  given = list(reward) if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
  if not given:
    raise ValueError("reward is empty: give a built-in grader's name, a function or 'file.py:name'")
  weights = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
  if len(weights) != len(given):
    raise ValueError(f"{len(weights)} weights for {len(given)} rewards: give one weight each")
  functions = [load_function(item) for item in given]
  names = [_name(item, function) for item, function in zip(given, functions)]
  if len(set(names)) < len(names):
    raise ValueError(f"two rewards have one name in {names}: metrics are told apart by the name")
  return {name: (f, weight) for name, f, weight in zip(names, functions, weights)}


def accuracy_of(
  rewards: Rewards, accuracy: Reward | None = None
) -> tuple[RewardFunction, Callable[[str], Hashable | None] | None]:
  """A task's `accuracy` and `answer`: those of a function that gives 1.0 to right answers.

  Without one, the first of the rewards decides. `answer` is None for a function not built in.
  """
  name, (first, _) = next(iter(rewards.items()))
  if accuracy is None:
    return ExactlyOne(first), ANSWERS.get(name)
  function = load_function(accuracy)
  return ExactlyOne(function), ANSWERS.get(_name(accuracy, function))


def load_function(reward: Reward) -> RewardFunction:
  """The function itself, or the one that a name stands for.

  Raises ValueError for a name that leads to no function, FileNotFoundError for a missing file.
  """
  if callable(reward):
    return reward
  if isinstance(reward, Mapping):
    if "name" not in reward:
      raise ValueError(f"a reward with settings needs a 'name' too, got {dict(reward)}")
    return make_grader(**reward)
  source, colon, name = str(reward).rpartition(":")
  if not colon:
    try:
      return make_grader(reward)
    except ValueError as error:
      raise ValueError(
        f"{error}. Or write 'path/to/file.py:function' or 'module:function'"
      ) from error
  if not source or not name:
    raise ValueError(
      f"{reward!r} does not name a function: write 'path/to/file.py:function' or 'module:function'"
    )
  try:
    module = _module_of_file(source) if source.endswith(".py") else importlib.import_module(source)
  except FileNotFoundError:
    raise
  except Exception as error:
    raise ValueError(f"{reward!r}: loading {source} raised {type(error).__name__}: {error}") from (
      error
    )
  function = getattr(module, name, None)
  if function is None:
    functions = [n for n, value in vars(module).items() if inspect.isroutine(value)]
    raise unknown(f"function in {source}", name, functions)
  if not callable(function):
    raise ValueError(f"{reward!r} is a {type(function).__name__}, not a function")
  return function


def check_columns(
  functions: Mapping[str, RewardFunction], columns: Iterable[str], where: str
) -> None:
  """Raises RewardError, naming the function, where one asks for a column that is not there."""
  given = ("prompts", "completions", *columns)
  for name, function in functions.items():
    try:
      check_signature(name, function, given)
    except RewardError as error:
      raise RewardError(f"{where}: {error}") from None


@dataclass(frozen=True)
class ExactlyOne:
  """An accuracy: 1.0 where `function` gives exactly 1.0, else 0.0; `async` where `function` is."""

  function: RewardFunction

  @property
  def __signature__(self) -> inspect.Signature:
    """What the function asks for, this asks for."""
    return inspect.signature(self.function)

  def __call__(self, **entries: Any) -> Any:
    values = self.function(**entries)
    if not inspect.isawaitable(values):
      return [float(value == 1) for value in values]

    async def later() -> list[float]:
      return [float(value == 1) for value in await values]

    return later()


def _module_of_file(path: str) -> Any:
  file = Path(path).resolve()
  if not file.is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  # The hash keeps two files of one name apart, and the module findable for pickle and dataclasses.
  name = f"_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def _name(reward: Reward, function: RewardFunction) -> str:
  """What metrics call it: a built-in one by the name it was asked for by."""
  if isinstance(reward, Mapping):
    return reward["name"]
  if reward in GRADERS:
    return reward
  inner = getattr(function, "func", function)  # functools.partial keeps its function there
  return getattr(inner, "__name__", type(inner).__name__)
