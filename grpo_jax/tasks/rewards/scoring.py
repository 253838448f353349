"""Calls the reward functions of a task on a batch and checks what they return."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import numbers
import threading
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from grpo_jax.errors import with_frames
from grpo_jax.tasks.base import Columns, Prompt, RewardFunction, Rewards
from grpo_jax.tasks.rewards.logs import Logs, TrainerState

# Arguments that a function gets only if it names them. The first two have one value per completion:
# its length in tokens, and its token ids.
LENGTHS, IDS = "completion_lengths", "completion_ids"
STEP = "step"  # number of finished steps; a column of that name comes first
ON_REQUEST = (LENGTHS, IDS, "trainer_state", STEP, "log_extra", "log_metric")
# Names of arguments, which a column must not have.
RESERVED = ("prompts", "completions", *(name for name in ON_REQUEST if name != STEP))
# Keyword arguments of a reward function: name -> one value per completion.
Arguments: TypeAlias = Mapping[str, list[Any]]
Result: TypeAlias = Sequence[float | None]


class RewardError(ValueError):
  """A reward function raised, or did not return one number per completion."""


# Squares of larger rewards, summed over a batch, leave float32.
LARGEST = 1e15
BISECT_SECONDS = 5.0  # time limit in seconds for finding the completion that makes a function raise


def score(
  rewards: Rewards,
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Columns,
  lengths: Sequence[Sequence[int]] | None = None,
  *,
  ids: Sequence[Sequence[Sequence[int]]] | None = None,
  state: TrainerState | None = None,
  logs: Logs | None = None,
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
      functions that have a parameter of that name; the next three are passed in the same way.
    ids: [P][G], token ids of each completion, `completion_ids`.
    state: `trainer_state`, and its number of finished steps, `step`; None is that of step 0.
    logs: collects what the functions log with `log_extra` and `log_metric`; None drops it.

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
  shape = check_batch(prompts, completions, columns, lengths, ids)
  if 0 in shape:
    return np.zeros(shape), {name: np.zeros(shape) for name in rewards}
  group = range(shape[1])
  arguments = {name: [value for value in values for _ in group] for name, values in columns.items()}
  arguments["prompts"] = [prompt for prompt in prompts for _ in group]
  arguments["completions"] = [text for texts in completions for text in texts]
  on_request: dict[str, list[Any]] = {}
  if lengths is not None:
    on_request[LENGTHS] = [int(n) for row in lengths for n in row]
  if ids is not None:
    on_request[IDS] = [[int(i) for i in tokens] for row in ids for tokens in row]

  state, logs = state or TrainerState(), logs or Logs(shape[0] * shape[1])
  calls = {
    name: _Call(name, function, arguments, on_request, state)
    for name, (function, _) in rewards.items()
  }
  results = _call_all(calls, logs)
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
  ids: Sequence[Sequence[Sequence[int]]] | None = None,
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
  if ids is not None and [len(row) for row in ids] != [len(row) for row in completions]:
    raise ValueError("ids must hold the token ids of each completion")
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
  on_request: Collection[str] = ON_REQUEST,
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
    hint = ""
    if "environments" in missing:  # as in TRL
      hint = ". Instead of reading environments, give the environment a method get_reward"
    raise RewardError(
      f"{label} requires {', '.join(missing)}, which is not available. Available: "
      f"{', '.join(columns)}{hint}"
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


@dataclasses.dataclass(frozen=True)
class _Call:
  """A reward function and its arguments: by name, one value per completion, or a shared one."""

  name: str
  function: RewardFunction
  arguments: Arguments
  on_request: Arguments
  state: TrainerState

  def __call__(self, logs: Logs, rows: slice = slice(None)) -> Any:
    """Calls the function on these completions and returns its result, which may be awaitable."""
    shared = {
      "trainer_state": self.state, STEP: self.state.global_step,
      "log_extra": logs.log_extra, "log_metric": logs.log_metric,
    }  # fmt: skip
    available = [name for name in (*self.on_request, *shared) if name not in self.arguments]
    requested = check_signature(self.name, self.function, self.arguments, available)
    values = {name: column[rows] for name, column in self.arguments.items()}
    for name in requested:
      values[name] = shared[name] if name in shared else self.on_request[name][rows]
    return self.function(**values)

  def fails(self, start: int, stop: int) -> bool:
    """Tells whether the function raises on the completions from `start` to `stop`."""
    try:
      result = self(Logs(stop - start), slice(start, stop))
      return inspect.isawaitable(result) and isinstance(await_together([result])[0], Exception)
    except Exception:
      return True


def _call_all(calls: Mapping[str, _Call], logs: Logs) -> dict[str, Result]:
  """Calls plain functions one after another, then awaits the results of the async ones together."""
  results: dict[str, Result] = {}
  pending: dict[str, Awaitable[Result]] = {}
  try:
    for name, call in calls.items():
      try:
        results[name] = call(logs)
      except RewardError:
        raise
      except Exception as error:
        raise _failure(call, error) from error
      if inspect.isawaitable(results[name]):
        pending[name] = results[name]
  except RewardError:
    for awaitable in pending.values():
      if inspect.iscoroutine(awaitable):
        awaitable.close()  # otherwise Python warns that it was never awaited
    raise
  if pending:
    for name, result in zip(pending, await_together(list(pending.values()))):
      if isinstance(result, Exception):
        raise _failure(calls[name], result) from result
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
  expected = f"it must return a list with one number (or None) per completion, here {count}"
  if (shape := getattr(values, "shape", None)) is not None and len(shape) != 1:
    raise RewardError(
      f"{label} returned an array of shape {tuple(shape)}: {expected}\n{_show_at(arguments, 0)}"
    )
  if not is_list(values):
    raise RewardError(
      f"{label} returned {type(values).__name__} {_abridged(values)}: {expected}\n"
      f"{_show_at(arguments, 0)}"
    )
  values = list(values)
  if len(values) != count:
    raise RewardError(
      f"{label} returned {len(values)} values for {count} completions: {expected}\n"
      f"{_show_at(arguments, min(len(values), count - 1))}"
    )
  out = np.full(count, np.nan)
  for i, value in enumerate(values):
    number = as_number(value)
    if number is None or abs(number) > LARGEST:
      raise RewardError(
        f"{label} returned {type(value).__name__} {_abridged(value)} at position {i}: it must be a "
        f"finite number of at most {LARGEST:g} either way, or None where it does not apply\n"
        f"{_show_at(arguments, i)}"
      )
    out[i] = number
  return out


def is_list(values: Any) -> bool:
  """Tells whether a result is a list, a tuple, or another sequence or array of one dimension."""
  if isinstance(values, str | bytes | bytearray | memoryview):
    return False
  return isinstance(values, Sequence) or len(getattr(values, "shape", ())) == 1


def as_number(value: Any) -> float | None:
  """Returns a reward as a float, NaN for None; None if it is not a number.

  Example:
    >>> as_number(True), as_number(np.float32(0.5)), as_number(None), as_number("1.0")
    (1.0, 0.5, nan, None)
  """
  if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a zero-dimensional array
    value = value.item()
  if value is None:
    return math.nan
  if not isinstance(value, numbers.Real):
    return None
  try:
    return float(value)
  except OverflowError:  # an integer beyond the range of floats: treat it as infinite
    return math.inf


# --- error messages -------------------------------------------------------------------------------


def _failure(call: _Call, error: Exception) -> RewardError:
  """Returns the error of a function that raised, with a completion that alone makes it raise."""
  count = len(call.arguments["completions"])
  start, stop, deadline = 0, count, time.monotonic() + BISECT_SECONDS
  while stop - start > 1 and time.monotonic() < deadline:  # bisect: a function may be slow
    middle = (start + stop) // 2
    start, stop = (start, middle) if call.fails(start, middle) else (middle, stop)
  note = ""
  if stop - start > 1:
    note = f"  (one of {stop - start} completions raises it; this is the first of them)\n"
  elif count > 1 and not call.fails(start, stop):
    start, note = 0, "  (no completion raises it alone; this is the first)\n"
  if isinstance(error, KeyError) and error.args and error.args[0] in ON_REQUEST:
    name = error.args[0]
    note += f"  ({name} is passed to functions that name it: `def f(completions, {name}, **_)`)\n"
  return RewardError(
    f"reward function {call.name!r} raised {with_frames(error)}\n{note}"
    + _show_at(call.arguments, start)
  )


def _label(name: str, function: RewardFunction) -> str:
  code = getattr(inner_function(function), "__code__", None)
  where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
  return f"reward function {name!r}{where}"


def inner_function(function: RewardFunction) -> RewardFunction:
  """Returns the function inside wrappers and `functools.partial` objects."""
  while callable(inner := getattr(function := inspect.unwrap(function), "func", None)):
    function = inner
  return function


def _show_at(arguments: Arguments, i: int) -> str:
  return show_completion(arguments["prompts"][i], arguments["completions"][i])


def _abridged(value: object, width: int = 400) -> str:
  """Returns the repr of a value, without its middle if it is longer than `width` characters."""
  try:
    text = repr(value)
  except Exception:  # such as an integer of more digits than Python converts
    text = "that cannot be shown"
  if len(text) <= width:
    return text
  return f"{text[: width // 2]} ... {text[-width // 2 :]}"
