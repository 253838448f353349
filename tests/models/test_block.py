"""The products of a layer: their gradients are those of `h @ w`, computed the cheaper way."""

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


def pulled_back(function, h, weight, dy):
  value, back = jax.vjp(function, h, weight)
  return value, *back(dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_are_those_of_a_matrix_product(sizes, dtype):
  h, weight, dy = operands(sizes, dtype)
  got = pulled_back(matmul, h, weight, dy)
  # by definition, in float64; what is rounded to bfloat16 has 8 bits
  wide = [np.asarray(one, np.float64) for one in (h, weight, dy)]
  wanted = (
    wide[0] @ wide[1],
    wide[2] @ wide[1].T,
    sum(np.outer(a, b) for a, b in zip(wide[0].reshape(30, -1), wide[2].reshape(30, -1))),
  )
  for one, want in zip(got, wanted, strict=True):
    assert one.dtype == dtype
    error = 1e-5 if dtype == jnp.float32 else 2**-8 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(one, np.float64), want, atol=error)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_it_can_be_recomputed_and_mapped(policy):
  h, weight, _ = operands(SIZES["widens"])

  def twice(times):
    def loss(h, weight):
      return jnp.sum(jnp.sin(times(jnp.sin(times(h, weight)), weight.T)) * h)

    return jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))

  got = jax.vmap(twice(matmul), (0, None))(h, weight)
  want = jax.vmap(twice(jnp.matmul), (0, None))(h, weight)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_narrower_factor_is_the_one_that_is_transposed(sizes):
  """The matmul over all rows takes the wider factor as it lies: it stands on the right."""
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
