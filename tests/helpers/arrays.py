"""Comparisons of arrays."""

import numpy as np


def assert_close(actual, expected, rtol=2e-6, atol=1e-6):
  """Asserts that two arrays agree within rounding of float32; shapes must broadcast."""
  np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)
