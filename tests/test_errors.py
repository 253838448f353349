"""Quoting an error in another: one line, and not a long one."""

import pytest

from grpo_jax.errors import first_line


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
