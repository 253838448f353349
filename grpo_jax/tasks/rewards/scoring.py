"""Calls the reward functions of a task on a batch and checks what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from grpo_jax.tasks.base import Columns, Prompt, RewardFunction, Rewards

# The column with the completions' lengths in tokens. A function gets it only if it names it.
LENGTHS = "completion_lengths"
# Names that reward functions are called with: a column of a task must have another one.
RESERVED = (
  "prompts", "completions", LENGTHS, "completion_ids", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip
# Keyword arguments of a reward function: name -> one value per completion.
Arguments: TypeAlias = Mapping[str, list[Any]]
Result: TypeAlias = Sequence[float | None]


class RewardError(ValueError):
  """A reward function raised, or did not return one number per completion."""


# Squares of larger rewards, summed over a batch, leave float32.
LARGEST = 1e15


def score(
  rewards: Rewards,
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Columns,
  lengths: Sequence[Sequence[int]] | None = None,
) -> tuple[Float[np.ndarray, "P G"], dict[str, Float[np.ndarray, "P G"]]]:
  """Returns the weighted sum of the rewards that apply, `sum_i weight_i * reward_i`.

  Each function is called once, by keyword, with one value per completion: prompts and columns are
  repeated for their group. `async` functions run concurrently.

  Args:
    rewards: name -> (function, weight).
    prompts: [P], text or chat messages.
    completions: [P][G], text. All prompts have the same number of completions.
    columns: name -> [P], passed to the functions by name.
    lengths: [P][G], number of tokens of each completion. Passed as `completion_lengths` to the
      functions that have a parameter of that name.

  Returns:
    (total [P, G], name -> rewards [P, G]), float64. A function returns `None` or NaN where it does
    not apply, and is then left out of the sum. The total is NaN ("not scored") where no function
    with a non-zero weight applies.

  Raises:
    RewardError: a function raised, or did not return one finite number (or None) per completion.
      The message names the function and shows the completion.
    ValueError: the arguments are inconsistent.

  Example:
    >>> def short(prompts, completions, **columns):
    ...   return [1.0 if len(text) < 3 else None for text in completions]
    >>> score({"short": (short, 0.5)}, ["5 - 9 ="], [["-4", "minus four"]], {})[0]
    array([[0.5, nan]])
  """
  if not rewards:
    raise ValueError("rewards is empty: a task needs at least one reward function")
  for name, (_, weight) in rewards.items():
    if not math.isfinite(weight):
      raise ValueError(f"the weight of reward {name!r} is {weight}: it must be a finite number")
  shape = check_batch(prompts, completions, columns, lengths)
  if 0 in shape:
    return np.zeros(shape), {name: np.zeros(shape) for name in rewards}
  group = range(shape[1])
  arguments = {name: [value for value in values for _ in group] for name, values in columns.items()}
  arguments["prompts"] = [prompt for prompt in prompts for _ in group]
  arguments["completions"] = [text for texts in completions for text in texts]
  on_request = {} if lengths is None else {LENGTHS: [int(n) for row in lengths for n in row]}

  results = _call_all({name: f for name, (f, _) in rewards.items()}, arguments, on_request)
  per_name = {
    name: _to_numbers(_label(name, rewards[name][0]), result, arguments).reshape(shape)
    for name, result in results.items()
  }
  return weighted_sum(per_name, {name: weight for name, (_, weight) in rewards.items()}), per_name


def weighted_sum(
  per_name: Mapping[str, Float[np.ndarray, "P G"]], weights: Mapping[str, float]
) -> Float[np.ndarray, "P G"]:
  """Returns `sum_i weight_i * reward_i` over the rewards that apply, those that are not NaN.

  The sum is NaN where no reward with a non-zero weight applies.

  Example:
    >>> per_name = {"a": np.array([[1.0, np.nan]]), "b": np.array([[2.0, np.nan]])}
    >>> weighted_sum(per_name, {"a": 1.0, "b": 0.5})
    array([[ 2., nan]])
  """
  shape = next(iter(per_name.values())).shape
  total, scored = np.zeros(shape), np.zeros(shape, bool)
  for name, values in per_name.items():
    applies = ~np.isnan(values) & (weights[name] != 0)
    total += np.where(applies, weights[name] * np.where(applies, values, 0.0), 0.0)
    scored |= applies
  return np.where(scored, total, np.nan)


def check_batch(
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Columns,
  lengths: Sequence[Sequence[int]] | None = None,
) -> tuple[int, int]:
  """Returns (P, G) of the arguments of `score`; ValueError if they are inconsistent.

  Example:
    >>> check_batch(["1 + 1 =", "2 + 2 ="], [["2", "3"], ["4", "5"]], {"answer": [2, 4]})
    (2, 2)
  """
  if len(completions) != len(prompts):
    raise ValueError(f"{len(prompts)} prompts but {len(completions)} lists of completions")
  sizes = {len(texts) for texts in completions}
  if len(sizes) > 1:
    raise ValueError(f"every prompt needs the same number of completions, got {sorted(sizes)}")
  if lengths is not None and [len(row) for row in lengths] != [len(row) for row in completions]:
    raise ValueError("lengths must hold one number of tokens for each completion")
  for name, values in columns.items():
    if name in RESERVED:
      raise ValueError(f"a column must not be called {name!r}: reward functions use that name")
    if len(values) != len(prompts):
      raise ValueError(f"column {name!r} has {len(values)} values for {len(prompts)} prompts")
  return len(prompts), sizes.pop() if sizes else 0


def check_signature(
  name: str,
  function: RewardFunction,
  columns: Iterable[str],
  on_request: Collection[str] = (LENGTHS,),
) -> list[str]:
  """Returns the `on_request` columns that a reward function names in its signature.

  Args:
    name: of the reward, for the message.
    function: the reward function.
    columns: names of the arguments that every function is called with.
    on_request: names of the arguments that a function is called with only if it names them.

  Raises:
    RewardError: the function requires an argument that it would not be called with, or does not
      accept one of `columns`.

  Example:
    >>> def brief(completions, completion_lengths, **columns):
    ...   return [float(n < 10) for n in completion_lengths]
    >>> check_signature("brief", brief, ["prompts", "completions"])
    ['completion_lengths']
  """
  label, columns = _label(name, function), sorted(columns)
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):  # some callables written in C have no signature to inspect
    return []
  by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
  requested = [column for column in on_request if column in by_name]
  required = [n for n, p in by_name.items() if p.default is p.empty]
  if missing := [n for n in required if n not in (*columns, *requested)]:
    raise RewardError(
      f"{label} requires {', '.join(missing)}, which is not available. Available: "
      f"{', '.join(columns)}"
    )
  extra = sorted(set(columns) - set(by_name))
  if extra and not any(p.kind is p.VAR_KEYWORD for p in parameters):
    raise RewardError(
      f"{label} does not accept {', '.join(extra)}: end its parameters with **columns, as in "
      f"`def f(prompts, completions, **columns)`. Available: {', '.join(columns)}"
    )
  return requested


def show_completion(prompt: Prompt, completion: str) -> str:
  """Returns two lines of an error message with a prompt and its completion, long ones abridged.

  Example:
    >>> print(show_completion("5 - 9 =", "-4"))
      prompt:     '5 - 9 ='
      completion: '-4'
  """
  return f"  prompt:     {_abridged(prompt)}\n  completion: {_abridged(completion)}"


# --- calling the functions ------------------------------------------------------------------------


def _call_all(
  functions: Mapping[str, RewardFunction], arguments: Arguments, on_request: Arguments
) -> dict[str, Result]:
  """Calls plain functions one after another, then awaits the results of the async ones together."""
  called_with: dict[str, Arguments] = {}
  results: dict[str, Result] = {}
  pending: dict[str, Awaitable[Result]] = {}
  try:
    for name, function in functions.items():
      requested = check_signature(name, function, arguments, on_request)
      called_with[name] = {**arguments, **{column: on_request[column] for column in requested}}
      try:
        result = function(**called_with[name])
      except Exception as error:
        raise _failure(name, function, error, called_with[name]) from error
      results[name] = result
      if inspect.isawaitable(result):
        pending[name] = result
  except RewardError:
    for awaitable in pending.values():
      if inspect.iscoroutine(awaitable):
        awaitable.close()  # otherwise Python warns that it was never awaited
    raise
  if pending:
    for name, result in zip(pending, await_together(list(pending.values()))):
      if isinstance(result, Exception):
        raise _failure(name, functions[name], result, called_with[name]) from result
      results[name] = result
  return results


def await_together(awaitables: Sequence[Awaitable[Any]]) -> list[Any | BaseException]:
  """Returns the results, or exceptions, in order. Works inside a running event loop too.

  Example:
    >>> async def double(x):
    ...   return 2 * x
    >>> await_together([double(1), double(4)])
    [2, 8]
  """

  async def gather() -> list[Any | BaseException]:
    return await asyncio.gather(*awaitables, return_exceptions=True)

  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(gather())
  # A notebook has a running loop, in which asyncio.run raises: run another loop in a thread.
  results: list[Any | BaseException] = []
  thread = threading.Thread(target=lambda: results.extend(asyncio.run(gather())), daemon=True)
  thread.start()
  thread.join()
  return results


def _to_numbers(label: str, values: Any, arguments: Arguments) -> Float[np.ndarray, "B"]:
  """Returns the result of a reward function as float64, NaN for None; RewardError if it is bad."""
  count = len(arguments["completions"])
  if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
    raise RewardError(
      f"{label} returned {type(values).__name__} {_abridged(values)}: it must return a list with "
      f"one number (or None) per completion, here {count}\n{_show_at(arguments, 0)}"
    )
  values = list(values)
  if len(values) != count:
    raise RewardError(
      f"{label} returned {len(values)} values for {count} completions: it must return one number "
      f"(or None) for each\n{_show_at(arguments, min(len(values), count - 1))}"
    )
  out = np.full(count, np.nan)
  for i, value in enumerate(values):
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a zero-dimensional array
      value = value.item()
    if value is None:
      continue
    number = math.inf
    if isinstance(value, numbers.Real):
      try:
        number = float(value)
      except OverflowError:  # an integer beyond the range of floats: treat it as infinite
        number = math.inf
    if abs(number) > LARGEST:
      raise RewardError(
        f"{label} returned {type(value).__name__} {_abridged(value)} at position {i}: it must be a "
        f"finite number of at most {LARGEST:g} either way, or None where it does not apply\n"
        f"{_show_at(arguments, i)}"
      )
    out[i] = number
  return out


# --- error messages -------------------------------------------------------------------------------


def _failure(
  name: str, function: RewardFunction, error: Exception, arguments: Arguments
) -> RewardError:
  """Returns the error of a function that raised, with a completion that alone makes it raise."""

  def fails(start: int, stop: int) -> bool:
    try:
      result = function(**{column: values[start:stop] for column, values in arguments.items()})
      if inspect.isawaitable(result):
        return isinstance(await_together([result])[0], Exception)
      return False
    except Exception:
      return True

  start, stop = 0, len(arguments["completions"])
  while stop - start > 1:  # bisect: a reward function may be slow
    middle = (start + stop) // 2
    start, stop = (start, middle) if fails(start, middle) else (middle, stop)
  alone = fails(start, stop)
  note = "" if alone else "  (no completion raises it alone; this is the first)\n"
  return RewardError(
    f"{_label(name, function)} raised {type(error).__name__}: {error}\n{note}"
    + _show_at(arguments, start if alone else 0)
  )


def _label(name: str, function: RewardFunction) -> str:
  code = getattr(inspect.unwrap(function), "__code__", None)
  where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
  return f"reward function {name!r}{where}"


def _show_at(arguments: Arguments, i: int) -> str:
  return show_completion(arguments["prompts"][i], arguments["completions"][i])


def _abridged(value: object, width: int = 400) -> str:
  """Returns the repr of a value, without its middle if it is longer than `width` characters."""
  text = repr(value)
  if len(text) <= width:
    return text
  return f"{text[: width // 2]} ... {text[-width // 2 :]}"
