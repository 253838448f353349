"""Tests that tests are split into units."""

import ast

import pytest

from grpo_jax.environments import unit_tests


def results(source, **names):
  """Returns what the units of a source report, in order."""
  reported = []
  tree, count = unit_tests.split(source)
  namespace = {unit_tests.RECORD: reported.append, **names}
  exec(compile(tree, "tests", "exec"), namespace)
  if unit_tests.check_function(tree):
    namespace["check"](namespace["f"])
  return reported, count


@pytest.mark.parametrize(
  ("source", "expected", "count"),
  [
    ("assert f(1) == 2\nassert f(2) == 3", [True, False], 2),
    ("def check(c):\n  assert c(1) == 2\n  x = c(2)\n  assert x == 4\n  assert x == 5",
     [True, True, False], 3),
    ("def check(c):\n  for i in range(9):\n    assert c(i) == 2 * i", [True], 1),
    ("def check(c):\n  for i in range(9):\n    assert c(i) == i", [False], 1),
    ("def check(c):\n  assert True, 'debugging'\n  assert c(1) == 2", [True], 1),
    ("def same(a, b):\n  assert a == b\ndef check(c):\n  same(c(1), 2)\n  same(c(2), 4)",
     [True], 1),
    ("def same(a, b):\n  assert a == b\ndef check(c):\n  same(c(1), 2)\n  same(c(2), 5)",
     [False], 1),
    # What follows the definition, as some data sets have it, is the tester's to do.
    ("def check(c):\n  assert c(1) == 2\ncheck(f)", [True], 1),
    ("assert f('x') == 'xx' and f(1, 2)", [False], 1),
  ],
)  # fmt: skip
def test_units_report_one_by_one(source, expected, count):
  assert results(source, f=lambda x: 2 * x) == (expected, count)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("assert f(", "not Python"),
    ("print(f(1))", "nothing is asserted"),
    ("", "nothing is asserted"),
    ("assert f(1) == '\0'", "not Python"),
  ],
)
def test_what_is_no_test_is_refused(source, message):
  with pytest.raises(ValueError, match=message):
    unit_tests.split(source)


def test_names_are_those_that_are_read():
  assert unit_tests.names(ast.parse("x = f(y)\nassert x == math.pi")) == {"f", "y", "x", "math"}
