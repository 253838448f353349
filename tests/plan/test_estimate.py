"""Tests that estimated memory is the memory that arrays take on the devices."""

import dataclasses

import jax
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.decoder import Decoder
from grpo_jax.plan import estimate
from grpo_jax.plan.__main__ import report
from grpo_jax.plan.cost import Cost
from grpo_jax.plan.estimate import (
  Memory,
  Plan,
  Work,
  _part_cost,
  _required_bytes,
  compile_program,
  make_plan,
)
from grpo_jax.plan.flops import matmul_flops, unweighted
from grpo_jax.plan.hardware import TPUS, Topology, open_topology
from grpo_jax.plan.programs import Programs, open_programs
from tests.helpers.plans import GIB, load, needs_libtpu


@pytest.fixture(scope="module")
def sharded():
  """Returns the programs of the tiny model on a mesh (2, 2, 2), and its compiled update."""
  c = load("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
  programs = open_programs(c, open_topology("cpu:8"))
  return programs, compile_program(programs, "update")


def test_parameters_and_optimizer_are_the_buffers_on_device_0(sharded):
  programs, (memory, parts) = sharded
  params = Decoder(programs.model.config).init(jax.random.key(0))
  params = jax.device_put(params, meshes.param_shardings(programs.mesh, params))
  opt_state = programs.optimizer.init(params)
  opt_state = jax.device_put(opt_state, meshes.param_shardings(programs.mesh, opt_state))

  def on_device_0(tree):
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])

  assert memory.by_purpose["parameters"] == on_device_0(params)
  assert (
    memory.by_purpose["optimizer"] == on_device_0(opt_state) + 4 * 4
  )  # the step, three of History
  # Sharded over fsdp and tensor, with two moments of Adam; norms and the odd vocabulary are not.
  assert on_device_0(params) < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert abs(memory.error) < 0.001  # our sum of the arguments against the compiler's
  assert 1 <= parts["update"][1] < 8  # each device does at least its share


def test_memory_adds_up_to_what_the_compiler_reports(sharded):
  programs, (memory, _) = sharded
  xla = programs.update().trace().lower().compile().memory_analysis()  # from the compilation cache
  total = xla.argument_size_in_bytes + xla.temp_size_in_bytes + xla.output_size_in_bytes
  assert memory.total == pytest.approx(total - xla.alias_size_in_bytes, rel=0.02)


def test_a_device_does_at_least_its_share():
  """XLA:CPU rewrites some matmuls: 4 devices show 80 FLOPs where 100 were traced."""
  cost = Cost(flops=20.0, bytes=7.0)
  assert _part_cost(cost, 100.0, 300.0, 4) == (Cost(25.0, 7.0), 1.0, 3.0)
  assert _part_cost(cost, 40.0, 40.0, 4) == (cost, 2.0, 1.0)
  assert _part_cost(cost, 0.0, 0.0, 4) == (cost, 1.0, 1.0)


@pytest.mark.parametrize(
  ("overrides", "flops", "time"),
  [
    # 1e12 FLOPs at 197e12 FLOP/s, six passes each by default; bfloat16 has one.
    ((), 1e12, 6 / 197),
    (("model.matmul_precision=high",), 1e12, 3 / 197),
    (("model.matmul_precision=default",), 1e12, 1 / 197),
    (("model.dtype=bfloat16",), 1e12, 1 / 197),
  ],
)
def test_the_precision_of_matmuls_changes_the_time(monkeypatch, overrides, flops, time):
  """Traces the tiny model's update; its compiled FLOPs are replaced by a round number."""

  def compile_program(programs, name):
    traced = getattr(programs, name)().trace().jaxpr
    plain, slow = (
      sum(matmul_flops(traced, weight=weight))
      for weight in (unweighted, programs.topology.chip.matmul_time)
    )
    return Memory({}, 1.0), {name: _part_cost(Cost(flops=flops), plain, slow, 8)}

  monkeypatch.setattr(estimate, "compile_program", compile_program)
  monkeypatch.setattr(Programs, "names", ("update",))
  topology = Topology("v5e", open_topology("cpu:8").devices, TPUS["v5e"])
  plan = make_plan(open_programs(load(*overrides), topology))
  assert plan.step_seconds == pytest.approx(time)
  slower = round(time * 197)
  note = f"matmuls take longer in float32 than in bfloat16: {slower} times in update"
  assert any(note in line for line in report(plan).splitlines()) == (slower > 1)


