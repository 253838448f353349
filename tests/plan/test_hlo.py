"""Tests that HLO text is parsed as the compilers write it."""

import pytest

from grpo_jax.plan.hlo import Module, parse_instruction


def test_an_instruction_with_a_tuple_shape_a_layout_and_attributes():
  line = (
    "  ROOT %f.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s4[5]{0}) fusion(%a.0, %b), "
    'kind=kLoop, calls=%fused.2, metadata={op_name="jit(f)/x"}'
  )
  instruction = parse_instruction(line)
  assert (instruction.name, instruction.op, instruction.root) == ("f.1", "fusion", True)
  assert instruction.operands == ["a.0", "b"]
  assert instruction.called("calls") == ["fused.2"]
  assert instruction.attribute("kind") == "kLoop"
  assert instruction.attribute("to_apply") == ""
  assert [leaf.dims for leaf in instruction.leaves] == [(2, 3), (5,)]
  assert instruction.size == 2 * 3 * 2 + 5 / 2  # bfloat16 is 2 bytes, s4 half a byte
  assert instruction.main == 5 / 2  # S(1) is on-chip memory
  assert instruction.scope == ""


def test_the_scope_of_a_custom_call():
  line = (
    "  %c = f32[4]{0} custom-call(f32[4]{0} %x), "
    'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/scope/kernel"}'
  )
  assert parse_instruction(line).scope == "jit(f)/scope/kernel"


@pytest.mark.parametrize("line", ["}", "HloModule m, num_partitions=8", "  // a = comment", ""])
def test_other_lines_are_not_instructions(line):
  assert parse_instruction(line) is None


TEXT = """\
HloModule m, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[3]) -> f32[3] {
  %x = f32[3]{0} parameter(0)
  ROOT %c = f32[3]{0} custom-call(%x), custom_call_target="k", backend_config={"body":
"over several lines"
}}, metadata={op_name="jit(f)/k"}
}
"""


def test_a_module_by_computation():
  module = Module(TEXT)
  assert (module.entry, module.partitions) == ("main", 4)
  assert set(module.computations) == {"add", "main"}
  assert module.root("add").op == "add"
  assert module.parameters("add") == {0: "a", 1: "b"}
  assert module.root("main").scope == "jit(f)/k"


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    Module("HloModule m")
