"""Loads reward functions by name: built in, 'module:function' or 'path/to/file.py:function'."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from grpo_jax.errors import with_frames
from grpo_jax.tasks.base import RewardFunction, Rewards, unknown_name
from grpo_jax.tasks.rewards.graders import ANSWERS, GRADERS, make_grader
from grpo_jax.tasks.rewards.scoring import (
  LARGEST,
  ON_REQUEST,
  RewardError,
  as_number,
  check_signature,
  inner_function,
  is_list,
)

# A name, {"name": a built-in reward, and its settings}, or the function itself.
Reward: TypeAlias = str | Mapping[str, Any] | RewardFunction
FORMS = ("text", "messages")  # forms of the completions that functions of the user get


def weighted(
  reward: Reward | Sequence[Reward],
  weights: Sequence[float] | None = None,
  completions: str = "text",
) -> Rewards:
  """Returns name -> (function, weight) for one or more rewards.

  Args:
    reward: one reward or a list of them.
    weights: one weight per reward; None: 1.0 each.
    completions: "messages" calls functions that are not built in as TRL calls them for chat data;
      see `WithMessages`.

  Raises:
    ValueError: a name does not lead to a function or occurs twice, or the number of weights is not
      the number of rewards.
    FileNotFoundError: the file of a function does not exist.

  Example:
    >>> {name: weight for name, (_, weight) in weighted(["numeric", "format"], [1, 0.1]).items()}
    {'numeric': 1.0, 'format': 0.1}
  """
  several = isinstance(reward, Sequence) and not isinstance(reward, str)
  rewards = list(reward) if several else [reward]
  if not rewards:
    raise ValueError("reward is empty: give a built-in grader's name, a function or 'file.py:name'")
  weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
  if len(weights) != len(rewards):
    raise ValueError(f"{len(weights)} weights for {len(rewards)} rewards: give one weight each")
  functions = [load_function(item) for item in rewards]
  functions = [in_form(item, f, completions) for item, f in zip(rewards, functions)]
  names = [_metric_name(item, function) for item, function in zip(rewards, functions)]
  if len(set(names)) < len(names):
    raise ValueError(f"two rewards have the same name in {names}: metrics are recorded by name")
  return {name: (f, weight) for name, f, weight in zip(names, functions, weights)}


def accuracy_of(
  rewards: Rewards, accuracy: Reward | None = None, completions: str = "text"
) -> tuple[RewardFunction, Callable[[str], Hashable | None] | None]:
  """Returns a task's `accuracy` and `answer`.

  Args:
    rewards: the task's rewards.
    accuracy: the function that returns exactly 1.0 for a correct answer. None: the first reward.
    completions: as in `weighted`.

  Returns:
    The accuracy function, and a function that extracts the answer from a completion; None for the
    latter if the accuracy function is not a built-in grader.

  Example:
    >>> accuracy, answer = accuracy_of(weighted("numeric"))
    >>> accuracy(completions=["It is 18.", "17"], answer=[18, 18]), str(answer("It is 18."))
    ([1.0, 0.0], '18')
  """
  name, (first, _) = next(iter(rewards.items()))
  if accuracy is None:
    return ExactlyOne(first), ANSWERS.get(name)
  function = in_form(accuracy, load_function(accuracy), completions)
  return ExactlyOne(function), ANSWERS.get(_metric_name(accuracy, function))


def files_of(rewards: Reward | Sequence[Reward | None] | None) -> tuple[str, ...]:
  """Returns the Python files that the functions of rewards are in, without repetitions.

  Built-in rewards and functions of modules do not count.

  Example:
    >>> files_of(["my_task/reward.py:score", "exact", {"name": "length", "target": 20}])
    ('my_task/reward.py',)
  """
  if isinstance(rewards, Mapping):
    rewards = list(rewards.values())
  if isinstance(rewards, list | tuple):
    return tuple(dict.fromkeys(file for reward in rewards for file in files_of(reward)))
  if callable(rewards):
    source = inspect.getsourcefile(rewards) if inspect.isfunction(rewards) else None
    return (source,) if source else ()
  source, colon, _ = str(rewards).rpartition(":")
  return (source,) if colon and source.endswith(".py") else ()


def load_function(reward: Reward) -> RewardFunction:
  """Returns the reward function that a name stands for; a function is returned as it is.

  Raises:
    ValueError: the name does not lead to a function.
    FileNotFoundError: the file does not exist.

  Example:
    >>> load_function("numeric")(completions=["It is 18."], answer=["18"])
    [1.0]
  """
  if callable(reward):
    return reward
  if isinstance(reward, Mapping):
    if "name" not in reward:
      raise ValueError(f"a reward with settings needs a 'name' too, got {dict(reward)}")
    return make_grader(**reward)
  if ":" not in str(reward):
    try:
      return make_grader(reward)
    except ValueError as error:
      raise ValueError(
        f"{error}. Or write 'path/to/file.py:function' or 'module:function'"
      ) from error
  return load_object(reward, "function")


def load_object(name: str | Callable[..., Any], kind: str, known: Iterable[str] = ()) -> Any:
  """Returns what 'path/to/file.py:name' or 'module:name' stands for; a callable stands for itself.

  Args:
    name: the name.
    kind: what it should be, such as "function", for messages.
    known: names that the caller knows besides, for messages.

  Raises:
    ValueError: the name does not lead to a callable.
    FileNotFoundError: the file does not exist.

  Example:
    >>> load_object("json:dumps", "function")([1])
    '[1]'
  """
  if callable(name):
    return name
  source, colon, attribute = str(name).rpartition(":")
  a_kind = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
  if not colon and known:
    raise ValueError(
      f"{unknown_name(kind, name, known)}. Or write 'path/to/file.py:{kind}' or 'module:{kind}'"
    )
  if not source or not attribute:
    raise ValueError(
      f"{name!r} does not name {a_kind}: write 'path/to/file.py:{kind}' or 'module:{kind}'"
    )
  try:
    module = _load_file(source) if source.endswith(".py") else importlib.import_module(source)
  except (FileNotFoundError, KeyboardInterrupt):
    raise
  except BaseException as error:  # a file may also end the process
    raise ValueError(f"{name!r}: loading {source} raised {with_frames(error)}") from error
  loaded = getattr(module, attribute, None)
  if loaded is None:
    names = [n for n, value in vars(module).items() if inspect.isroutine(value)]
    if kind != "function":
      names += [n for n, value in vars(module).items() if inspect.isclass(value)]
    raise unknown_name(f"{kind} in {source}", attribute, names)
  if not callable(loaded):
    raise ValueError(f"{name!r} is of type {type(loaded).__name__}, not {a_kind}")
  return loaded


def check_columns(
  functions: Mapping[str, RewardFunction], columns: Iterable[str], where: str
) -> None:
  """Raises RewardError if a reward function requires a column that does not exist.

  Args:
    functions: reward functions by name.
    columns: names of the columns that exist.
    where: the file or task with the columns, for the message.

  Example:
    >>> check_columns({"numeric": load_function("numeric")}, ["answer"], "questions.jsonl")
  """
  available = ("prompts", "completions", *columns)
  for name, function in functions.items():
    try:
      check_signature(name, function, available)
    except RewardError as error:
      raise RewardError(f"{where}: {error}") from None


@dataclass(frozen=True)
class ExactlyOne:
  """An accuracy function: 1.0 where `function` returns exactly 1.0, otherwise 0.0.

  What is not a list of numbers is returned as it is, and refused where it is scored. It is `async`
  if `function` is.
  """

  function: RewardFunction

  @property
  def __signature__(self) -> inspect.Signature:
    """Returns the signature of `function`, so that both require the same columns."""
    return inspect.signature(self.function)

  @property
  def __wrapped__(self) -> RewardFunction:
    """Returns the function itself, as `inspect.unwrap` finds it."""
    return self.function

  def __call__(self, /, **columns: Any) -> list[Any] | Awaitable[list[Any]]:
    values = self.function(**columns)
    if not inspect.isawaitable(values):
      return _exactly_one(values)

    async def await_values() -> list[Any]:
      return _exactly_one(await values)

    return await_values()


def _exactly_one(values: Any) -> Any:
  if not is_list(values):
    return values
  numbers = [(value, as_number(value)) for value in values]
  return [
    value if number is None or abs(number) > LARGEST else float(number == 1)
    for value, number in numbers
  ]


@dataclass(frozen=True)
class WithMessages:
  """A reward function that is called as TRL calls it for chat data.

  Each completion is a list with one message, `[{"role": "assistant", "content": text}]`. A function
  that ends its parameters with `**` gets the arguments of `scoring.ON_REQUEST` without naming them.

  Example:
    >>> def brief(completions, **columns):
    ...   return [float(len(completion[0]["content"]) < 3) for completion in completions]
    >>> WithMessages(brief)(completions=["-4", "minus four"])
    [1.0, 0.0]
  """

  function: RewardFunction

  @property
  def __signature__(self) -> inspect.Signature:
    """Returns the signature of `function`, with the arguments that it takes by `**`."""
    signature = inspect.signature(self.function)
    *others, last = signature.parameters.values() or [None]
    if last is None or last.kind is not last.VAR_KEYWORD:
      return signature
    names = [name for name in ON_REQUEST if name not in signature.parameters]
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    return signature.replace(parameters=[*others, *more, last])

  @property
  def __wrapped__(self) -> RewardFunction:
    """Returns the function itself, as `inspect.unwrap` finds it."""
    return self.function

  def __call__(self, completions: Sequence[str], **columns: Any) -> Any:
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    return self.function(completions=messages, **columns)


def in_form(reward: Reward, function: RewardFunction, completions: str) -> RewardFunction:
  """Returns a function that gets completions in a form of `FORMS`; built-in ones always get text.

  Args:
    reward: as the user gave it.
    function: the function it stands for.
    completions: "text" or "messages".
  """
  if completions not in FORMS:
    raise ValueError(f"completions is {completions!r}: it must be 'text' or 'messages'")
  built_in = isinstance(reward, Mapping) or (isinstance(reward, str) and ":" not in reward)
  return function if built_in or completions == "text" else WithMessages(function)


def _load_file(path: str) -> ModuleType:
  file = Path(path).resolve()
  if not file.is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  # The hash tells files with the same name apart. pickle and dataclasses look the module up by it.
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


def _metric_name(reward: Reward, function: RewardFunction) -> str:
  """Returns the name of a reward in metrics; a built-in one keeps the name it was loaded by."""
  if isinstance(reward, Mapping):
    return reward["name"]
  if isinstance(reward, str) and reward in GRADERS:
    return reward
  inner = inner_function(function)
  return getattr(inner, "__name__", type(inner).__name__)
