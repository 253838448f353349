"""Tests rotary embeddings against their definition, and the scalings against values by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import RopeScaling
from grpo_jax.models.rope import frequencies, rotate, rotation


def test_frequencies_are_powers_of_theta():
  expected = [500.0 ** (-2 * i / 12) for i in range(6)]
  np.testing.assert_allclose(frequencies(12, 500.0), expected, rtol=1e-6)
  assert frequencies(12, 500.0).dtype == np.float32


def test_linear_scaling_divides_every_frequency():
  scaling = RopeScaling("linear", factor=8.0)
  np.testing.assert_allclose(frequencies(6, 100.0, scaling) * 8, frequencies(6, 100.0), rtol=1e-6)


def test_llama3_scaling_depends_on_the_wavelength():
  """Theta 100 and a head size of 8: wavelengths of 6.3, 19.9, 62.8 and 198.7 tokens.

  With a context of 64 and limits of 1 and 4 turns, wavelengths below 16 stay and those above 64 are
  divided by 8. In between, the share that stays is (64 / wavelength - 1) / (4 - 1).
  """
  scaling = RopeScaling("llama3", factor=8.0, original=64, low=1.0, high=4.0)
  wavelengths = [2 * math.pi * 100 ** (i / 4) for i in range(4)]
  shares = [(64 / wavelength - 1) / 3 for wavelength in wavelengths]
  assert shares[0] > 1 > shares[1] > shares[2] > 0 > shares[3]
  factors = [1, shares[1] + (1 - shares[1]) / 8, shares[2] + (1 - shares[2]) / 8, 1 / 8]
  expected = [2 * math.pi / wavelength * factor for wavelength, factor in zip(wavelengths, factors)]
  np.testing.assert_allclose(frequencies(8, 100.0, scaling), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("rounded", "first", "last"),
  [(False, math.log(32 / (4 * 2 * math.pi)), math.log(32 / (2 * math.pi))), (True, 0, 2)],
)
def test_yarn_scaling_is_linear_in_the_index(rounded, first, last):
  """With head size 8 and theta e^4, frequency i makes 32 e^-i / (2 pi) turns in 32 tokens.

  The index with n turns is therefore log(32 / (2 pi n)): 0.24 for 4 turns and 1.63 for 1 turn,
  rounded outwards to 0 and 2.
  """
  scaling = RopeScaling("yarn", factor=4.0, original=32, low=1.0, high=4.0, rounded=rounded)
  expected = []
  for i in range(4):
    share = 1 - min(max((i - first) / (last - first), 0), 1)
    expected.append(math.exp(-i) * (share + (1 - share) / 4))
  assert expected[0] == 1
  assert expected[3] == math.exp(-3) / 4
  np.testing.assert_allclose(frequencies(8, math.exp(4), scaling), expected, rtol=1e-5)


def test_a_rotation_is_cos_and_sin_of_position_times_frequency():
  cos, sin = rotation(jnp.array([[0, 3]]), np.array([1.0, 0.5], np.float32), amplitude=2.0)
  np.testing.assert_allclose(cos[0], [[2, 2], [2 * math.cos(3), 2 * math.cos(1.5)]], rtol=1e-6)
  np.testing.assert_allclose(sin[0], [[0, 0], [2 * math.sin(3), 2 * math.sin(1.5)]], rtol=1e-6)


def test_rotation_turns_the_complex_number_of_each_pair():
  """Dimensions i and i + Dh/2 are real and imaginary part."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 9]])
  turns = frequencies(8, 50.0)
  actual = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), turns))
  angles = positions[:, :, None, None] * turns.astype(np.float64)
  expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  np.testing.assert_allclose(actual[..., :4], expected.real, atol=1e-5)
  np.testing.assert_allclose(actual[..., 4:], expected.imag, atol=1e-5)


def test_scores_depend_on_the_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

  def score(query_at, key_at):
    q_by, k_by = (rotation(jnp.array([[at]]), frequencies(8, 50.0)) for at in (query_at, key_at))
    return float((rotate(q, q_by) * rotate(k, k_by)).sum())

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotated_values_keep_their_dtype():
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  assert rotate(x, rotation(jnp.array([[1]]), frequencies(4, 10.0))).dtype == jnp.bfloat16
