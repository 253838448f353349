"""Guards the scorers of reasoning-gym: checks the answers they get and the scores they give.

Some of them hand the answer to `eval`, or to a symbolic parser that does; some give the full score
to wrong answers. The functions of `CLEAN` let through only text that can be nothing but data; those
of `CONFIRM` hold a full score to a rule. `docs/scorers.md` lists the data sets.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

MAX_CHARACTERS = 2000  # of an answer that a parser gets
MAX_NUMBER, MAX_EXPONENT, MAX_NODES = 10**12, 100, 300
# Text without parentheses, braces, dots and operators calls nothing, whoever evaluates it.
_CELLS = re.compile(r"""[\w\s,\[\]'"-]*""")
_FUNCTIONS = frozenset(
  [
    "sin",
    "cos",
    "tan",
    "sec",
    "csc",
    "cot",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "log",
    "ln",
    "sqrt",
    "Abs",
  ]
)
# Text of one number whose exponent is small: a large power of ten takes hours to compute exactly.
_NUMBER = re.compile(r"[^eE]*(?:[eE][-+]?\d{1,3})?")
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


# --- what reaches a scorer ------------------------------------------------------------------------


def cells(answer: str, entry: Mapping[str, Any]) -> str | None:
  """Returns a board or a list of words as it is; None for anything that could be called.

  Example:
    >>> cells("[['Q', '_'], ['_', 'Q']]", {}), cells("__import__('os').system('ls')", {})
    ("[['Q', '_'], ['_', 'Q']]", None)
  """
  if len(answer) > MAX_CHARACTERS or not _CELLS.fullmatch(answer):
    return None
  return answer


def formula(answer: str, entry: Mapping[str, Any]) -> str | None:
  """Returns a formula in numbers, one-letter variables and functions such as `sin`, else None.

  Example:
    >>> formula("2*x**3 - sin(x)/4 + C", {}), formula("x.__class__", {}), formula("9**9**9", {})
    ('2 * x ** 3 - sin(x) / 4 + C', None, None)
  """
  if len(answer) > MAX_CHARACTERS:
    return None
  try:
    tree = ast.parse(answer.strip(), mode="eval")
    if sum(1 for _ in ast.walk(tree)) <= MAX_NODES and _is_formula(tree.body):
      return ast.unparse(tree)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    pass
  return None


def _is_formula(node: ast.expr) -> bool:
  if isinstance(node, ast.BinOp):
    if isinstance(node.op, ast.Pow) and not _is_exponent(node.right):
      return False
    return isinstance(node.op, _OPERATORS) and _is_formula(node.left) and _is_formula(node.right)
  if isinstance(node, ast.UnaryOp):
    return isinstance(node.op, ast.UAdd | ast.USub) and _is_formula(node.operand)
  if isinstance(node, ast.Constant):
    number = type(node.value) in (int, float) and abs(node.value) <= MAX_NUMBER
    return number and math.isfinite(node.value)
  if isinstance(node, ast.Name):
    return len(node.id) == 1 and node.id.isascii() and node.id.isalpha()
  if isinstance(node, ast.Call):
    known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    return known and len(node.args) == 1 and not node.keywords and _is_formula(node.args[0])
  return False


def _is_exponent(node: ast.expr) -> bool:
  """Returns whether an exponent is a small number, or a small fraction."""
  if isinstance(node, ast.UnaryOp):
    return isinstance(node.op, ast.USub) and _is_exponent(node.operand)
  if isinstance(node, ast.BinOp):
    return isinstance(node.op, ast.Div) and _is_exponent(node.left) and _is_exponent(node.right)
  return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= MAX_EXPONENT


def arithmetic(answer: str, entry: Mapping[str, Any]) -> str | None:
  """Returns arithmetic on integers as it is; None for any other text.

  Example:
    >>> arithmetic("(1 + 2) * 8", {}), arithmetic("2**9", {}), arithmetic("x + 1", {})
    ('(1 + 2) * 8', None, None)
  """
  return None if _value(answer) is None else answer


# --- what a full score is held to -----------------------------------------------------------------


def numbers_used_once(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an expression uses the numbers of the problem once each and has its target.

  Example:
    >>> entry = {"metadata": {"numbers": [2, 9, 6, 7]}}
    >>> numbers_used_once("2 + 9 + 6 + 7", entry), numbers_used_once("6 * 4", entry)
    (True, False)
  """
  evaluated, metadata = _value(answer), entry["metadata"]
  if evaluated is None:
    return False
  value, used = evaluated
  return value == metadata.get("target", 24) and Counter(used) == Counter(metadata["numbers"])


def same_number(answer: str, entry: Mapping[str, Any], tolerance: Fraction = Fraction(0)) -> bool:
  """Returns whether a number is the right one, up to a relative tolerance.

  Example:
    >>> same_number("11/64", {"answer": "0.171875"}), same_number("1", {"answer": "-1"})
    (True, False)
  """
  if not _NUMBER.fullmatch(answer.strip()):
    return False
  try:
    number, gold = (Fraction(text.replace(",", "").strip()) for text in (answer, entry["answer"]))
  except (ValueError, ZeroDivisionError):
    return False
  return abs(number - gold) <= tolerance * abs(gold)


def finite(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an answer has no `nan` and no infinity.

  Example:
    >>> finite("3 - 2i", {}), finite("nan", {})
    (True, False)
  """
  return not re.search(r"nan|inf", answer, re.IGNORECASE)


def only_numbers(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an answer is a list of numbers with commas between them.

  Example:
    >>> only_numbers("-5.5625, 0.0", {}), only_numbers("-5.5625, 0.0-5.5625, 0.0", {})
    (True, False)
  """
  try:
    return all(math.isfinite(float(part)) for part in answer.split(","))
  except ValueError:
    return False


def same_text(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an answer is the right text, up to case and white space.

  Example:
    >>> same_text(" true", {"answer": "True"}), same_text("banana", {"answer": "True"})
    (True, False)
  """
  return " ".join(answer.split()).casefold() == " ".join(str(entry["answer"]).split()).casefold()


def same_words(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an answer has no word, and no repetition, that the right one does not have.

  Example:
    >>> entry = {"answer": "Liam is a hero, and Ella is a rogue"}
    >>> same_words("ella is a rogue, and liam is a hero", entry)
    True
    >>> same_words("banana Liam is a hero, and Ella is a rogue", entry)
    False
  """
  words, gold = (Counter(re.findall(r"\w+", str(t).casefold())) for t in (answer, entry["answer"]))
  return words <= gold


def only_moves(answer: str, entry: Mapping[str, Any]) -> bool:
  """Returns whether an answer is a string of the moves U, D, L and R.

  Example:
    >>> only_moves("ULLD", {}), only_moves("ULLD banana", {})
    (True, False)
  """
  return bool(re.fullmatch(r"[UDLR\s,]+", answer.strip(), re.IGNORECASE))


Clean = Callable[[str, Mapping[str, Any]], str | None]
Confirm = Callable[[str, Mapping[str, Any]], bool]
# Data sets whose scorer evaluates the answer: what it gets instead.
CLEAN: dict[str, Clean] = {
  "binary_matrix": cells,
  "n_queens": cells,
  "spiral_matrix": cells,
  "string_insertion": cells,
  "countdown": arithmetic,
  "puzzle24": arithmetic,
  "polynomial_multiplication": formula,
  "simple_integration": formula,
  "intermediate_integration": formula,
}
# Data sets whose scorer takes wrong answers for right: what a full score is held to.
CONFIRM: dict[str, Confirm] = {
  "puzzle24": numbers_used_once,
  "countdown": numbers_used_once,
  "complex_arithmetic": finite,
  "game_of_life_halting": same_text,
  "fraction_simplification": same_words,
  "kakurasu": same_words,
  "knights_knaves": same_words,
  "letter_jumble": same_words,
  "polynomial_equations": only_numbers,
  "sokoban": only_moves,
  "spell_backward": same_text,
  "survo": same_words,
  "time_intervals": same_words,
}


# Data sets whose scorer is replaced: it misjudges right answers too.
REPLACED: dict[str, Confirm] = {
  "coin_flip": partial(same_number, tolerance=Fraction(1, 1000)),
  "gsm_symbolic": same_number,
}


def guarded_score(
  name: str, score: Callable[[str, Mapping[str, Any]], float], answer: str, entry: Mapping[str, Any]
) -> float:
  """Returns the score of an answer, in [0, 1]; 0 for what is empty, refused or not confirmed.

  Args:
    name: the data set.
    score: its `score_answer`.
  """
  if not answer.strip():
    return 0.0
  if name in CLEAN:
    answer = CLEAN[name](answer, entry)
    if answer is None:
      return 0.0
  if name in REPLACED:
    return float(REPLACED[name](answer, entry))
  value = float(score(answer, entry))
  if not math.isfinite(value):
    return 0.0
  if value >= 1.0 and name in CONFIRM and not CONFIRM[name](answer, entry):
    return 0.0
  return min(max(value, 0.0), 1.0)


def _value(answer: str) -> tuple[Fraction, tuple[int, ...]] | None:
  from grpo_jax.tasks.countdown import expression_value

  return expression_value(answer)
