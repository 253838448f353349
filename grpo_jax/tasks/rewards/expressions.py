"""Bounds the size of sympy expressions, and compares the numbers in them.

Numbers are compared exactly where they are rational, otherwise relative to their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

MAX_BITS = 50_000  # size of a number, and of the numbers on the way to it
MAX_PLACES = 500  # decimal places of a written decimal
DIGITS = 6  # significant digits from which on a decimal may stand for the number it approximates


def is_small(expression: Any) -> bool:
  """Returns whether no number of an expression has more than `MAX_BITS` bits when evaluated."""
  try:
    return _bits(expression) <= MAX_BITS
  except (OverflowError, RecursionError):
    return False


def _bits(e: Any) -> float:
  """Returns an upper bound of the bits that an expression takes; OverflowError if it is large."""
  import sympy
  from sympy.functions.combinatorial import factorials

  if isinstance(e, sympy.MatrixBase):
    return sum(_bits(entry) for entry in e.flat())
  if isinstance(e, sympy.Float):
    return 64.0 + abs(math.log2(abs(e)) if e else 0.0)
  if isinstance(e, sympy.Rational):
    return float(max(abs(e.p).bit_length(), e.q.bit_length(), 1))
  if isinstance(e, sympy.Pow | sympy.exp | sympy.MatPow):
    base, exponent = e.as_base_exp() if isinstance(e, sympy.exp) else e.args
    if exponent.free_symbols:
      return _checked(_bits(base) + _bits(exponent))
    largest = _largest(exponent)
    if getattr(base, "free_symbols", None) or isinstance(base, sympy.MatrixBase):
      many = isinstance(base, sympy.Add | sympy.MatrixBase)
      return _checked(_bits(base) * largest * (400 if many else 1) / 16)
    return _checked(_bits(base) * largest)
  if isinstance(e, factorials.CombinatorialFunction | sympy.gamma) and e.args:
    bound = _largest(e.args[0])
    if isinstance(e, sympy.binomial):
      chosen = 2.0 ** min(_bits(e.args[1]), 30)
      return _checked(min(bound, chosen * math.log2(bound + 2)))
    return _checked(bound * math.log2(bound + 2))
  if isinstance(e, sympy.Sum | sympy.Product):
    for bounds in e.args[1:]:
      _checked(sum(2.0 ** min(_bits(b), 30) for b in bounds[1:] if b.is_number and b.is_finite))
  return _checked(4.0 + sum(map(_bits, getattr(e, "args", ()))))


def _largest(exponent: Any) -> float:
  """Returns a bound of the absolute value of an exponent or an argument of a factorial."""
  if exponent.is_Integer:
    return _checked(float(min(abs(exponent.p), 10**9)))
  return _checked(2.0 ** min(_bits(exponent), 30))


def _checked(bits: float) -> float:
  if bits > MAX_BITS:
    raise OverflowError
  return bits


def is_number(e: Any) -> bool:
  """Returns whether an expression is a single number, without variables."""
  import sympy

  return isinstance(e, sympy.Expr) and not e.free_symbols


def _rational(e: Any) -> Fraction | None:
  """Returns the exact value of an expression of rational numbers, None for anything else."""
  import sympy

  if isinstance(e, sympy.Float):
    return Fraction(str(e))
  if isinstance(e, sympy.Rational):
    return Fraction(int(e.p), int(e.q))
  parts = [_rational(argument) for argument in e.args]
  if not parts or None in parts:
    return None
  if isinstance(e, sympy.Add):
    return sum(parts, Fraction(0))
  if isinstance(e, sympy.Mul):
    return math.prod(parts, start=Fraction(1))
  if isinstance(e, sympy.UnevaluatedExpr):
    return parts[0]
  if isinstance(e, sympy.Abs):
    return abs(parts[0])
  if isinstance(e, sympy.Pow) and parts[1].denominator == 1 and (parts[0] or parts[1] > 0):
    return parts[0] ** int(parts[1])
  if isinstance(e, sympy.factorial) and parts[0].denominator == 1 and parts[0] >= 0:
    return Fraction(math.factorial(int(parts[0])))
  return None


def same_numbers(gold: Any, other: Any) -> bool | None:
  """Returns whether two numbers are equal; None if their values do not tell.

  Numbers with an exact rational value are compared exactly, others to 50 digits, relative to their
  size. A decimal of at least `DIGITS` digits equals the number that it is the rounded value of.
  """
  import sympy

  percents = [e.has(sympy.UnevaluatedExpr) for e in (gold, other)]
  values = [_rational(e) for e in (gold, other)]
  if None not in values:
    scales = {1} if percents[0] == percents[1] else {1, 100}
    decimal = [e.has(sympy.Float) for e in (gold, other)]
    units = [decimal_unit(v) if is_decimal else None for v, is_decimal in zip(values, decimal)]
    scaled = [[v * s if p else v for v, p in zip(values, percents)] for s in scales]
    return any(a == b or rounds_to((a, b), units) for a, b in scaled)
  numbers = [e.evalf(60) if v is None else sympy.Rational(v.numerator, v.denominator).evalf(60)
             for e, v in zip((gold, other), values)]  # fmt: skip
  if not all(n.is_number and n.is_finite and _precise(n) for n in numbers):
    return None
  if not any(e.has(sympy.Float) for e in (gold, other)):
    return bool(abs(numbers[0] - numbers[1]) <= abs(numbers[0]) * sympy.Float("1e-50", 60))
  if values.count(None) == 2 or not all(n.is_real for n in numbers):
    return None
  exact = [Fraction(str(n)) if v is None else v for n, v in zip(numbers, values)]
  return rounds_to(exact, [None if v is None else decimal_unit(v) for v in values])


def _precise(value: Any) -> bool:
  """Returns whether all digits of an evaluated number are known: a vanishing sum has none."""
  return all(part.is_zero or part._prec > 150 for part in value.as_real_imag() if part.is_Float)


def decimal_unit(value: Fraction) -> Fraction | None:
  """Returns the value of a decimal's last digit; None for a whole number or a short decimal."""
  places = 0
  while value.denominator != 1 and 10**places % value.denominator and places < MAX_PLACES:
    places += 1
  if not places or 10**places % value.denominator:
    return None
  return Fraction(1, 10**places) if abs(value) * 10**places >= 10 ** (DIGITS - 1) else None


