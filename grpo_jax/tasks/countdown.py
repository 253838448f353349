"""Countdown: reach a target number from a few numbers with + - * / and parentheses.

The recipe is TinyZero's: three or four numbers, a two-digit target, reasoning and answer between
tags. An answer is checked on its syntax tree in exact arithmetic and never executed.

References:
  TinyZero, Pan et al. 2025, github.com/Jiayi-Pan/TinyZero.
"""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias

from grpo_jax.tasks.base import Example, Prompt, Task, unknown_name
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
# Longest expression in characters: bounds the depth of its tree and the size of its values.
MAX_CHARACTERS = 200
CHARACTERS = frozenset("0123456789+-*/() ")
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
Problem: TypeAlias = tuple[tuple[int, ...], int, str]  # numbers, target, a solution


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
  """Builds the task from distinct, solvable problems, none of which is in both splits.

  A problem is a set of numbers, in any order, and a target. The rewards are "countdown", 1.0 for a
  correct expression, and "format", 1.0 for reasoning and answer between their tags.

  Args:
    counts: possible sizes of a problem in numbers, equally likely.
    smallest: lower bound of the numbers, inclusive.
    largest: upper bound of the numbers, inclusive.
    min_target: lower bound of the targets, inclusive.
    max_target: upper bound of the targets, inclusive.
    use: "exactly_once", an answer must use every number, or "at_most_once", it may omit some.
    format: "chat", messages for a chat template, or "completion", text for a base model that ends
      in an open <think> tag.
    format_weight: weight of the "format" reward; 0 removes it.
    train_size: number of training problems. A larger size only adds problems.
    eval_size: number of evaluation problems.
    stop: strings that end the generation.
    seed: selects the problems.

  Raises:
    ValueError: a setting is out of range, or there are fewer distinct problems than requested.

  Example:
    >>> task = countdown_task(train_size=2, eval_size=1)
    >>> example = task.splits["eval"][0]
    >>> answer = f"<answer>{example.columns['solution']}</answer>"
    >>> reaches_target([answer], [example.columns["numbers"]], [example.columns["target"]])
    [1.0]
  """
  if format not in FORMATS:
    raise unknown_name("format", format, FORMATS)
  if use not in USES:
    raise unknown_name("use of the numbers", use, USES)
  if not counts or not all(isinstance(n, int) and 2 <= n <= 6 for n in counts):
    raise ValueError(f"counts is {counts}: give one or more integers from 2 to 6")
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
    draws = _random_problems(f"{seed}/{split}", tuple(counts), smallest, largest)
    problems[split] = _take_distinct(draws, size, used, range(min_target, max_target + 1))
    if len(problems[split]) < size:
      raise ValueError(
        f"these settings give only {len(used)} distinct problems, and {eval_size} eval + "
        f"{train_size} train are needed: lower the sizes, or widen the numbers and targets"
      )
  reward = partial(reaches_target, exactly_once=use == "exactly_once")
  format_reward = make_grader("format", opened=format == "completion")
  rewards = {"countdown": (reward, 1.0), "format": (format_reward, float(format_weight))}
  return Task(
    name="countdown",
    splits={
      split: Indexed(partial(_example, drawn, use, format), range(len(drawn)))
      for split, drawn in problems.items()
    },
    rewards={name: pair for name, pair in rewards.items() if pair[1] != 0},
    accuracy=ExactlyOne(reward),
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=answer,
  )


# --- checking an answer ---------------------------------------------------------------------------


def reaches_target(
  completions: Sequence[str],
  numbers: Sequence[Sequence[int]],
  target: Sequence[int],
  *,
  exactly_once: bool = True,
  **columns: Any,
) -> list[float]:
  """Returns 1.0 where the last <answer> equals the target and uses the given numbers, else 0.0.

  Args:
    completions: texts.
    numbers: the numbers of each problem.
    target: the target of each problem.
    exactly_once: whether every number has to be used.
    **columns: ignored.

  Example:
    >>> reaches_target(["<answer>(8 - 2) * 4</answer>", "24"], [[2, 4, 8]] * 2, [24] * 2)
    [1.0, 0.0]
  """

  def reward(text: str, numbers: Sequence[int], target: int) -> float:
    evaluated = expression_value(_last_answer(text))
    if evaluated is None or evaluated[0] != target:
      return 0.0
    used, available = Counter(evaluated[1]), Counter(numbers)
    return float(used == available if exactly_once else used <= available)

  return [reward(*row) for row in zip(completions, numbers, target)]


