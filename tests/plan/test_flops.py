"""Tests that FLOPs of traced programs are those worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.plan.flops import instruction_flops, kernel_cost, matmul_flops
from grpo_jax.plan.hardware import open_topology
from grpo_jax.plan.hlo import parse_instruction
from grpo_jax.plan.programs import open_programs
from tests.helpers.plans import load, needs_libtpu


def flops(function, *arguments, **options):
  return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr, **options)


def test_a_batched_matmul():
  """5 of [3, 4] x [4, 6]."""
  q, k = jnp.ones((5, 3, 4)), jnp.ones((5, 6, 4))
  assert flops(lambda q, k: jnp.einsum("bmk,bnk->bmn", q, k), q, k) == (5 * 2 * 3 * 4 * 6, 0)


def test_a_scan_counts_every_iteration():
  x, w = jnp.ones((8, 16)), jnp.ones((50, 16, 16))
  once, _ = flops(lambda x, w: jax.lax.scan(lambda c, a: (c @ a, None), x, w)[0], x, w)
  assert once == 50 * 2 * 8 * 16 * 16


def test_one_branch_of_a_cond_counts():
  def function(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

  assert flops(function, jnp.ones((4, 4))) == (2 * 2 * 4**3, 0)


def test_a_shard_map_counts_all_devices():
  """4 devices, each [2, 6] x [6, 3]; the axes that do not shard an input repeat no work."""
  mesh = meshes.make_mesh((4, 1, 2), jax.devices()[:8])
  rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  function = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  assert flops(function, jnp.ones((8, 6)), jnp.ones((6, 3))) == (4 * 2 * 2 * 6 * 3, 0)


def test_grouped_matmuls_count_each_row_once():
  rows, matrices, sizes = jnp.ones((12, 6)), jnp.ones((4, 6, 5)), jnp.array([3, 0, 8, 1])

  def grouped(rows, matrices):
    return jax.lax.ragged_dot(rows, matrices, sizes)

  def loss(rows, matrices):
    return jnp.sum(grouped(rows, matrices) ** 2)

  assert flops(grouped, rows, matrices) == (2 * 12 * 6 * 5, 0)
  # The forward product, and one for the gradient of each factor.
  assert flops(jax.grad(loss, (0, 1)), rows, matrices) == (3 * 2 * 12 * 6 * 5, 0)


def by_precision(dtype, precision):
  """Returns a weight that tells apart every dtype and precision."""
  wide = {"default": 2.0, "high": 3.0, "highest": 6.0}[precision]
  return wide if dtype == jnp.float32 else 1.0


@pytest.mark.parametrize(
  ("context", "precision", "weight"),
  [
    (None, None, 2),
    ("high", None, 3),
    ("highest", None, 6),
    ("default", None, 2),
    ("highest", jax.lax.Precision.DEFAULT, 2),  # a matmul's own precision comes first
    (None, (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST), 6),
  ],
)
def test_matmuls_are_weighted_by_precision(context, precision, weight):
  def function(x, w):
    def layer(carry, row):
      return jnp.dot(carry, row, precision=precision), None

    return jax.lax.scan(layer, x, w)[0]

  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  with jax.default_matmul_precision(context):
    assert flops(function, x, w)[0] == 5 * 2 * 8 * 16 * 16
    assert flops(function, x, w, weight=by_precision)[0] == weight * 5 * 2 * 8 * 16 * 16


def test_the_wider_operand_decides_and_bfloat16_has_no_precisions():
  half, single = jnp.ones((4, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.float32)

  def dot(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)

  with jax.default_matmul_precision("highest"):
    assert flops(dot, half, half, weight=by_precision)[0] == 2 * 4**3
    assert flops(dot, half, single, weight=by_precision)[0] == 6 * 2 * 4**3


@pytest.mark.parametrize(
  ("scope", "cost"),
  [("a/kernel_100_ops_7_bytes/splash_mha_fwd", (200, 7)),
   ("a/kernel_100_ops_7_bytes/splash_mha_dkv", (400, 7)),
   ("a/kernel_100_ops_7_bytes/__cudnn$fmhaSoftmaxBackward", (500, 7)),
   ("a/kernel_100_ops_7_bytes/__cudnn$fmhaSoftmax", (200, 7)),
   ("a/kernel_100_ops_7_bytes/other", None),
   ("a/splash_mha_fwd", None)],
)  # fmt: skip
def test_a_kernel_costs_what_its_scope_says(scope, cost):
  assert kernel_cost(scope) == cost


def test_other_instructions_have_no_flops():
  scope = {"a": parse_instruction("%a = f32[4] parameter(0)")}
  assert instruction_flops(parse_instruction("%b = f32[4] add(%a, %a)"), scope) == 0


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_program_does_the_flops_of_its_kernels():
  """The compiled program does what was traced, matmuls in kernels included."""
  from grpo_jax.plan.estimate import compile_program

  topology = open_topology("v5e:2x2")
  programs = open_programs(load("model.dtype=bfloat16", "model.attention=splash"), topology)
  for name, part in (("update", "update"), ("sample", "prefill")):
    traced, _ = matmul_flops(getattr(programs, name)().trace().jaxpr)
    cost, excess, _ = compile_program(programs, name)[1][part]
    assert excess == pytest.approx(1, abs=0.02)
    assert cost.flops >= traced / 4
