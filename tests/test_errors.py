"""Quoting an error in another: one line, and not a long one."""

import pytest

from grpo_jax.errors import first_line, with_frames


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (ValueError("bad"), "ValueError: bad"),
    (OSError("\n  no network  \nmore"), "OSError: no network"),
    (KeyError("name"), "KeyError: 'name'"),
    (KeyboardInterrupt(), "KeyboardInterrupt: "),
    (ValueError("x" * 1000), "ValueError: " + "x" * (400 - len("ValueError: "))),
  ],
)
def test_an_error_is_quoted_by_its_type_and_first_line(error, expected):
  assert first_line(error) == expected


def test_frames_are_those_of_the_user_or_else_the_innermost():
  def raised(function):
    try:
      function()
    except Exception as error:
      return with_frames(error)

  def deep(n):
    return deep(n - 1) if n else 1 / 0

  class Silent(Exception):
    def __str__(self):
      raise RuntimeError

  def silent():
    raise Silent

  text = raised(lambda: deep(100))
  assert text.startswith("ZeroDivisionError: division by zero\n")
  assert len(text.splitlines()) < 40
  assert text.count("test_errors.py") <= 10
  assert raised(silent).startswith("Silent: an error that cannot be shown\n")
  assert len(raised(lambda: int("x" * 100_000))) < 5000
