"""Tests argument checks: conversions, and errors that name the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core import checks


def test_as_float_widens_to_the_default_float_or_float32(x64):
  """Integers become the default float. float32 is wide enough and stays."""
  dtypes = {
    jnp.int32: jnp.float64,
    jnp.bool_: jnp.float64,
    jnp.float64: jnp.float64,
    jnp.float32: jnp.float32,
    jnp.bfloat16: jnp.float32,
    jnp.float16: jnp.float32,
  }
  for dtype, expected in dtypes.items():
    assert checks.as_float("x", jnp.ones(2, dtype)).dtype == expected


def test_as_float_accepts_lists_and_none_within_them_is_an_error():
  assert checks.as_float("x", [1, 0]).tolist() == [1.0, 0.0]
  with pytest.raises(ValueError, match=r"^x must be an array of numbers, got \[1.0, None\]"):
    checks.as_float("x", [1.0, None])
  with pytest.raises(ValueError, match=r"^x must be real, got dtype complex64"):
    checks.as_float("x", jnp.zeros(2, jnp.complex64))


def test_as_mask():
  assert checks.as_mask("m", np.array([2, 0, -1])).tolist() == [True, False, True]
  assert checks.as_mask("m", np.array([True, False]), (2,)).tolist() == [True, False]
  with pytest.raises(ValueError, match=r"^m has shape \(2,\), expected \(3,\)"):
    checks.as_mask("m", np.array([True, False]), (3,))
  message = r"^m must be boolean \(or 0/1 integers\), got dtype float32; pass m.astype\(bool\), and"
  with pytest.raises(ValueError, match=message):
    checks.as_mask("m", np.ones(2, np.float32))


def test_as_tokens_does_not_wrap():
  tokens = checks.as_tokens("t", np.array([200, 255], np.uint8), (2,))
  assert tokens.dtype == jnp.int32
  assert tokens.tolist() == [200, 255]
  with pytest.raises(ValueError, match=r"^t must hold integer token ids, got dtype bool"):
    checks.as_tokens("t", np.array([True]))
  with pytest.raises(ValueError, match=r"^t has shape \(1,\), expected \(2,\)"):
    checks.as_tokens("t", np.array([1]), (2,))


def test_check_rank():
  checks.check_rank("x", np.zeros((1, 2)), 2, "P, G")
  with pytest.raises(ValueError, match=r"^x has shape \(1, 2\), expected 3 axes \[P, G, T\]"):
    checks.check_rank("x", np.zeros((1, 2)), 3, "P, G, T")


def test_check_positive():
  checks.check_positive("x", 1e-9)
  jax.jit(lambda value: checks.check_positive("x", value))(-1.0)  # traced: nothing to check
  for bad in (0, -1.0, np.float32(0), np.inf, np.nan):
    with pytest.raises(ValueError, match=rf"^x must be a finite number above 0, got {bad}"):
      checks.check_positive("x", bad)


def test_lookup():
  table = {"b": 1, "a": 2}
  assert checks.lookup("letter", table, "a") == 2
  assert checks.lookup("letter", table, len) is len
  for bad in ("c", None, ["a"]):
    with pytest.raises(ValueError, match=r"^unknown letter .*; known: a, b$"):
      checks.lookup("letter", table, bad)
