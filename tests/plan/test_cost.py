"""Tests that the work counted in compiled programs is the work worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.plan.cost import Cost, Counter, group_size
from grpo_jax.plan.flops import matmul_flops
from grpo_jax.plan.hlo import parse_instruction


def compiled_cost(function, *arguments):
  return Counter(jax.jit(function).lower(*arguments).compile().as_text()).cost()


def test_costs_add_and_scale():
  cost = Cost(1.0, 2.0, {"all-gather": (1, 8.0)}) + Cost(3.0, 4.0, {"all-gather": (2, 1.0)}) * 2
  assert cost == Cost(7.0, 10.0, {"all-gather": (5, 10.0)})
  assert cost.sent == 10.0
  assert (Cost(between_slices=2.0) * 3 + Cost(between_slices=1.0)).between_slices == 7.0


def test_a_scanned_matmul_counts_every_iteration():
  """50 iterations of [8, 16] x [16, 16]: 50 * 2 * 8 * 16 * 16 FLOPs; XLA reports one fiftieth."""
  x, w = jnp.ones((8, 16)), jnp.ones((50, 16, 16))
  compiled = jax.jit(lambda x, w: jax.lax.scan(lambda c, a: (c @ a, None), x, w)[0]).lower(x, w)
  compiled = compiled.compile()
  once, iteration = Counter(compiled.as_text()).cost()
  assert once.flops == 50 * 2 * 8 * 16 * 16
  assert iteration.flops == 0
  assert compiled.cost_analysis()["flops"] < once.flops / 40
  # Each iteration reads its own matrix (and writes a copy of it), not the stack of all 50.
  assert 50 * 16 * 16 * 4 <= once.bytes < 10 * (50 * 16 * 16 * 4)


def test_a_data_dependent_loop_counts_apart():
  def function(x):
    return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[1].sum() < 1e6), body, (0, x @ x))[1]

  def body(carry):
    return carry[0] + 1, carry[1] @ carry[1] @ carry[1]

  x = jnp.ones((16, 16))
  once, iteration = compiled_cost(function, x)
  assert (once.flops, iteration.flops) == (2 * 16**3, 2 * 2 * 16**3)
  assert matmul_flops(jax.make_jaxpr(function)(x).jaxpr) == (2 * 16**3, 2 * 2 * 16**3)


def test_the_costliest_of_several_data_dependent_loops_counts():
  def condition(carry):
    return (carry[0] < 9) & (carry[1].sum() < 1e6)

  def function(x):
    for rows in (16, 8):
      carry = (0, x[:rows])
      x = jax.lax.while_loop(condition, lambda c: (c[0] + 1, c[1] @ c[1].T @ c[1]), carry)[1]
    return x

  x = jnp.ones((16, 16))
  _, iteration = compiled_cost(function, x)
  assert iteration.flops == 2 * 2 * 16**3
  assert matmul_flops(jax.make_jaxpr(function)(x).jaxpr) == (0, 2 * 2 * 16**3)


def test_collectives_and_what_a_device_sends():
  """A sum of [4, 6] float32 over 4 devices: a ring sends 2 * 3/4 of it; a gather 3 times a part."""
  mesh = meshes.make_mesh((4, 1, 1), jax.devices()[:4])
  x = jax.device_put(jnp.ones((16, 6)), meshes.batch_sharding(mesh))

  def collectives(function):
    jitted = jax.jit(function, out_shardings=meshes.replicated(mesh))
    return Counter(jitted.lower(x).compile().as_text()).cost()[0].collectives

  all_reduce = collectives(lambda x: x.reshape(4, 4, 6).sum(0))
  assert all_reduce == {"all-reduce": (1, 2 * 3 / 4 * 4 * 6 * 4)}
  assert collectives(lambda x: x + 1) == {"all-gather": (1, 3 * 4 * 6 * 4)}


# As the TPU compiler writes a program: matmuls are convolutions, a batch is a window.
TPU_TEXT = """\
HloModule m, num_partitions=8

