"""How the reward functions of a task are called, and what their mistakes look like."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from grpo_jax.tasks.base import Prompt, RewardFunction

LENGTHS = "completion_lengths"
"""What a reward function calls the completions' lengths in tokens; only those that ask get it."""


class RewardError(ValueError):
  """A reward function failed or returned something that is not one number per completion."""


def score(
  rewards: Mapping[str, tuple[RewardFunction, float]],
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Mapping[str, Sequence[Any]],
  lengths: Sequence[Sequence[int]] | None = None,
) -> tuple[Float[np.ndarray, "P G"], dict[str, Float[np.ndarray, "P G"]]]:
  """Weighted sum of the reward functions, `sum_i weight_i * reward_i`, over those that apply.

  Args:
    rewards: name -> (function, weight). Functions are called once each, by keyword, with one entry
      per completion (prompts and columns repeated for their group). `async` ones run together.
    prompts: [P], text or chat messages.
    completions: [P][G], text; every prompt has the same number of completions.
    columns: name -> [P], handed to the functions under their names.
    lengths: [P][G], tokens of each completion: `completion_lengths`, flat like the others, for the
      functions with a parameter of that name.

  Returns:
    (total [P, G], name -> values [P, G]), float64. `None` or NaN from a function means "does not
    apply": that function is left out of the sum. Where no function with a non-zero weight applies,
    the total is NaN ("not scored").

  Raises:
    RewardError: a function raised, or did not return one finite number (or None) per completion.
      The message names the function and shows the completion.
    ValueError: the arguments do not fit each other.

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
  entries = {name: [value for value in values for _ in group] for name, values in columns.items()}
  entries["prompts"] = [prompt for prompt in prompts for _ in group]
  entries["completions"] = [text for texts in completions for text in texts]

  on_request = {} if lengths is None else {LENGTHS: [int(n) for row in lengths for n in row]}

  results = _call_all({name: f for name, (f, _) in rewards.items()}, entries, on_request)
  per_name = {
    name: _numbers(_label(name, rewards[name][0]), result, entries).reshape(shape)
    for name, result in results.items()
  }
  return weighted_sum(per_name, {name: weight for name, (_, weight) in rewards.items()}), per_name


def weighted_sum(
  per_name: Mapping[str, Float[np.ndarray, "P G"]], weights: Mapping[str, float]
) -> Float[np.ndarray, "P G"]:
  """`sum_i weight_i * reward_i` over the rewards that apply; NaN where none with a weight does.

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
  columns: Mapping[str, Sequence[Any]],
  lengths: Sequence[Sequence[int]] | None = None,
) -> tuple[int, int]:
  """(P, G) of arguments of `score`; ValueError where they do not fit each other."""
  if len(completions) != len(prompts):
    raise ValueError(f"{len(prompts)} prompts but {len(completions)} lists of completions")
  sizes = {len(texts) for texts in completions}
  if len(sizes) > 1:
    raise ValueError(f"every prompt needs the same number of completions, got {sorted(sizes)}")
  if lengths is not None and [len(row) for row in lengths] != [len(row) for row in completions]:
    raise ValueError("lengths must hold one number of tokens for each completion")
  for name, values in columns.items():
    if name in ("prompts", "completions", LENGTHS):
      raise ValueError(f"a column may not be called {name!r}: rewards get that name already")
    if len(values) != len(prompts):
      raise ValueError(f"column {name!r} has {len(values)} values for {len(prompts)} prompts")
  return len(prompts), sizes.pop() if sizes else 0


def _call_all(
  functions: Mapping[str, RewardFunction],
  entries: Mapping[str, list[Any]],
  on_request: Mapping[str, list[Any]],
) -> dict[str, Any]:
  """Plain functions one after the other, then the asynchronous ones together."""
  given: dict[str, dict[str, list[Any]]] = {}
  results: dict[str, Any] = {}
  waiting: dict[str, Awaitable[Any]] = {}
  try:
    for name, function in functions.items():
      asked = check_signature(name, function, entries, on_request)
      given[name] = {**entries, **{column: on_request[column] for column in asked}}
      try:
        results[name] = function(**given[name])
      except Exception as error:
        raise _raised(name, function, error, given[name]) from error
      if inspect.isawaitable(results[name]):
        waiting[name] = results[name]
  except RewardError:
    for coroutine in waiting.values():
      if inspect.iscoroutine(coroutine):
        coroutine.close()  # it will not run: without this Python warns that it was never awaited
    raise
  if waiting:
    for name, value in zip(waiting, _await_together(list(waiting.values()))):
      if isinstance(value, Exception):
        raise _raised(name, functions[name], value, given[name]) from value
      results[name] = value
  return results


