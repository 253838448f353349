"""Counts the FLOPs of matmuls in a jaxpr, in optimized HLO and in attention kernels.

XLA's cost analysis cannot see into kernels.
"""

import math
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.typing import DTypeLike

from grpo_jax.plan.hlo import Instruction

# Matmuls over all query-key pairs in an attention kernel, by the kernel's name. Forward: the scores
# and the mixed values. Backward: the scores again, the gradient of the weights, and the gradients
# of q (dq), of k and v (dkv), or of all three.
MATMULS = {
  r"splash_mha_fwd": 2,
  r"splash_mha_dq": 3,
  r"splash_mha_dkv": 4,
  r"fmhaSoftmaxBackward|dot_product_attention_bwd": 5,
  r"fmhaSoftmax|dot_product_attention_fwd": 2,
}
# Primitives that call a kernel in a jaxpr.
KERNEL_CALLS = (
  "pallas_call",
  "dot_product_attention_fwd_wrapper",
  "dot_product_attention_bwd_wrapper",
)


def kernel_cost(scope: str) -> tuple[float, float] | None:
  """Returns (FLOPs, bytes read repeatedly) of an attention kernel; None for any other call.

  A compiled kernel does not state its cost. The named scope around its call does: see
  `models.kernels.cost_scope`.

  >>> kernel_cost("jit(step)/transpose(jvp(kernel_100_ops_7_bytes))/splash_mha_dq_no_residuals")
  (300.0, 7.0)

  Args:
    scope: named scopes of the call, ending in the kernel's name.
  """
  match = re.search(r"kernel_(\d+)_ops_(\d+)_bytes(.*)", scope)
  counts = [n for name, n in MATMULS.items() if match and re.search(name, match.group(3))]
  return (counts[0] * float(match.group(1)), float(match.group(2))) if counts else None


def unweighted(dtype: DTypeLike, precision: str) -> float:
  """Returns 1: every FLOP counts the same."""
  return 1.0


def matmul_flops(
  jaxpr: Jaxpr, scope: str = "", weight: Callable[[DTypeLike, str], float] = unweighted
) -> tuple[float, float]:
  """Counts the FLOPs of the matmuls of a traced program, over all devices.

  >>> import jax, jax.numpy as jnp
  >>> function = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0]
  >>> matmul_flops(jax.make_jaxpr(function)(jnp.ones((4, 4))).jaxpr)
  (384.0, 0.0)

  Args:
    jaxpr: the traced program.
    scope: named scopes of its caller.
    weight: `(wider dtype of the operands, precision) -> weight` of each FLOP of a matmul, where the
      precision is `default`, `high` or `highest`; `Chip.matmul_time`, for example.

  Returns:
    FLOPs that run once, and FLOPs of one iteration of the costliest loop with a data-dependent
    trip count.
  """
  once = iteration = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    path = f"{scope}/{equation.source_info.name_stack}"
    if name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      out = equation.outvars[0].aval.shape
      size = 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
      once += size * weight(
        jnp.result_type(*(v.aval for v in equation.invars)), _precision(equation)
      )
    if name == "ragged_dot_general":  # each row of the left factor meets one expert's matrix
      size = 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
      once += size * weight(
        jnp.result_type(*(v.aval for v in equation.invars[:2])), _precision(equation)
      )
    if name in KERNEL_CALLS and (cost := kernel_cost(f"{path}/{name}")):
      once += cost[0] * _mean_weight(equation, weight)
      continue
    inner = [matmul_flops(part, path, weight) for part in _inner(equation)]
    if name == "while":
      iteration = max(iteration, sum(a + b for a, b in inner))
    elif inner:
      count = _trip_count(equation)
      combine = max if name == "cond" else sum
      once += count * combine(a for a, _ in inner)
      iteration = max(iteration, *(count * b for _, b in inner))
  return once, iteration


def _precision(equation: JaxprEqn) -> str:
  """Returns the higher of the precisions of a matmul's operands."""
  precision = equation.params["precision"]
  pair = precision if isinstance(precision, tuple) else (precision,)
  names = {getattr(item, "name", "default").lower() for item in pair}
  return next((name for name in ("highest", "high") if name in names), "default")


def _mean_weight(kernel: JaxprEqn, weight: Callable[[DTypeLike, str], float]) -> float:
  """Returns the mean weight of the matmuls inside a kernel; 1 if they cannot be seen."""
  parts = _inner(kernel)
  plain = sum(matmul_flops(part)[0] for part in parts)
  return sum(matmul_flops(part, "", weight)[0] for part in parts) / plain if plain else 1.0


def _trip_count(equation: JaxprEqn) -> float:
  """Returns how often an equation runs its inner jaxprs, over all devices."""
  params = equation.params
  if equation.primitive.name == "scan":
    return params["length"]
  if equation.primitive.name == "shard_map":  # inner shapes are those of one device
    used = {axis for spec in params["in_specs"] for part in spec for axis in np.atleast_1d(part)}
    return math.prod(size for axis, size in params["mesh"].shape.items() if axis in used)
  if equation.primitive.name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
  """Returns the jaxprs inside an equation."""
  jaxprs = []
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        jaxprs.append(item)
  return jaxprs


# --- HLO ------------------------------------------------------------------------------------------


def instruction_flops(i: Instruction, scope: dict[str, Instruction]) -> float:
  """Returns the FLOPs of a matmul, which some compilers write as a convolution; 0 for other ops.

  Args:
    i: an HLO instruction.
    scope: instructions of its computation, by name.
  """
  if i.op not in ("dot", "convolution"):
    return 0.0
  left, right = (scope[o].leaves[0].dims for o in i.operands[:2])
  out = i.leaves[0].dims
  if i.op == "dot":
    contracted = [int(d) for d in i.attribute("lhs_contracting_dims").strip("{}").split(",") if d]
    return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
  lhs, rhs, result = re.split("_|->", i.attribute("dim_labels"))
  window = dict(item.split("=") for item in i.attribute("window").strip("{}").split())
  spatial = [label for label in result if label.isdigit()]

  def field(name: str, default: str) -> list[str]:
    return window[name].split("x") if name in window else [default] * len(spatial)

  flops = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
  for n, label in enumerate(spatial):
    flops *= _window_hits(
      inputs=left[lhs.index(label)],
      outputs=out[result.index(label)],
      window=right[rhs.index(label)],
      stride=int(field("stride", "1")[n]),
      pad=int(field("pad", "0_0")[n].split("_")[0]),
      input_dilation=int(field("lhs_dilate", "1")[n]),
      window_dilation=int(field("rhs_dilate", "1")[n]),
    )
  return flops


def _window_hits(
  *,
  inputs: int,
  outputs: int,
  window: int,
  stride: int,
  pad: int,
  input_dilation: int,
  window_dilation: int,
) -> int:
  """Counts the pairs of an output and a window position that fall on an input.

  The other pairs fall on padding or on a gap between dilated inputs, and need no multiply-add.
  """
  at = np.arange(outputs)[:, None] * stride + np.arange(window) * window_dilation - pad
  inside = (at >= 0) & (at <= (inputs - 1) * input_dilation)
  return int((inside & (at % input_dilation == 0)).sum())
