"""Countdown: reach a target number from a few numbers with + - * / and parentheses.

The recipe is TinyZero's (Pan et al. 2025, github.com/Jiayi-Pan/TinyZero): three or four numbers, a
target of two digits, thinking and answer between tags. An answer is checked on its syntax tree, in
exact arithmetic, and never run.
"""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from grpo_jax.tasks.base import Example, Prompt, Task, unknown
from grpo_jax.tasks.indexed import Indexed
from grpo_jax.tasks.rewards.graders import make_grader
from grpo_jax.tasks.rewards.loading import ExactlyOne

FORMATS = ("chat", "completion")
USES = {"exactly_once": "every number exactly once", "at_most_once": "each number at most once"}
QUESTION = (
  "Combine the numbers {numbers} into an arithmetic expression that equals {target}. You may use "
  "+, -, *, / and parentheses, and must use {rule}. Think between <think> and </think>. Then give "
  "the expression, and nothing else, between <answer> and </answer>, for example "
  "<answer>(1 + 2) / 3</answer>."
)
SYSTEM = "You think a problem through first, and then you give the answer."
COMPLETION = (
  "A user asks a question and an assistant answers it. The assistant thinks the problem through "
  "first, and then gives the answer.\nUser: {question}\nAssistant: Let me think step by step.\n"
  "<think>"
)
MOST_CHARACTERS = 200  # of an expression: bounds the depth of its tree and the size of its values
CHARACTERS = frozenset("0123456789+-*/() ")
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
Problem = tuple[tuple[int, ...], int, str]  # numbers, target, a solution


