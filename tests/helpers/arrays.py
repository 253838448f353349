"""Comparisons of arrays, and their precision."""

import jax
import numpy as np


def assert_close(actual, expected, rtol=2e-6, atol=1e-6):
  """Asserts that two arrays agree, by default within rounding of float32; they may broadcast."""
  np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def float64():
  """Returns a context manager that enables float64, in every jax that the core supports."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  from jax.experimental import enable_x64  # before jax 0.8

  return enable_x64()