%cond (p: (s32[], bf16[1,4,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(13)
  %p = (s32[]{:T(128)}, bf16[1,4,8]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="a (b)"}
}

%fused (a: f32[7,8,8], i: s32[]) -> f32[1,8,8] {
  %a = f32[7,8,8]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%a, %i.1, %zero, %zero)
}

%body (p.1: (s32[], bf16[1,4,8], f32[7,8,8])) -> (s32[], bf16[1,4,8], f32[7,8,8]) {
  %p.1 = (s32[]{:T(128)}, bf16[1,4,8]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[7,8,8]{2,1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[1,4,8]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %stack = f32[7,8,8]{2,1,0:T(8,128)} get-tuple-element(%p.1), index=2
  %w = f32[1,8,8]{2,1,0:T(8,128)S(1)} fusion(%stack, %i.2), kind=kLoop, calls=%fused
  %y = bf16[1,4,8]{2,1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), window={size=1}, dim_labels=0bf_0io->0bf
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.2, %two)
  %sum = bf16[1,4,8]{2,1,0:T(8,128)(2,1)S(1)} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%cond
  ROOT %out = (s32[]{:T(128)}, bf16[1,4,8]{2,1,0}, f32[7,8,8]{2,1,0}) tuple(%next, %sum, %stack)
}

ENTRY %main (x: bf16[1,4,8], a: f32[7,8,8]) -> bf16[1,4,8] {
  %t = (s32[]{:T(128)}, bf16[1,4,8]{2,1,0}, f32[7,8,8]{2,1,0}) tuple(%z, %x.1, %a.1)
  %loop = (s32[], bf16[1,4,8]{2,1,0}, f32[7,8,8]{2,1,0}) while(%t), condition=%cond, body=%body
  %q = f32[5,3,4]{2,1,0} parameter(2)
  %k = f32[5,6,4]{2,1,0} parameter(3)
  %s = f32[5,3,6]{2,1,0} convolution(%q, %k), window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0oi->0bf
  ROOT %r = bf16[1,4,8]{2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_the_text_of_a_tpu_program():
  once, iteration = Counter(TPU_TEXT).cost()
  # From 0 below 13 in steps of 2 are 7 iterations: as many matmuls of [4, 8] x [8, 8]. And 5 of
  # [3, 4] x [4, 6]: for each output, one of the five window positions is not a gap.
  assert once.flops == 7 * 2 * 4 * 8 * 8 + 5 * 2 * 3 * 4 * 6
  # An iteration reads one matrix of the stack and its index, and increments the counter (three
  # numbers); the rest is on the chip. Then the last matmul.
  loop = 7 * (8 * 8 * 4 + 4 + 3 * 4)
  assert once.bytes == loop + 4 * (5 * 3 * 4 + 5 * 6 * 4 + 5 * 3 * 6)
  # 4 devices, 64 bytes each: 2 * 3/4 of them are sent.
  assert once.collectives == {"all-reduce": (7, 7 * 96)}
  assert iteration == Cost()


# Seven times a sum of [8, 4] within a slice of 4 devices, and of its parts between two slices.
SLICES_TEXT = """\
HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[] constant(7)
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %part = f32[2,4]{1,0} reduce-scatter(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %token = token[] after-all()
  %send = (f32[2,4]{1,0}, u32[], token[]) send(%part, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv = (f32[2,4]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %received = (f32[2,4]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %summed = f32[2,4]{1,0} get-tuple-element(%received), index=0
  %whole = f32[8,4]{1,0} all-gather(%summed), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%next, %whole)
}

ENTRY %main (y: f32[8,4]) -> (s32[], f32[8,4]) {
  %y = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,4]{1,0}) tuple(%zero, %y)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond, body=%body
}
"""  # noqa: E501


def test_bytes_to_other_slices_count_apart():
  once, _ = Counter(SLICES_TEXT).cost()
  assert once.between_slices == 7 * 2 * 4 * 4
  # A device sends 3/4 of [8, 4], and then its [2, 4] to three others.
  sent = {"reduce-scatter": (7, 7 * 96), "all-gather": (7, 7 * 96)}
  assert once.collectives == sent
  assert once.sent == 2 * 7 * 96


# An all-gather that overlaps a loop: it starts before, continues in each iteration, ends after.
CHAIN_TEXT = """\
HloModule m, num_partitions=8

%start (a: f32[2,4]) -> (f32[2,4], f32[16,4], u32[]) {
  %a = f32[2,4]{1,0} parameter(0)
  %g = f32[16,4]{1,0} all-gather(%a), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
  ROOT %s = (f32[2,4]{1,0}, f32[16,4]{1,0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%step (a.1: f32[2,4], x: f32[4]) -> (f32[16,4], f32[4]) {
  %a.1 = f32[2,4]{1,0} parameter(0)
  %x = f32[4]{0} parameter(1)
  %g.1 = f32[16,4]{1,0} all-gather(%a.1), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
  ROOT %t = (f32[16,4]{1,0}, f32[4]{0}) tuple(%g.1, %x)
}

%done (a.2: f32[2,4], u: u32[]) -> f32[16,4] {
  %a.2 = f32[2,4]{1,0} parameter(0)
  %u = u32[] parameter(1)
  %g.2 = f32[16,4]{1,0} all-gather(%a.2), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
  ROOT %d = f32[16,4]{1,0} custom-call(%a.2, %g.2, %u), custom_call_target="AsyncCollectiveDone"
}

%cond (p: (s32[], f32[2,4], f32[4])) -> pred[] {
  %n = s32[] constant(5)
  %p = (s32[], f32[2,4]{1,0}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f32[2,4], f32[4])) -> (s32[], f32[2,4], f32[4]) {
  %p.1 = (s32[], f32[2,4]{1,0}, f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %b = f32[2,4]{1,0} get-tuple-element(%p.1), index=1
  %y = f32[4]{0} get-tuple-element(%p.1), index=2
  %beside = (f32[16,4]{1,0}, f32[4]{0}) fusion(%b, %y), kind=kLoop, calls=%step
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %out = (s32[], f32[2,4]{1,0}, f32[4]{0}) tuple(%next, %b, %y)
}

ENTRY %main (a.3: f32[2,4], z: f32[4]) -> f32[16,4] {
  %a.3 = f32[2,4]{1,0} parameter(0)
  %z = f32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %started = (f32[2,4]{1,0}, f32[16,4]{1,0}, u32[]) fusion(%a.3), kind=kCustom, calls=%start
  %t.1 = (s32[], f32[2,4]{1,0}, f32[4]{0}) tuple(%zero, %a.3, %z)
  %loop = (s32[], f32[2,4]{1,0}, f32[4]{0}) while(%t.1), condition=%cond, body=%body
  %flag = u32[] get-tuple-element(%started), index=2
  ROOT %r = f32[16,4]{1,0} fusion(%a.3, %flag), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_an_overlapped_collective_counts_where_it_starts():
  once, _ = Counter(CHAIN_TEXT).cost()
  assert once.collectives == {"all-gather": (1, 7 * 2 * 4 * 4)}


@pytest.mark.parametrize(
  ("groups", "size"),
  [("{{0,1,2},{3,4,5}}", 3), ("[2,4]<=[8]", 4), ("[4,2]<=[2,4]T(1,0)", 2), ("{}", 8),
   ("mesh['a'=2,'b'=3,'c'=4] {'a','c'}", 8)],
)  # fmt: skip
def test_the_size_of_device_groups(groups, size):
  line = f"%a = f32[1] all-gather(%b), replica_groups={groups}, dimensions={{0}}"
  assert group_size(parse_instruction(line), 8) == size
