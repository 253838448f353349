"""Reads correct answers as data hold them, and checks the answers of a whole file at the start."""

from __future__ import annotations

import datetime
import math
import numbers
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

from grpo_jax.tasks.base import RewardFunction
from grpo_jax.tasks.rewards.answers import extract, final
from grpo_jax.tasks.rewards.numerals import MAX_NUMBER_LENGTH, normalize, plain

# A correct answer as the data has it: text, a number, or None if the grader does not apply.
Gold: TypeAlias = str | numbers.Real | Decimal | None
MAX_MATH_LENGTH = 500  # characters; a longer answer counts as wrong
TEXT_LIKE = (str, bool, datetime.date, datetime.time)


class AnswerError(ValueError):
  """A correct answer that a grader cannot read. The message says what the grader reads."""


def is_missing(gold: Any) -> bool:
  """Returns whether there is no answer: None, or the NaN that tables have for it.

  Example:
    >>> [is_missing(gold) for gold in (None, float("nan"), Decimal("NaN"), 0, "nan", [])]
    [True, True, True, False, False, False]
  """
  if isinstance(gold, Decimal):
    return gold.is_nan()
  return gold is None or (isinstance(gold, numbers.Real) and bool(gold != gold))


def number_of(gold: Gold) -> Fraction:
  r"""Returns a correct answer as an exact number.

  Raises:
    AnswerError: it is not a finite number, or text that is not one number.

  Example:
    >>> [str(number_of(gold)) for gold in (0.1, Decimal("2.00"), "1,234 eggs", r"so \boxed{1/2}")]
    ['1/10', '2', '1234', '1/2']
  """
  value = None
  if isinstance(gold, str):
    value = normalize(final(gold) or "")
  elif _is_plain_number(gold):
    value = _exactly(gold)
  if not isinstance(value, Fraction):
    raise AnswerError("it must be a finite number, or text that is one number and its unit")
  if max(abs(value.numerator), value.denominator) >= 10**MAX_NUMBER_LENGTH:
    raise AnswerError(f"a number of more than {MAX_NUMBER_LENGTH} digits is never read")
  return value


def texts_of(gold: Gold) -> tuple[str, ...]:
  """Returns the ways to write a correct answer as text: 5.0 is also 5.

  Raises:
    AnswerError: it is empty, an infinite number, a list or a dict.

  Example:
    >>> texts_of(5.0), texts_of(Decimal("5.50")), texts_of(True), texts_of("New York")
    (('5.0', '5'), ('5.50', '5.5'), ('True',), ('New York',))
  """
  text = str(gold) if isinstance(gold, TEXT_LIKE) or _is_plain_number(gold) else ""
  if not text.strip():
    raise AnswerError("it must be text that is not empty, a finite number, true or false")
  if isinstance(gold, (*TEXT_LIKE, numbers.Rational)):
    return (text,)
  value = _exactly(gold)
  short = str(value) if value.denominator == 1 else format(Decimal(text).normalize(), "f")
  return tuple(dict.fromkeys((text, short)))


def mathematics_of(gold: Gold) -> str:
  r"""Returns a correct answer as the text that `math` compares, the marked one if there is one.

  Raises:
    AnswerError: it is empty, too long, an infinite number, a list or a dict.

  Example:
    >>> mathematics_of(r"x = 2, so \boxed{2}"), mathematics_of(2.5), mathematics_of("2x")
    ('2', '2.5', '2x')
  """
  text = texts_of(gold)[-1]
  text = extract(text) or text
  if len(text) > MAX_MATH_LENGTH:
    raise AnswerError(
      f"it has {len(text)} characters, and an answer of more than {MAX_MATH_LENGTH} counts as "
      "wrong: give the final answer, or a solution that marks it by \\boxed{...}"
    )
  return text


# Grader -> how it reads a correct answer.
READERS: dict[str, Callable[[Gold], Any]] = {
  "exact": lambda gold: {canonical(text) for text in texts_of(gold)},
  "numeric": number_of,
  "math": mathematics_of,
}


def read(grader: str, gold: Gold) -> Any:
  """Returns a correct answer as a built-in grader reads it.

  Raises:
    AnswerError: it cannot. The message has the answer, what is allowed, and which graders can.

  Example:
    >>> str(read("numeric", "18 eggs"))
    '18'
    >>> read("numeric", "twelve")
    Traceback (most recent call last):
    grpo_jax.tasks.rewards.golds.AnswerError: the grader 'numeric' cannot read the correct answer...
  """
  try:
    return READERS[grader](gold)
  except AnswerError as error:
    fitting = [name for name in READERS if name != grader and _reads(name, gold)]
    advice = (
      f"The grader {' or '.join(map(repr, fitting))} reads this one"
      if fitting
      else "Write it so, or use a reward function of your own"
    )
    is_huge = isinstance(gold, numbers.Integral) and abs(gold) >= 10**80
    value = "a huge integer" if is_huge else f"{gold!r:.80} ({type(gold).__name__})"
    raise AnswerError(
      f"the grader {grader!r} cannot read the correct answer {value}: {error}. {advice}; leave the "
      "answer empty (null) in rows that have none"
    ) from None


def canonical(answer: str) -> str:
  """Returns a text as `exact` compares it: without case, spacing and a final full stop.

  Example:
    >>> canonical(" New  York."), canonical("cafe\u0301") == canonical("caf\u00e9"), canonical(".")
    ('new york', True, '.')
  """
  text = plain(answer).strip()
  return (text.removesuffix(".").strip() or text).casefold()


def graders_of(functions: Iterable[RewardFunction]) -> tuple[str, ...]:
  """Returns the names of the built-in graders among reward functions and accuracy functions.

  Example:
    >>> from grpo_jax.tasks.rewards.graders import exact
    >>> graders_of([exact, print])
    ('exact',)
  """
  # `ExactlyOne`, the accuracy, has the grader as its attribute `function`.
  names = [getattr(getattr(f, "function", f), "grader", None) for f in functions]
  return tuple(dict.fromkeys(name for name in names if name in READERS))


def check_answer(graders: Iterable[str], gold: Any, where: str, column: str = "answer") -> None:
  """Lets built-in graders read the correct answer of one row.

  Args:
    graders: names from `graders_of`.
    gold: the answer; a missing one is right for all graders.
    where: the file and line, for the message.
    column: name of the column in the file, for the message.

  Raises:
    ValueError: a grader cannot read the answer.

  Example:
    >>> check_answer(["numeric"], "twelve", "a.jsonl, line 7")
    Traceback (most recent call last):
    ValueError: a.jsonl, line 7, column 'answer': the grader 'numeric' cannot read...
  """
  if is_missing(gold):
    return
  for grader in graders:
    try:
      read(grader, gold)
    except AnswerError as error:
      raise ValueError(f"{where}, column {column!r}: {error}") from None


def _reads(grader: str, gold: Any) -> bool:
  try:
    READERS[grader](gold)
  except AnswerError:
    return False
  return True


def _is_plain_number(gold: Any) -> bool:
  if isinstance(gold, Decimal):
    return gold.is_finite()
  real = isinstance(gold, numbers.Real) and not isinstance(gold, bool)
  return real and (isinstance(gold, numbers.Rational) or math.isfinite(gold))


def _exactly(gold: Any) -> Fraction:
  """Returns the value of a number as its decimals are written: 0.1 is 1/10."""
  return Fraction(gold if isinstance(gold, numbers.Rational | Decimal) else str(gold))