def _await_together(awaitables: list[Awaitable[Any]]) -> list[Any]:
  """Results in order, an exception standing for its own result; works inside a notebook too."""

  async def together() -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)

  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(together())
  # A notebook has a running loop, in which asyncio.run refuses to work: use another thread's.
  results: list[Any] = []
  thread = threading.Thread(target=lambda: results.extend(asyncio.run(together())), daemon=True)
  thread.start()
  thread.join()
  return results


def check_signature(
  name: str,
  function: RewardFunction,
  given: Iterable[str],
  on_request: Collection[str] = (LENGTHS,),
) -> list[str]:
  """Which of the `on_request` columns a function asks for by name.

  Raises RewardError where it wants something that it will not be given, or cannot take what it
  will be: everything in `given`, and of `on_request` what it asks for.
  """
  label, given = _label(name, function), sorted(given)
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):  # some callables written in C have no signature to look at
    return []
  by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
  asked = [column for column in on_request if column in by_name]
  missing = [n for n, p in by_name.items() if p.default is p.empty and n not in (*given, *asked)]
  if missing:
    have = ", ".join(given)
    raise RewardError(f"{label} asks for {', '.join(missing)}, which is not given. Given: {have}")
  extra = sorted(set(given) - set(by_name))
  if extra and not any(p.kind is p.VAR_KEYWORD for p in parameters):
    raise RewardError(
      f"{label} does not take {', '.join(extra)}: end its parameters with **columns, as in "
      f"`def f(prompts, completions, **columns)`. Given: {', '.join(given)}"
    )
  return asked


def _numbers(label: str, values: Any, entries: Mapping[str, list[Any]]) -> np.ndarray:
  count = len(entries["completions"])
  if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
    raise RewardError(
      f"{label} returned {type(values).__name__} {_short(values)}: it must return a list with one "
      f"number (or None) per completion, here {count}\n{_shown_at(entries, 0)}"
    )
  values = list(values)
  if len(values) != count:
    raise RewardError(
      f"{label} returned {len(values)} values for {count} completions: it must return one number "
      f"(or None) for each\n{_shown_at(entries, min(len(values), count - 1))}"
    )
  out = np.full(count, np.nan)
  for i, value in enumerate(values):
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array of no dimensions
      value = value.item()
    if value is None:
      continue
    number = math.inf
    if isinstance(value, numbers.Real):
      try:
        number = float(value)
      except OverflowError:  # an integer beyond the floats: as useless as an infinity
        number = math.inf
    if math.isinf(number):
      raise RewardError(
        f"{label} returned {type(value).__name__} {_short(value)} at position {i}: it must be a "
        f"finite number, or None where it does not apply\n{_shown_at(entries, i)}"
      )
    out[i] = number
  return out


def _raised(
  name: str, function: RewardFunction, error: Exception, entries: Mapping[str, list[Any]]
) -> RewardError:
  """The error of a function that raised, showing a completion that alone makes it raise."""

  def fails(start: int, stop: int) -> bool:
    try:
      result = function(**{column: values[start:stop] for column, values in entries.items()})
      if inspect.isawaitable(result):
        return isinstance(_await_together([result])[0], Exception)
      return False
    except Exception:
      return True

  start, stop = 0, len(entries["completions"])
  while stop - start > 1:  # halving keeps this to a few calls, for functions that are slow
    middle = (start + stop) // 2
    start, stop = (start, middle) if fails(start, middle) else (middle, stop)
  alone = fails(start, stop)
  note = "" if alone else "  (no completion raises it alone; this is the first)\n"
  return RewardError(
    f"{_label(name, function)} raised {type(error).__name__}: {error}\n{note}"
    + _shown_at(entries, start if alone else 0)
  )


def _label(name: str, function: RewardFunction) -> str:
  code = getattr(inspect.unwrap(function), "__code__", None)
  where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
  return f"reward function {name!r}{where}"


def _shown_at(entries: Mapping[str, list[Any]], i: int) -> str:
  return shown(entries["prompts"][i], entries["completions"][i])


def shown(prompt: Prompt, completion: str) -> str:
  """A completion and its prompt as two lines of an error; long ones without their middle."""
  return f"  prompt:     {_short(prompt)}\n  completion: {_short(completion)}"


def _short(value: Any, width: int = 400) -> str:
  text = repr(value)
  if len(text) <= width:
    return text
  return f"{text[: width // 2]} ... {text[-width // 2 :]}"
