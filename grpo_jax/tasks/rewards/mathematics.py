"""Compares mathematical answers with math-verify, with bounds on size and time.

math-verify parses LaTeX and knows sets, intervals, equations and matrices. It compares numbers to a
fixed number of decimals, so that all tiny numbers are equal: a verdict of "equal" is confirmed here
number by number, exactly or relative to their size.
"""

from __future__ import annotations

import functools
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

from grpo_jax import extras
from grpo_jax.environments.time_limit import OutOfTime, call_within
from grpo_jax.tasks.rewards.characters import read_characters
from grpo_jax.tasks.rewards.expressions import (
  confirms,
  decimal_unit,
  is_number,
  is_small,
  rounds_to,
  same_numbers,
)
from grpo_jax.tasks.rewards.golds import MAX_MATH_LENGTH
from grpo_jax.tasks.rewards.numerals import normalize, number, plain

MAX_SECONDS = 1.0  # time limit in seconds for parsing and comparing two answers
MIN_SECONDS = 0.01  # with less than this left, a comparison is not begun and the answer is wrong
# Seconds that the comparisons of one call may lose by running out of time, all together.
MAX_LOST_SECONDS = 4.0
MAX_DEPTH = 8  # brackets inside each other; parsing takes a time that grows quickly with it
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
SYMBOLS = {
  "√": "\\sqrt", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "÷": "\\div ", "·": "\\cdot ",
  "⋅": "\\cdot ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∪": "\\cup ",
  "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in ", "°": "^\\circ ",
  "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "⌊": "\\lfloor ",
  "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
}  # fmt: skip
ROOT = re.compile(r"√ ?(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\))")
EXPONENT = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?!\w)")
# What math-verify evaluates while it parses, and what may then be huge.
EAGER = re.compile(r"binom|choose|gcd|lcm|det|vmatrix|operatorname|exp")
HUGE = re.compile(r"\d{5}|!|\^ ?\{? ?-?(?:\d{3}|\w* ?\^|[({\\])")


def same_mathematics(expected: Sequence[str | None], answers: Sequence[str | None]) -> list[bool]:
  r"""Returns whether each answer equals the expected one; False where one of them is None.

  Each pair is compared once, also over several calls. Short answers come first, and a comparison
  that runs out of time shortens the time limit of the others: all of them together lose at most
  `MAX_LOST_SECONDS` in a call. In other threads than the main one there is no time limit.

  Example:
    >>> same_mathematics([r"\sqrt{12}", "0.5"], [r"2\sqrt{3}", "2"])
    [True, False]
  """
  pairs = [(e, a) for e, a in zip(expected, answers) if e is not None and a is not None]
  require_math_verify()
  lost = 0.0
  verdicts: dict[tuple[str, str], bool] = {}
  for pair in sorted(set(pairs), key=lambda pair: (len(pair[1]), pair)):
    verdict = _verdicts.get(pair)
    if verdict is None:
      limit = min(MAX_SECONDS, (MAX_LOST_SECONDS - lost) / 3)
      start = time.monotonic()
      same = functools.partial(_is_same, *pair)
      verdict = _within(same, limit) if limit >= MIN_SECONDS else None
      lost += time.monotonic() - start if verdict is None else 0.0
      if verdict is not None or limit == MAX_SECONDS:
        _remember(pair, bool(verdict))
    verdicts[pair] = bool(verdict)
  return [verdicts.get(pair, False) for pair in zip(expected, answers)]


def _remember(pair: tuple[str, str], verdict: bool) -> None:
  if len(_verdicts) >= MAX_VERDICTS:
    _verdicts.pop(next(iter(_verdicts)))
  _verdicts[pair] = verdict


# Verdicts of earlier comparisons, the oldest first: rewards and accuracy ask for the same ones.
_verdicts: dict[tuple[str, str], bool] = {}
MAX_VERDICTS = 100_000


@functools.cache
def require_math_verify() -> None:
  """Imports math-verify, which takes a second; ImportError if it is not installed."""
  extras.require("tasks", "the grader 'math'", "math_verify")
  import math_verify  # noqa: F401

  # It logs each answer that it cannot read; Python would print that if there were no handler.
  logging.getLogger("math_verify").addHandler(logging.NullHandler())


# --- two answers ----------------------------------------------------------------------------------


def _is_same(expected: str, answer: str) -> bool:
  if len(answer) > MAX_MATH_LENGTH:
    return False
  values = normalize(expected), normalize(answer)
  if values[0] == values[1]:
    return True
  if isinstance(values[0], Fraction) and WORD.search(plain(answer)):
    return number(answer) == values[0]
  if all(isinstance(value, Fraction) for value in values):
    return _same_written_numbers((expected, answer), values)
  texts = [_to_latex(text) for text in (expected, answer)]
  try:
    return all(map(_is_harmless, texts)) and _verify(*texts)
  except Exception:  # sympy raises all kinds of errors on what makes no sense
    return False


def _same_written_numbers(texts: tuple[str, str], values: tuple[Fraction, Fraction]) -> bool:
  """Returns whether two numbers are one: a percentage, or a decimal and what it rounds."""
  percent = ["%" in plain(text) for text in texts]
  if percent[0] != percent[1]:
    values = tuple(v / 100 if p else v for v, p in zip(values, percent))
  written = [decimal_unit(v) if "." in plain(t) else None for t, v in zip(texts, values)]
  return values[0] == values[1] or rounds_to(values, written)


def _to_latex(text: str) -> str:
  """Returns an answer as LaTeX that math-verify reads, without delimiters."""
  text = read_characters(text).replace("$", "").replace("\\varnothing", "\\emptyset")
  text = " ".join(re.sub(r"\\[()\[\]]", " ", text).split())
  text = ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text)
  text = EXPONENT.sub(r"\1\\times10^{\2}", text)
  return "".join(SYMBOLS.get(character, character) for character in text)


def _is_harmless(text: str) -> bool:
  """Returns whether parsing a text cannot take long; decided without parsing it."""
  depth = deepest = 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  return deepest <= MAX_DEPTH and not (EAGER.search(text) and HUGE.search(text))


def _verify(expected: str, answer: str) -> bool:
  """Returns whether math-verify finds two answers equal, and their numbers confirm it."""
  from math_verify import LatexExtractionConfig, parse, verify

  config = [LatexExtractionConfig(boxed_match_priority=0)]
  boxed = [f"\\boxed{{{text}}}" for text in (expected, answer)]
  gold, other = (parse(text, config, parsing_timeout=None) for text in boxed)
  if not gold or not other:
    return False
  if not all(is_small(e) for e in (gold[0], other[0]) if not isinstance(e, str)):
    return False
  if is_number(gold[0]) and is_number(other[0]):
    same = same_numbers(gold[0], other[0])
    if same is not None:
      return same
  return bool(verify(gold, other, timeout_seconds=None)) and confirms(gold[0], other[0])


# --- time limits ----------------------------------------------------------------------------------


def _within(equal: Callable[[], bool], seconds: float) -> bool | None:
  """Returns `equal()`, None if it takes longer than `seconds`; no limit outside the main thread.

  math-verify's own alarm rings once, and sympy, which catches exceptions of all kinds, may then run
  forever.
  """
  limited = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
  try:
    return call_within(seconds if limited else None, equal)
  except OutOfTime:
    return None
