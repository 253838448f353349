"""Provides built-in reward functions, which also grade evaluation: one grader for both.

Each is a plain reward function, `f(completions, <its columns>, **columns)`. The correct answer is
the column `answer`; where it is None the grader does not apply. A correct answer gets 1.0, a wrong
one 0.0. How answers are extracted and read is in `answers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.tasks.base import RewardFunction, check_settings, unknown_name
from grpo_jax.tasks.rewards.answers import extract, final, normalize, number
from grpo_jax.tasks.rewards.golds import Gold, canonical, is_missing, read
from grpo_jax.tasks.rewards.mathematics import require_math_verify, same_mathematics

__all__ = ["ANSWERS", "GRADERS", "MAKERS", "extract", "make_grader", "normalize", "number"]


def exact(completions: Sequence[str], answer: Sequence[Gold], **columns: Any) -> list[float | None]:
  """Returns 1.0 where the final answer equals `answer` up to case, spacing and a final full stop.

  A whole number with decimals in the data, as in a column with gaps, is also the integer.

  Example:
    >>> exact(["<answer>New  York.</answer>", "new york", "York"], ["New York"] * 3)
    [1.0, 1.0, 0.0]
  """

  def is_correct(completion: str, gold: Gold) -> bool:
    texts = read("exact", gold)
    text = final(completion)
    return text is not None and canonical(text) in texts

  return _grade_each(is_correct, completions, answer)


def numeric(
  completions: Sequence[str], answer: Sequence[Gold], **columns: Any
) -> list[float | None]:
  """Returns 1.0 where the last number of the final answer equals `answer`, a number or its text.

  Completions without a marked answer are searched as a whole. `answers.number` defines what is read
  as a number.

  Raises:
    ValueError: `answer` is not a number, with or without a unit.

  Example:
    >>> numeric(["It costs $1,234.00.", "<answer>-5</answer>", "<answer>5"], ["1234", 5, 5])
    [1.0, 0.0, 0.0]
  """
  return numeric_within(0.0)(completions=completions, answer=answer)


def numeric_within(tolerance: float) -> RewardFunction:
  """Returns `numeric` with a tolerance: a relative error of at most `tolerance` is correct.

  Example:
    >>> numeric_within(0.01)(completions=["101", "102"], answer=[100, 100])
    [1.0, 0.0]
  """
  if not 0 <= tolerance < math.inf:
    raise ValueError(f"tolerance is {tolerance}: it must be a finite number of at least 0")

  def is_correct(completion: str, gold: Gold) -> bool:
    expected = read("numeric", gold)
    value = number(final(completion) or "")
    return value is not None and abs(value - expected) <= Fraction(tolerance) * abs(expected)

  def numeric(
    completions: Sequence[str], answer: Sequence[Gold], **columns: Any
  ) -> list[float | None]:
    return _grade_each(is_correct, completions, answer)

  numeric.grader = "numeric"
  return numeric


def math_equal(
  completions: Sequence[str], answer: Sequence[Gold], **columns: Any
) -> list[float | None]:
  r"""Returns 1.0 where the marked final answer equals `answer` mathematically.

  `answer` is LaTeX, text or a number, and may be a whole solution with a marked answer. If it is
  one number, an answer in words is graded by its last number. Everything else is compared by
  math-verify; `mathematics.py` says how numbers are compared, and what bounds the time. In other
  threads than the main one, only the time limit of the reward workers applies.

  Raises:
    ImportError: math-verify is not installed.

  Example:
    >>> math_equal([r"\boxed{\frac{1}{2}}", r"\boxed{2}"], ["0.5", "0.5"])
    [1.0, 0.0]
  """
  require_math_verify()
  expected = [None if is_missing(gold) else read("math", gold) for gold in answer]
  verdicts = same_mathematics(expected, [extract(completion) for completion in completions])
  return [None if gold is None else float(v) for gold, v in zip(expected, verdicts)]


def think_answer(completions: Sequence[str], **columns: Any) -> list[float | None]:
  """Returns 1.0 for completions of the form `<think>...</think><answer>...</answer>`.

  Each tag must occur once, neither part may be blank, and only space may surround them.

  Example:
    >>> think_answer(["<think>1 + 1</think>\\n<answer>2</answer>", "2", "<answer>2</answer>"])
    [1.0, 0.0, 0.0]
  """
  return tagged()(completions=completions)


def tagged(tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> RewardFunction:
  """Returns `think_answer` for other tags.

  Args:
    tags: names of the tags, in order.
    opened: whether the prompt ends in the first start tag.

  Example:
    >>> tagged(["plan", "code"], opened=True)(completions=["sort</plan><code>x.sort()</code>"])
    [1.0]
  """
  if not tags or isinstance(tags, str) or not all(isinstance(t, str) and t for t in tags):
    raise ValueError(f"tags is {tags!r}: it must be a list of names such as ['think', 'answer']")

  def matches(completion: str) -> bool:
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

  def format(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [float(matches(completion)) for completion in completions]

  return format


def soft_overlong(max_length: int, buffer: int) -> RewardFunction:
  """Returns DAPO's penalty for long completions, `((max_length - buffer) - n) / buffer`.

  It is 0 up to n = `max_length - buffer` tokens, decreases linearly, and is -1 from `max_length`
  tokens on.

  Args:
    max_length: completion budget of the run, in tokens.
    buffer: length of the linear part, in tokens.

  References:
    DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 13.

  Example:
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
  """Returns the reward `max(-|n - target| / target, -1)` of a completion of n tokens.

  It is 0 at the target, and -1 for an empty completion and from twice the target on.

  Args:
    target: length in tokens.

  Example:
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
# Rewards with settings: name -> settings -> reward function.
MAKERS: dict[str, Callable[..., RewardFunction]] = {
  "numeric": numeric_within,
  "format": tagged,
  "soft_overlong": soft_overlong,
  "length": length,
}
# Name of a grader -> its answer extraction for majority votes (`Task.answer`); None = no answer.
ANSWERS: dict[str, Callable[[str], Hashable | None]] = {
  "exact": lambda completion: None if (text := final(completion)) is None else canonical(text),
  "numeric": lambda completion: number(final(completion) or ""),
  "math": lambda completion: None if (text := extract(completion)) is None else normalize(text),
}


def make_grader(name: str, **settings: Any) -> RewardFunction:
  """Returns the built-in reward function called `name`, with its settings.

  Raises:
    ValueError: the name or a setting is unknown, or a setting is missing or out of range.
    ImportError: a package that it needs is not installed.

  Example:
    >>> make_grader("soft_overlong", max_length=512)
    Traceback (most recent call last):
    ValueError: grader 'soft_overlong' needs the setting 'buffer', which was not given
  """
  if name not in GRADERS and name not in MAKERS:
    raise unknown_name("grader", name, {**GRADERS, **MAKERS})
  if name == "math":
    require_math_verify()
  if name in GRADERS and not settings:
    return GRADERS[name]
  maker = MAKERS.get(name, lambda: GRADERS[name])
  check_settings(f"grader {name!r}", maker, settings)
  return maker(**settings)


# --- comparing answers ----------------------------------------------------------------------------


def _grade_each(
  is_correct: Callable[[str, Gold], bool], completions: Sequence[str], answers: Sequence[Gold]
) -> list[float | None]:
  return [
    None if is_missing(gold) else float(is_correct(text, gold))
    for text, gold in zip(completions, answers)
  ]


# How the answers of a file are checked: `golds.check_answer` reads them as these graders do.
exact.grader, numeric.grader, math_equal.grader = "exact", "numeric", "math"
