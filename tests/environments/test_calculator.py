"""Tests exact arithmetic on hostile text."""

import time
from fractions import Fraction

import pytest

from grpo_jax.environments.calculator import calculator


@pytest.mark.parametrize(
  ("expression", "value"),
  [
    ("12*7", "84"), (" 12 * (7 - 9) ", "-24"), ("-3 ** 2", "-9"), ("(-3)**2", "9"), ("7 // 2", "3"),
    ("-7 // 2", "-4"), ("-7 % 3", "2"), ("7 / 2", "3.5"), ("0.1 + 0.2", "0.3"), ("1 / 8", "0.125"),
    ("-1 / 8", "-0.125"), ("1/3 + 2/3", "1"), ("2 ** -2", "0.25"), ("2 × 3 − 1", "5"),
    ("6 ÷ 4", "1.5"), ("1e3", "1000"), ("0 ** 0", "1"), ("1 ** 10**9", "1"),
    ("(-1) ** 1000001", "-1"), ("0 ** 5", "0"), ("2 ** 100", str(2**100)), ("+5", "5"),
    ("1 / 3", "1/3 (about 0.3333333333)"), ("1 / 400", "0.0025"), ("1_000 + 1", "1001"),
  ],
)  # fmt: skip
def test_values(expression, value):
  assert calculator(expression) == value


def test_random_expressions_are_exact():
  import random

  rng = random.Random(0)
  for _ in range(100):
    a, b, c = (rng.randint(1, 999) for _ in range(3))
    expected = Fraction(a) + b * c
    assert calculator(f"{a} + {b} * {c}") == str(expected)


@pytest.mark.parametrize(
  ("expression", "message"),
  [
    ("9**9**9", "result of \\*\\* would be too large"), ("2**5000", "too large"),
    ("10**1233 * 10", "too large"), ("0.5 ** 99999", "too large"), ("1/0", "division by zero"),
    ("1 // 0", "division by zero"), ("1 % 0", "division by zero"), ("0 ** -1", "division by zero"),
    ("4 ** 0.5", "must be a whole number"), ("x + 1", "'x' is not a number"), ("1, 234", "commas"),
    ("__import__('os')", "is not a number"), ("(1).real", "is not a number"), ("'a' * 9", "'a'"),
    ("True + 1", "True"), ("1j", "1j"), ("2 ^ 3", "a power is written"), ("1 << 9", "is not a"),
    ("[1]", "is not"), ("1 if 1 else 2", "is not"), ("lambda: 1", "is not"), ("1 <", "arithmetic"),
    ("", "arithmetic"), ("1\0", "arithmetic"), ("(" * 150, "arithmetic"), ("-" * 190 + "1", "1"),
    ("1" * 201, "201 characters"), ("1e999", "too large"), ("~1", "is not"), ("not 1", "is not"),
    ("a := 1", "arithmetic"), ("f'{1}'", "is not"), ("...", "is not"),
  ],
)  # fmt: skip
def test_everything_else_is_refused_at_once(expression, message):
  began = time.monotonic()
  if expression.startswith("--"):
    assert calculator(expression) == "1"
  else:
    with pytest.raises(ValueError, match=message):
      calculator(expression)
  assert time.monotonic() - began < 1
