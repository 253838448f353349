"""Operations of a program before it is compiled, and of kernels, which nobody can look into."""

import math
import re
from typing import Any

import numpy as np

# Products over all pairs of a query and a key in a kernel of attention, by its name: forward for
# scores and mixed values; backward for scores again, the gradient of weights, and then of q, of k
# and v, or of all three.
PRODUCTS = {
  r"splash_mha_fwd": 2,
  r"splash_mha_dq": 3,
  r"splash_mha_dkv": 4,
  r"fmhaSoftmaxBackward|dot_product_attention_bwd": 5,
  r"fmhaSoftmax|dot_product_attention_fwd": 2,
}
# What calls a kernel in a traced program.
CALLS = ("pallas_call", "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper")


def kernel_work(scope: str) -> tuple[float, float] | None:
  """(operations, bytes read over and over) of a kernel of attention; None for anything else.

  Nothing in a compiled kernel says what it does. The scope that it is called in does: see
  `models.kernels.work`.

  >>> kernel_work("jit(step)/transpose(jvp(kernel_100_ops_7_bytes))/splash_mha_dq_no_residuals")
  (300.0, 7.0)
  """
  called = re.search(r"kernel_(\d+)_ops_(\d+)_bytes(.*)", scope)
  times = [n for end, n in PRODUCTS.items() if called and re.search(end, called.group(3))]
  return (times[0] * float(called.group(1)), float(called.group(2))) if times else None


def product_ops(jaxpr: Any, scope: str = "") -> tuple[float, float]:
  """Operations of the matrix products of a traced program, over all devices.

  Returns (those that run once, those of one turn of the costliest loop that ends when the data
  says so).

  >>> import jax, jax.numpy as jnp
  >>> function = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0]
  >>> product_ops(jax.make_jaxpr(function)(jnp.ones((4, 4))).jaxpr)
  (384.0, 0.0)

  Args:
    scope: the names of what calls it.
  """
  once = turn = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    path = f"{scope}/{equation.source_info.name_stack}"
    if name == "dot_general":
      (summed, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      once += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in summed)
    if name in CALLS and (known := kernel_work(f"{path}/{name}")):
      once += known[0]
      continue
    inner = [product_ops(part, path) for part in _inner(equation)]
    if name == "while":
      turn = max(turn, sum(a + b for a, b in inner))
    elif inner:
      times = _times(equation)
      combine = max if name == "cond" else sum
      once += times * combine(a for a, _ in inner)
      turn = max(turn, *(times * b for _, b in inner))
  return once, turn


def _times(equation: Any) -> float:
  """How often an equation runs what is inside it, over all devices."""
  params = equation.params
  if equation.primitive.name == "scan":
    return params["length"]
  if equation.primitive.name == "shard_map":  # inside are the shapes of one device
    used = {axis for spec in params["in_specs"] for part in spec for axis in np.atleast_1d(part)}
    return math.prod(size for axis, size in params["mesh"].shape.items() if axis in used)
  if equation.primitive.name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1


def _inner(equation: Any) -> list[Any]:
  """Jaxprs inside an equation."""
  found = []
  for value in equation.params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      one = getattr(one, "jaxpr", one)
      if hasattr(one, "eqns"):
        found.append(one)
  return found