def countdown_task(
  *,
  counts: Sequence[int] = (3, 4),
  smallest: int = 1,
  largest: int = 99,
  min_target: int = 10,
  max_target: int = 99,
  use: str = "exactly_once",
  format: str = "chat",
  format_weight: float = 0.1,
  train_size: int = 10_000,
  eval_size: int = 500,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> Task:
  """Distinct problems, each of which has a solution; none is in both splits.

  A problem is its numbers, in any order, and its target. Rewards: "countdown", 1.0 for a right
  expression, and "format", 1.0 for thinking and answer between their tags.

  Args:
    counts: how many numbers a problem may have, each equally often.
    smallest, largest: range of the numbers, both included.
    min_target, max_target: range of the targets, both included.
    use: "exactly_once", an answer uses every number; or "at_most_once", it may leave some out.
    format: "chat", messages for a chat template; or "completion", text for a base model that has
      already opened <think>.
    format_weight: weight of the "format" reward; 0 = it is not given.
    train_size, eval_size: numbers of problems. A larger train_size only adds some.
    stop: strings at which generation ends.
    seed: which problems.

  Raises ValueError for a wrong setting, or fewer distinct problems than asked for.
  """
  if format not in FORMATS:
    raise unknown("format", format, FORMATS)
  if use not in USES:
    raise unknown("use of the numbers", use, USES)
  if not counts or not all(isinstance(n, int) and 2 <= n <= 6 for n in counts):
    raise ValueError(f"counts is {counts}: give one or several integers from 2 to 6")
  if not 1 <= smallest <= largest:
    raise ValueError(f"smallest is {smallest} and largest {largest}: need 1 <= smallest <= largest")
  if not 1 <= min_target <= max_target:
    raise ValueError(
      f"min_target is {min_target} and max_target {max_target}: need 1 <= min <= max"
    )
  if train_size < 1 or eval_size < 0:
    raise ValueError(f"train_size is {train_size} and eval_size {eval_size}: need at least 1 and 0")

  used: set[str] = set()
  problems: dict[str, list[Problem]] = {}
  for split, size in (("eval", eval_size), ("train", train_size)):
    draws = _draws(f"{seed}/{split}", tuple(counts), smallest, largest)
    problems[split] = _distinct(draws, size, used, range(min_target, max_target + 1))
    if len(problems[split]) < size:
      raise ValueError(
        f"only {len(used)} distinct problems were found with these settings, and {eval_size} eval "
        f"+ {train_size} train are needed: lower the sizes, or widen the numbers and targets"
      )
  right = partial(reaches_target, exactly_once=use == "exactly_once")
  tidy = make_grader("format", opened=format == "completion")
  rewards = {"countdown": (right, 1.0), "format": (tidy, float(format_weight))}
  return Task(
    name="countdown",
    splits={
      split: Indexed(partial(_example, drawn, use, format), range(len(drawn)))
      for split, drawn in problems.items()
    },
    rewards={name: pair for name, pair in rewards.items() if pair[1] != 0},
    accuracy=ExactlyOne(right),
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=answer,
  )


# --- checking an answer ---------------------------------------------------------------------------


def value_of(expression: str) -> tuple[Fraction, tuple[int, ...]] | None:
  """Exact value of an expression and the numbers in it, sorted; None where it is none.

  An expression is integers, + - * /, a minus sign in front, and parentheses, in at most
  `MOST_CHARACTERS` characters; "= value" may follow if it is true. A division by zero has no value.

  >>> value_of("(1 + 2) / 3 * 7"), value_of("7 × 3 = 21"), value_of("2 ** 9999"), value_of("1 / 0")
  ((Fraction(7, 1), (1, 2, 3, 7)), (Fraction(21, 1), (3, 7)), None, None)
  """
  expression = expression.strip()
  if len(expression) > MOST_CHARACTERS:
    return None
  for sign, ascii_sign in zip("×÷−", "*/-"):
    expression = expression.replace(sign, ascii_sign)
  text, equals, claimed = (part.strip() for part in expression.partition("="))
  if not CHARACTERS.issuperset(text):  # no names, dots, commas or line breaks reach the parser
    return None
  numbers: list[int] = []
  try:
    value = _value(ast.parse(text, mode="eval").body, numbers)
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
    return None
  if equals and claimed != str(value):
    return None
  return value, tuple(sorted(numbers))


def _value(node: ast.AST, numbers: list[int]) -> Fraction:
  """Value of a tree; the integers in it join `numbers`. ValueError for any other kind of node."""
  if isinstance(node, ast.Constant) and type(node.value) is int:
    numbers.append(node.value)
    return Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_value(node.operand, numbers)
  if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
    left, right = (_value(side, numbers) for side in (node.left, node.right))
    return OPERATORS[type(node.op)](left, right)
  raise ValueError(f"{type(node).__name__} has no place in an expression")


def reaches_target(
  completions: Sequence[str],
  numbers: Sequence[Sequence[int]],
  target: Sequence[int],
  *,
  exactly_once: bool = True,
  **columns: Any,
) -> list[float]:
  """1.0 where the expression in the last <answer> equals the target and uses the right numbers.

  >>> reaches_target(["<answer>(8 - 2) * 4</answer>", "24"], [[2, 4, 8]] * 2, [24] * 2)
  [1.0, 0.0]
  """

  def one(text: str, given: Sequence[int], wanted: int) -> float:
    found = value_of(_last_answer(text))
    if found is None or found[0] != wanted:
      return 0.0
    here, there = Counter(found[1]), Counter(given)
    return float(here == there if exactly_once else here <= there)

  return [one(*entry) for entry in zip(completions, numbers, target)]


def answer(text: str) -> str | None:
  """Value and numbers of the expression: two answers that agree in them are graded alike.

  >>> answer("<answer>2 * (8 - 4)</answer>"), answer("<answer>(8 - 4) * 2</answer>"), answer("8")
  ('8 from 2, 4, 8', '8 from 2, 4, 8', None)
  """
  found = value_of(_last_answer(text))
  return None if found is None else f"{found[0]} from {', '.join(map(str, found[1]))}"


def _last_answer(text: str) -> str:
  """What stands between the last complete pair of answer tags, "" without one."""
  head, end, _ = text.rpartition("</answer>")
  _, begin, inside = head.rpartition("<answer>")
  return inside if begin and end else ""


# --- making problems ------------------------------------------------------------------------------


def _draws(stream: str, counts: tuple[int, ...], smallest: int, largest: int) -> Iterator[Problem]:
  """Endless problems, with targets of any size: random numbers, combined by random operations."""
  rng = random.Random(stream)
  while True:
    numbers = tuple(rng.randint(smallest, largest) for _ in range(rng.choice(counts)))
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
      (a, left), (b, right) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
      made = [(a + b, "+"), (a * b, "*")]  # and what stays a positive integer, as in the game
      made += [(a - b, "-")] * (a > b) + [(a // b, "/")] * (a % b == 0)
      value, sign = rng.choice(made)
      terms.append((value, f"({left} {sign} {right})"))
    target, solution = terms[0]
    yield numbers, target, solution[1:-1]


def _distinct(draws: Iterator[Problem], size: int, used: set[str], targets: range) -> list[Problem]:
  """Up to `size` problems with such targets that are not in `used`, which they join."""
  found: list[Problem] = []
  fruitless = 0
  while len(found) < size and fruitless < 10_000 + 100 * len(used):
    problem = next(draws)
    fruitless += 1
    if problem[1] in targets and _key(problem) not in used:
      used.add(_key(problem))
      found.append(problem)
      fruitless = 0
  return found


def _key(problem: Problem) -> str:
  numbers, target, _ = problem
  return f"{', '.join(map(str, sorted(numbers)))} -> {target}"


def _example(problems: Sequence[Problem], use: str, format: str, i: int) -> Example:
  numbers, target, solution = problems[i]
  question = QUESTION.format(numbers=", ".join(map(str, numbers)), target=target, rule=USES[use])
  prompt: Prompt = COMPLETION.format(question=question)
  if format == "chat":
    contents = (("system", SYSTEM), ("user", question))
    prompt = [{"role": role, "content": content} for role, content in contents]
  columns = {"numbers": list(numbers), "target": target, "solution": solution}
  return Example(prompt, columns, _key(problems[i]))
