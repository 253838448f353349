"""Exact arithmetic on text that a model wrote: parsed, never evaluated, and bounded."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LENGTH = 200  # characters of an expression
BITS = 4096  # of the numerator and the denominator of every intermediate result
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
  """Computes the exact value of an arithmetic expression.

  Args:
    expression: Numbers, parentheses and the operators + - * / // % **, such as "12 * (7 + 5)".

  Returns:
    The value; one without a finite decimal form is a fraction, with its decimal value.

  Example:
    >>> calculator("12 * 7"), calculator("0.1 + 0.2"), calculator("1 / 3")
    ('84', '0.3', '1/3 (about 0.3333333333)')
    >>> calculator("9**9**9")
    Traceback (most recent call last):
    ValueError: the result of ** would be too large
  """
  if len(expression) > LENGTH:
    raise ValueError(f"the expression has {len(expression):,} characters; at most {LENGTH}")
  text = expression.strip().translate(str.maketrans("×·÷−", "**/-"))
  try:
    tree = ast.parse(text, mode="eval")
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    raise ValueError(f"{expression!r} is not an arithmetic expression") from None
  return _written(_value(tree.body))


def _value(node: ast.expr) -> Fraction:
  """Returns the value of a part of the expression; ValueError where it has none."""
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    if node.value in (float("inf"), float("-inf")):
      raise ValueError("a number is too large")
    return _bounded(Fraction(str(node.value)), "a number")  # 0.1 as it is written
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
    value = _value(node.operand)
    return -value if isinstance(node.op, ast.USub) else value
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
    return _power(_value(node.left), _value(node.right))
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
    left, right = _value(node.left), _value(node.right)
    if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
      raise ValueError("division by zero")
    return _bounded(Fraction(_OPERATORS[type(node.op)](left, right)), "a result")
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
    raise ValueError("^ is not an operator here; a power is written **")
  if isinstance(node, ast.Tuple):
    raise ValueError("write numbers without commas")
  raise ValueError(f"{ast.unparse(node)[:60]!r} is not a number or one of + - * / // % ** ( )")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
  if exponent.denominator != 1:
    raise ValueError("the exponent of ** must be a whole number")
  if base == 0 and exponent < 0:
    raise ValueError("division by zero")
  bits = max(base.numerator.bit_length(), base.denominator.bit_length())
  if base not in (-1, 0, 1) and (bits - 1) * abs(exponent) > BITS:
    raise ValueError("the result of ** would be too large")
  if base in (-1, 0, 1):
    exponent = exponent % 2 if base == -1 else min(exponent, 1)
  return _bounded(base ** int(exponent), "a result")


def _bounded(value: Fraction, what: str) -> Fraction:
  if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
    raise ValueError(f"{what} is too large")
  return value


def _written(value: Fraction) -> str:
  """Returns a whole number or a finite decimal as it is, else a fraction and about its value."""
  if value.denominator == 1:
    return str(value.numerator)
  rest, twos, fives = value.denominator, 0, 0
  while rest % 2 == 0:
    rest, twos = rest // 2, twos + 1
  while rest % 5 == 0:
    rest, fives = rest // 5, fives + 1
  places = max(twos, fives)
  if rest == 1 and places <= 20:
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
  exact = f"{value.numerator}/{value.denominator}"
  try:
    return f"{exact} (about {float(value):.10g})"
  except OverflowError:
    return exact
