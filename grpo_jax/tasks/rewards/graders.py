"""Built-in reward functions. They also give the verdict in evaluation: one grader for both.

Each is a plain reward function, `f(completions, <columns it takes>, **columns)`. The right answer
is the column `answer`; where it is None they do not apply. A wrong answer gets 0.0, a right one
1.0. How answers are found and read is in `answers.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import numbers
import re
import signal
import threading
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax import extras
from grpo_jax.tasks.base import RewardFunction, unknown
from grpo_jax.tasks.rewards.answers import extract, final, normalize, number, plain

__all__ = ["ANSWERS", "GRADERS", "MAKERS", "extract", "make_grader", "normalize", "number"]

MATH_SECONDS = 4  # for reading two answers and comparing them
MATH_LENGTH = 500  # characters; a longer answer is wrong
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def exact(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> list[float | None]:
  """1.0 where the final answer is the column `answer`, but for case, space and a final full stop.

  >>> exact(["<answer>New  York.</answer>", "new york", "York"], ["New York"] * 3)
  [1.0, 1.0, 0.0]
  """

  def right(completion: str, wanted: Any) -> bool:
    found = final(completion)
    return found is not None and _text(found) == _text(str(wanted))

  return _each(right, completions, answer)


def numeric(
  completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
  """1.0 where the last number of the final answer equals the column `answer`, a number or text.

  Completions that mark no answer are searched as a whole. See `answers.number` for what is read as
  a number. Raises ValueError where `answer` is not one, with or without a unit.

  >>> numeric(["It costs $1,234.00.", "<answer>-5</answer>", "<answer>5"], ["1234", 5, 5])
  [1.0, 0.0, 0.0]
  """
  return numeric_within(0.0)(completions=completions, answer=answer)


def numeric_within(tolerance: float) -> RewardFunction:
  """`numeric` that also takes answers off by at most `tolerance` times the right one."""
  if not 0 <= tolerance < math.inf:
    raise ValueError(f"tolerance is {tolerance}: it must be a finite number of at least 0")

  def right(completion: str, wanted: Any) -> bool:
    exactly = _wanted_number(wanted)
    found = number(final(completion) or "")
    return found is not None and abs(found - exactly) <= Fraction(tolerance) * abs(exactly)

  def numeric(completions: Any, answer: Any, **columns: Any) -> list[float | None]:
    return _each(right, completions, answer)

  return numeric


def math_equal(
  completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
  r"""1.0 where the final answer, which has to be marked, equals the column `answer` mathematically.

  `answer` is LaTeX, text or a number, and may itself be marked (a whole solution). Answers in plain
  words count by their last number where the right answer is one number; all others are compared by
  math-verify. It has a time limit of its own, which works in the main thread only; elsewhere
  nothing but the limit of the reward workers ends a comparison.

  Raises ImportError, saying what to install, where math-verify is missing.
  """
  _need_math_verify()
  return _each(_same_mathematics, completions, answer)


def think_answer(completions: Sequence[str], **columns: Any) -> list[float | None]:
  """1.0 where the whole completion is `<think>...</think><answer>...</answer>`, each tag once.

  Space around the two parts is free; neither part may be blank.

  >>> think_answer(["<think>1 + 1</think>\\n<answer>2</answer>", "2", "<answer>2</answer>"])
  [1.0, 0.0, 0.0]
  """
  return tagged()(completions=completions)


def tagged(tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> RewardFunction:
  """`format` with other tags, in their order. `opened`: the prompt ends in the first start tag."""
  if not tags or isinstance(tags, str) or not all(isinstance(t, str) and t for t in tags):
    raise ValueError(f"tags is {tags!r}: it must be a list of names such as ['think', 'answer']")

  def follows(completion: str) -> bool:
    rest = f"<{tags[0]}>{completion}" if opened else completion
    for tag in tags:
      start, end = f"<{tag}>", f"</{tag}>"
      if rest.count(start) != 1 or rest.count(end) != 1 or not rest.lstrip().startswith(start):
        return False
      content, _, after = rest.lstrip().removeprefix(start).partition(end)
      if not content.strip() or any(f"<{t}>" in content or f"</{t}>" in content for t in tags):
        return False
      rest = after
    return not rest.strip()

  def format(completions: Any, **columns: Any) -> list[float | None]:
    return [float(follows(completion)) for completion in completions]

  return format


def soft_overlong(max_length: int, buffer: int) -> RewardFunction:
  """A penalty for long completions, DAPO's eq. 13 (Yu et al. 2025, arXiv 2503.14476).

  0 up to `max_length - buffer` tokens, -1 above `max_length`, linear between:
  `((max_length - buffer) - n) / buffer`. For a run whose completions may have `max_length` tokens.

  >>> penalty = soft_overlong(max_length=20, buffer=5)
  >>> penalty(completion_lengths=[15, 16, 20, 21])
  [0.0, -0.2, -1.0, -1.0]
  """
  if not 0 < buffer <= max_length:
    raise ValueError(
      f"buffer is {buffer} and max_length {max_length}: need 0 < buffer <= max_length, in tokens"
    )

  def soft_overlong(completion_lengths: Sequence[int], **columns: Any) -> list[float | None]:
    return [-min(max(n - (max_length - buffer), 0), buffer) / buffer or 0.0
            for n in completion_lengths]  # fmt: skip

  return soft_overlong


def length(target: int) -> RewardFunction:
  """`-|n - target| / target`, at least -1, for n tokens: 0 at the target, -1 at nothing or twice.

  >>> length(target=20)(completion_lengths=[20, 15, 0, 60])
  [0.0, -0.25, -1.0, -1.0]
  """
  if target < 1:
    raise ValueError(f"target is {target}: it must be at least 1 token")

  def length(completion_lengths: Sequence[int], **columns: Any) -> list[float | None]:
    return [-min(abs(n - target), target) / target or 0.0 for n in completion_lengths]

  return length


GRADERS: dict[str, RewardFunction] = {
  "exact": exact,
  "numeric": numeric,
  "math": math_equal,
  "format": think_answer,
}
# Those with settings: called with them, they give a reward function.
MAKERS: dict[str, Callable[..., RewardFunction]] = {
  "numeric": numeric_within,
  "format": tagged,
  "soft_overlong": soft_overlong,
  "length": length,
}
# What completions vote with under each grader; None = no answer. For `Task.answer`.
ANSWERS: dict[str, Callable[[str], Hashable | None]] = {
  "exact": lambda completion: None if (found := final(completion)) is None else _text(found),
  "numeric": lambda completion: number(final(completion) or ""),
  "math": lambda completion: None if (found := extract(completion)) is None else normalize(found),
}


def make_grader(name: str, **settings: Any) -> RewardFunction:
  """The built-in reward of this name, with its settings where it has some.

  Raises ValueError for an unknown name or setting, a missing one, and one out of range; ImportError
  where it needs a package that is not installed.

  >>> make_grader("soft_overlong", max_length=512)
  Traceback (most recent call last):
  ValueError: grader 'soft_overlong' needs the setting 'buffer', which was not given
  """
  if name not in GRADERS and name not in MAKERS:
    raise unknown("grader", name, {**GRADERS, **MAKERS})
  if name == "math":
    _need_math_verify()
  if name in GRADERS and not settings:
    return GRADERS[name]
  parameters = inspect.signature(MAKERS[name]).parameters if name in MAKERS else {}
  for setting in settings:
    if setting not in parameters:
      raise unknown(f"setting of grader {name!r}", setting, parameters)
  for setting, parameter in parameters.items():
    if parameter.default is parameter.empty and setting not in settings:
      raise ValueError(f"grader {name!r} needs the setting {setting!r}, which was not given")
  return MAKERS[name](**settings)


# --- parts ----------------------------------------------------------------------------------------


def _each(
  right: Callable[[str, Any], bool], completions: Sequence[str], answers: Sequence[Any]
) -> list[float | None]:
  return [None if a is None else float(right(text, a)) for text, a in zip(completions, answers)]


def _text(answer: str) -> str:
  return plain(answer).strip().removesuffix(".").strip().casefold()


def _wanted_number(wanted: Any) -> Fraction:
  if isinstance(wanted, str):
    value = normalize(final(wanted) or "")
  elif isinstance(wanted, numbers.Real) and math.isfinite(wanted):
    value = Fraction(str(wanted))  # the decimals as written: 0.1 is 1/10
  else:
    value = None
  if not isinstance(value, Fraction):
    raise ValueError(
      f"the column `answer` holds {wanted!r:.200}, which is not a number: use the grader 'math' or "
      "'exact' for such answers"
    )
  return value


def _same_mathematics(completion: str, wanted: Any) -> bool:
  found = extract(completion)
  if found is None or len(found) > MATH_LENGTH:
    return False
  gold = str(wanted) if extract(str(wanted)) is None else extract(str(wanted))
  wanted, given = normalize(gold), normalize(found)
  if wanted == given:
    return True
  if isinstance(wanted, Fraction) and WORD.search(plain(found)):
    return number(found) == wanted
  return _verify(gold, found)


def _verify(gold: str, found: str) -> bool:
  from math_verify import parse, verify

  def equal() -> bool:
    boxed = [f"\\boxed{{{text}}}" for text in (gold, found)]
    return bool(verify(*(parse(b, parsing_timeout=None) for b in boxed), timeout_seconds=None))

  in_main = threading.current_thread() is threading.main_thread()
  return _limited(equal, MATH_SECONDS) if in_main and hasattr(signal, "setitimer") else equal()


class _Late(BaseException):
  """A comparison took too long."""


def _limited(equal: Callable[[], bool], seconds: float) -> bool:
  """`equal()`, or False when it takes longer.

  The alarm rings until it is heard: math-verify's own rings once, and sympy, which catches
  exceptions of all kinds on its way, may then go on for ever.
  """
  running = True

  def ring(*_: Any) -> None:
    if running:
      raise _Late

  before = signal.signal(signal.SIGALRM, ring)
  signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
  try:
    try:
      return equal()
    finally:
      running = False
  except _Late:
    return False
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@functools.cache
def _need_math_verify() -> None:
  extras.require("tasks", "the grader 'math'", "math_verify")
  # It tells of each answer that took too long; without a handler Python prints that.
  logging.getLogger("math_verify").addHandler(logging.NullHandler())