def answer(text: str) -> str | None:
  """Returns the value and numbers of the last <answer>, None if it is not an expression.

  Answers that are equal in both are graded alike.

  Example:
    >>> answer("<answer>2 * (8 - 4)</answer>"), answer("<answer>(8 - 4) * 2</answer>"), answer("8")
    ('8 from 2, 4, 8', '8 from 2, 4, 8', None)
  """
  evaluated = expression_value(_last_answer(text))
  return None if evaluated is None else f"{evaluated[0]} from {', '.join(map(str, evaluated[1]))}"


def expression_value(expression: str) -> tuple[Fraction, tuple[int, ...]] | None:
  """Returns the exact value of an expression and its numbers, sorted; None if it has no value.

  An expression has at most `MAX_CHARACTERS` characters and consists of integers, + - * /, unary
  minus and parentheses. "= value" may follow it if it is true.

  Example:
    >>> expression_value("(1 + 2) / 3 * 7"), expression_value("7 × 3 = 21")
    ((Fraction(7, 1), (1, 2, 3, 7)), (Fraction(21, 1), (3, 7)))
    >>> expression_value("2 ** 9999"), expression_value("1 / 0")
    (None, None)
  """
  expression = expression.strip()
  if len(expression) > MAX_CHARACTERS:
    return None
  for sign, ascii_sign in zip("×÷−", "*/-"):
    expression = expression.replace(sign, ascii_sign)
  text, equals, claimed = (part.strip() for part in expression.partition("="))
  if not CHARACTERS.issuperset(text):  # no name, dot, comma or line break reaches the parser
    return None
  numbers: list[int] = []
  try:
    value = _node_value(ast.parse(text, mode="eval").body, numbers)
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
    return None
  if equals and claimed != str(value):
    return None
  return value, tuple(sorted(numbers))


def _node_value(node: ast.AST, numbers: list[int]) -> Fraction:
  """Returns the value of a tree and appends its integers to `numbers`.

  Raises:
    ValueError: the tree contains a node that is not part of an expression.
  """
  if isinstance(node, ast.Constant) and type(node.value) is int:
    numbers.append(node.value)
    return Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_node_value(node.operand, numbers)
  if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
    left, right = (_node_value(side, numbers) for side in (node.left, node.right))
    return OPERATORS[type(node.op)](left, right)
  raise ValueError(f"{type(node).__name__} is not part of an expression")


def _last_answer(text: str) -> str:
  """Returns the text between the last complete pair of answer tags, "" if there is none."""
  head, end, _ = text.rpartition("</answer>")
  _, begin, content = head.rpartition("<answer>")
  return content if begin and end else ""


# --- generating problems --------------------------------------------------------------------------


def _random_problems(
  stream: str, counts: tuple[int, ...], smallest: int, largest: int
) -> Iterator[Problem]:
  """Yields problems without end: random numbers, combined by random operations to any target."""
  rng = random.Random(stream)
  while True:
    numbers = tuple(rng.randint(smallest, largest) for _ in range(rng.choice(counts)))
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
      (a, left), (b, right) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
      results = [(a + b, "+"), (a * b, "*")]
      # As in the game, every intermediate result is a positive integer.
      results += [(a - b, "-")] * (a > b) + [(a // b, "/")] * (a % b == 0)
      value, sign = rng.choice(results)
      terms.append((value, f"({left} {sign} {right})"))
    target, solution = terms[0]
    yield numbers, target, solution[1:-1]


def _take_distinct(
  draws: Iterator[Problem], size: int, used: set[str], targets: range
) -> list[Problem]:
  """Returns up to `size` new problems with a target in `targets` and adds their keys to `used`.

  It gives up after a long sequence of draws without a new problem.
  """
  problems: list[Problem] = []
  misses = 0
  while len(problems) < size and misses < 10_000 + 100 * len(used):
    problem = next(draws)
    misses += 1
    if problem[1] in targets and _key(problem) not in used:
      used.add(_key(problem))
      problems.append(problem)
      misses = 0
  return problems


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
