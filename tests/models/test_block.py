"""Tests that the products of a layer have the gradients of `h @ w`, computed the cheaper way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.block import matmul

SIZES = {"widens": (4, 10), "narrows": (10, 4), "square": (6, 6)}


def operands(sizes, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = ((2, 3, 5, sizes[0]), sizes, (2, 3, 5, sizes[1]))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_vjp(function, h, weight, dy):
  value, back = jax.vjp(function, h, weight)
  return value, *back(dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_are_those_of_a_matrix_product(sizes, dtype):
  h, weight, dy = operands(sizes, dtype)
  results = value_and_vjp(matmul, h, weight, dy)
  # The definition in float64; bfloat16 has 8 bits.
  wide = [np.asarray(array, np.float64) for array in (h, weight, dy)]
  definition = (
    wide[0] @ wide[1],
    wide[2] @ wide[1].T,
    sum(np.outer(a, b) for a, b in zip(wide[0].reshape(30, -1), wide[2].reshape(30, -1))),
  )
  for actual, expected in zip(results, definition, strict=True):
    assert actual.dtype == dtype
    error = 1e-5 if dtype == jnp.float32 else 2**-8 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=error)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_matmul_can_be_rematerialized_and_vmapped(policy):
  h, weight, _ = operands(SIZES["widens"])

  def gradient(multiply):
    def loss(h, weight):
      return jnp.sum(jnp.sin(multiply(jnp.sin(multiply(h, weight)), weight.T)) * h)

    return jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))

  actual = jax.vmap(gradient(matmul), (0, None))(h, weight)
  expected = jax.vmap(gradient(jnp.matmul), (0, None))(h, weight)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
  )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_narrower_factor_is_transposed(sizes):
  """The product over all rows has the wider factor, which is not transposed, on the right."""
  h, weight, dy = operands(sizes)
  program = jax.make_jaxpr(lambda h, w, dy: jax.vjp(matmul, h, w)[1](dy))(h, weight, dy)
  (over_rows,) = (
    equation
    for equation in program.eqns
    if equation.primitive.name == "dot_general"
    and len(equation.params["dimension_numbers"][0][0]) == 3
  )
  left, right = (operand.aval.shape[-1] for operand in over_rows.invars)
  assert (left, right) == tuple(sorted(sizes))