def test_the_bytes_that_a_refused_program_needs():
  used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 47.35G of 15.75G hbm."
  assert _required_bytes(used) == 47.35 * GIB
  other = "the total memory required for HLO temporaries (1.16T) exceeds available HBM (15.75G)."
  assert _required_bytes(other) == 1.16 * 2**40
  assert _required_bytes("out of memory") == float("inf")


def plan_of(memory, available=16.0 * GIB):
  cost = Cost(2e9, 2.0**30)
  work = {"decode": Work(9, cost, 1.0, 0.5, "memory"), "update": Work(2, cost, 1.0, 3.0, "links")}
  return Plan("m", 10, "v5e:4x4", "TPU v5e", 16, {"fsdp": 16}, available, memory, work, 1)


def test_a_plan_fits_if_every_program_does():
  small, large = Memory({}, 3.0 * GIB), Memory({}, 17.0 * GIB)
  assert plan_of({"update": small, "sample": small}).fits()
  assert not plan_of({"update": large, "sample": small}).fits()
  assert plan_of({"update": large, "sample": small}).fits("sample")
  assert plan_of({"update": large}, available=None).fits()  # the memory of the chip is unknown
  assert not plan_of({"update": Memory({}, GIB, refused="too big")}).fits()


def test_steps_with_rollouts_ahead_take_what_their_busiest_part_does():
  """Sampling takes 4.5 s and learning 6 s; rewards of 5.25 s and 21 s."""
  plan = plan_of({"update": Memory({}, 3.0 * GIB)})
  assert plan.parts == (4.5, 6.0)
  lines = report(plan).splitlines()
  start = lines.index("of it sampling 4.5 s and learning 6 s")
  assert [line.split() for line in lines[start + 1 : start + 5]] == [
    ["with", "rewards", "of", "0", "s", "5.25", "s", "21", "s"],
    ["rollout.ahead=0", "(this", "one)", "10.5", "s", "15.8", "s", "31.5", "s"],
    ["rollout.ahead=1", "10.5", "s", "10.5", "s", "21", "s"],
    ["rollout.ahead=2", "10.5", "s", "10.5", "s", "21", "s"],
  ]
  apart = dataclasses.replace(plan, rollout_devices=4, ahead=1)
  assert apart.step_seconds == 6.0
  assert "sampling 4.5 s and learning 6 s, on 4 and 12 devices" in report(apart)


def test_a_step_takes_the_sum_of_its_parts():
  plan = plan_of({"update": Memory({}, 3.0 * GIB)})
  assert plan.step_seconds == 9 * 0.5 + 2 * 3.0
  assert plan_of({"update": Memory({}, GIB, refused="too big")}).step_seconds is None


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_plan():
  plan = make_plan(open_programs(load("model.dtype=bfloat16"), open_topology("v5e:2x2")))
  assert plan.fits()
  assert plan.available == 15.75 * 2**30
  assert plan.step_seconds > 0
  assert all(
    1 <= work.excess < 1.5 for name, work in plan.work.items() if name != "to_sampling_params"
  )


@pytest.mark.slow
@needs_libtpu
def test_gradients_alone_go_from_slice_to_slice():
  c = load("mesh.data=2", "mesh.fsdp=4", "mesh.slices=2", "rollout.prompts_per_step=16")
  programs = open_programs(c, open_topology("v5e:2x2:2"))
  plan = make_plan(programs)
  sent = {part: work.cost.between_slices for part, work in plan.work.items()}
  # Each device holds a quarter of the gradient and sends it once, and some scalars.
  gradient = 4 * plan.parameters / 4
  assert gradient <= sent["update"] < 2 * gradient
  assert sent["prefill"] == sent["to_sampling_params"] == 0
  assert sent["decode"] <= 1024  # whether all rows have ended
  assert any("between slices" in note for note in plan.notes)
  with pytest.raises(ValueError, match=r"mesh\.slices is 1, and v5e:2x2:2 has 2 slices"):
    open_programs(load(), programs.topology)


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_program_that_cannot_fit_is_a_verdict_and_not_a_crash():
  c = load("model.source=Qwen/Qwen3-8B", "rollout.completion_length=512")
  plan = make_plan(open_programs(c, open_topology("v5e:2x2")))
  assert not plan.fits("update")
  assert plan.memory["update"].total > plan.available
  assert "does NOT fit" in report(plan)