def rounds_to(values: Sequence[Fraction], units: Sequence[Fraction | None]) -> bool:
  """Returns whether one of two numbers, in its last digit, is the rounded value of the other."""
  return any(unit is not None and abs(values[0] - values[1]) <= unit / 2 for unit in units)


def confirms(gold: Any, other: Any) -> bool:
  """Returns False if numbers at the same place of two expressions differ; otherwise True."""
  import sympy

  if isinstance(gold, str) or isinstance(other, str):
    return True
  gold, other = _right_side(gold), _right_side(other)
  if is_number(gold) and is_number(other):
    return same_numbers(gold, other) is not False
  if isinstance(gold, sympy.Expr) and isinstance(other, sympy.Expr):
    return _agree_at_points(gold, other)
  parts, rest = _parts(gold), _parts(other)
  if len(parts) != len(rest):
    return True
  for part in parts:
    match = next((i for i, candidate in enumerate(rest) if confirms(part, candidate)), None)
    if match is None:
      return False
    rest.pop(match)
  return True


def _right_side(e: Any) -> Any:
  """Returns 5 for the equation x = 5, and other expressions as they are."""
  import sympy

  return e.rhs if isinstance(e, sympy.Eq) and isinstance(e.lhs, sympy.Symbol) else e


def _parts(e: Any) -> list[Any]:
  import sympy

  if isinstance(e, sympy.MatrixBase):
    return list(e.flat())
  if isinstance(e, sympy.Interval):
    return [e.start, e.end]
  return list(e.args) if isinstance(e, sympy.Tuple | sympy.FiniteSet | sympy.Union) else []


def _agree_at_points(gold: Any, other: Any) -> bool:
  """Returns False if two expressions differ, relative to their size, for numbers as variables."""
  import sympy

  names = sorted(gold.free_symbols | other.free_symbols, key=str)
  for shift in (3, 7):
    point = {s: sympy.Rational(10 * i + shift, 10 * i + shift + 4) for i, s in enumerate(names)}
    values = [e.xreplace(point).evalf(40) for e in (gold, other)]
    if all(v.is_number and v.is_finite and _precise(v) for v in values):
      scale = max(map(abs, values))
      if abs(values[0] - values[1]) > scale * sympy.Float("1e-6", 40):
        return False
  return True
