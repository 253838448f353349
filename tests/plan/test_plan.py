"""Plans: what is counted is worked out by hand, what is forecast is what lies on the devices."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from grpo_jax import config as configs
from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io import presets as known
from grpo_jax.models.io.weights import shapes_of
from grpo_jax.plan import __main__ as plan
from grpo_jax.plan import cost as costs
from grpo_jax.plan import estimate as needs
from grpo_jax.plan import flops as traced
from grpo_jax.plan import hardware as chips
from grpo_jax.plan import hlo
from grpo_jax.plan.programs import open_programs

TINY = [
  "--config.rollout.prompt_length=8",
  "--config.rollout.completion_length=6",
  "--config.rollout.group_size=2",
]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs pip install 'grpo_jax[plan]'"
)


def load(*overrides):
  return configs.load("experiments/tiny.py", [*TINY, *(f"--config.{o}" for o in overrides)])


# --- reading programs -----------------------------------------------------------------------------


def test_a_scanned_product_counts_as_often_as_it_runs():
  """50 turns of [8, 16] x [16, 16]: 50 * 2 * 8 * 16 * 16 operations; XLA says one fiftieth."""
  x, w = jnp.ones((8, 16)), jnp.ones((50, 16, 16))
  compiled = jax.jit(lambda x, w: jax.lax.scan(lambda c, a: (c @ a, None), x, w)[0]).lower(x, w)
  compiled = compiled.compile()
  once, turn = costs.Counter(compiled.as_text()).cost()
  assert once.ops == 50 * 2 * 8 * 16 * 16
  assert turn.ops == 0
  assert compiled.cost_analysis()["flops"] < once.ops / 40
  # Each turn reads its own matrix (and writes a copy of it), not the stack of all 50.
  assert 50 * 16 * 16 * 4 <= once.bytes < 10 * (50 * 16 * 16 * 4)


def test_a_loop_that_data_ends_is_counted_apart():
  def function(x):
    return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[1].sum() < 1e6), turn, (0, x @ x))[1]

  def turn(carry):
    return carry[0] + 1, carry[1] @ carry[1] @ carry[1]

  x = jnp.ones((16, 16))
  once, turns = costs.Counter(jax.jit(function).lower(x).compile().as_text()).cost()
  assert (once.ops, turns.ops) == (2 * 16**3, 2 * 2 * 16**3)
  assert traced.product_ops(jax.make_jaxpr(function)(x).jaxpr) == (2 * 16**3, 2 * 2 * 16**3)


def test_of_several_open_loops_the_costliest_counts():
  def going(carry):
    return (carry[0] < 9) & (carry[1].sum() < 1e6)

  def function(x):
    for rows in (16, 8):
      x = jax.lax.while_loop(going, lambda c: (c[0] + 1, c[1] @ c[1].T @ c[1]), (0, x[:rows]))[1]
    return x

  x = jnp.ones((16, 16))
  _, turn = costs.Counter(jax.jit(function).lower(x).compile().as_text()).cost()
  assert turn.ops == 2 * 2 * 16**3
  assert traced.product_ops(jax.make_jaxpr(function)(x).jaxpr) == (0, 2 * 2 * 16**3)


def test_collectives_and_what_a_device_sends():
  """A sum of [4, 6] float32 over 4 devices: a ring sends 2 * 3/4 of it; a gather 3 times a part."""
  mesh = meshes.make_mesh((4, 1, 1), jax.devices()[:4])
  x = jax.device_put(jnp.ones((16, 6)), meshes.batch_sharding(mesh))

  def cost(function):
    jitted = jax.jit(function, out_shardings=meshes.replicated(mesh))
    return costs.Counter(jitted.lower(x).compile().as_text()).cost()[0].collectives

  assert cost(lambda x: x.reshape(4, 4, 6).sum(0)) == {"all-reduce": (1, 2 * 3 / 4 * 4 * 6 * 4)}
  assert cost(lambda x: x + 1) == {"all-gather": (1, 3 * 4 * 6 * 4)}


# As the TPU compiler writes them: products as convolutions, a batch as a window, on-chip memory.
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
  once, turn = costs.Counter(TPU_TEXT).cost()
  # From 0 below 13 in steps of 2 are 7 turns: as many products of [4, 8] x [8, 8]. And 5 of
  # [3, 4] x [4, 6]: an output meets the one of its five window positions that is no gap.
  assert once.ops == 7 * 2 * 4 * 8 * 8 + 5 * 2 * 3 * 4 * 6
  # A turn reads one matrix of the stack and its index, and steps the counter (three numbers); the
  # rest is on the chip. Then the last product.
  turns = 7 * (8 * 8 * 4 + 4 + 3 * 4)
  assert once.bytes == turns + 4 * (5 * 3 * 4 + 5 * 6 * 4 + 5 * 3 * 6)
  # 4 devices, 64 bytes each: 2 * 3/4 of them are sent.
  assert once.collectives == {"all-reduce": (7, 7 * 96)}
  assert turn == costs.Cost()


# A gather beside a loop: it starts, goes on in every turn, and is done.
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


def test_a_collective_beside_other_work_is_counted_where_it_starts():
  once, _ = costs.Counter(CHAIN_TEXT).cost()
  assert once.collectives == {"all-gather": (1, 7 * 2 * 4 * 4)}


@pytest.mark.parametrize(
  ("groups", "size"),
  [("{{0,1,2},{3,4,5}}", 3), ("[2,4]<=[8]", 4), ("[4,2]<=[2,4]T(1,0)", 2), ("{}", 8),
   ("mesh['a'=2,'b'=3,'c'=4] {'a','c'}", 8)],
)  # fmt: skip
def test_groups_of_devices(groups, size):
  line = f"%a = f32[1] all-gather(%b), replica_groups={groups}, dimensions={{0}}"
  assert costs._group_size(hlo._instruction(line), 8) == size


def test_the_roofline_names_what_binds():
  chip = chips.Chip("one", None, bandwidth=10.0, peak=100.0, links=5.0)
  assert chips.bound(costs.Cost(ops=500.0, bytes=20.0), chip) == (5.0, "operations")
  sent = costs.Cost(500.0, 20.0, {"all-gather": (1, 20.0), "all-reduce": (2, 15.0)})
  assert chips.bound(sent, chip) == (7.0, "links")
  assert chips.bound(sent, chips.Chip("unknown", None)) is None


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "count"),
  [  # as the model cards and the files on the hub have them, tied heads counted once
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ("Qwen/Qwen3-0.6B", 596_049_920),
    ("Qwen/Qwen3-1.7B", 1_720_574_976),
    ("Qwen/Qwen3-8B", 8_190_735_360),
    ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
  ],
)
def test_known_models_have_their_number_of_parameters(name, count):
  shapes = shapes_of(known.config_of(name))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(known.KNOWN["Qwen/Qwen3-0.6B"]))
  assert known.config_of(str(tmp_path)) == known.config_of("Qwen/Qwen3-0.6B")
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    known.config_of(str(tmp_path.parent / tmp_path.name / ".."))


# --- plans ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split():
  """The programs of the tiny model on (2, 2, 2), and what its update compiles to."""
  c = load("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
  programs = open_programs(c, chips.open_topology("cpu:8"))
  return programs, needs.compile_part(programs, "update")


def test_the_forecast_is_what_lies_on_the_devices(split):
  """Parameters and optimizer state against the buffers on device 0."""
  programs, (memory, parts) = split
  params = Decoder(programs.model.config).init(jax.random.key(0))
  params = jax.device_put(params, meshes.param_shardings(programs.mesh, params))
  opt_state = programs.optimizer.init(params)
  opt_state = jax.device_put(opt_state, meshes.param_shardings(programs.mesh, opt_state))

  def on_device_0(tree):
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])

  assert memory.kinds["parameters"] == on_device_0(params)
  assert memory.kinds["optimizer"] == on_device_0(opt_state) + 4  # and the number of the update
  # Split over fsdp and tensor, doubly for Adam; the rest (norms, odd vocabulary) is copied.
  assert on_device_0(params) < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert abs(memory.error) < 0.001  # our sum of the arguments, the compiler's sum of them
  assert 0.9 <= parts["update"][1] < 8  # every device does at least its share


def test_what_is_in_memory_is_counted_once(split):
  """By kind, it adds up to what the compiler says the program and its arguments take."""
  programs, (memory, _) = split
  step, arguments = programs.update()
  xla = step.lower(*arguments).compile().memory_analysis()  # from the compilation cache
  whole = xla.argument_size_in_bytes + xla.temp_size_in_bytes + xla.output_size_in_bytes
  assert memory.total == pytest.approx(whole - xla.alias_size_in_bytes, rel=0.02)


def test_a_plan_of_the_tiny_model(capsys):
  arguments = ["--config", "experiments/tiny.py", "--topology", "cpu:8", *TINY]
  assert plan.main([*arguments, "--json"]) == 0
  (found,) = json.loads(capsys.readouterr().out)
  assert (found["fits"], found["devices"], found["mesh"]["data"]) == (True, 8, 8)
  assert set(found["work"]) == {"update", "to_sampling_params", "prefill", "decode"}
  assert found["work"]["decode"]["times"] == 5
  # A decode step: 2 operations per weight of the layers and the head for each of P * G / 8 rows,
  # and attention over 8 + 16 keys (5, rounded up to a vector), 2 products of 64 a layer.
  layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
  ops = 8 * 2 / 8 * 2 * (2 * layer + 257 * 64 + 2 * 2 * 24 * 64)
  assert found["work"]["decode"]["cost"]["ops"] == pytest.approx(ops, rel=1e-6)
  # Without splitting, keys and values of 8 + 2 * 16 tokens, 2 layers, 2 heads of 16, float32.
  assert found["memory"]["sample"]["kinds"]["KV cache"] == 2 * (8 + 2 * 16) * 2 * 2 * 16 * 4


GIB = 2**30


def pretend(monkeypatch, wanted):
  """`wanted(config, program) -> GiB`, in the place of the compiler; returns what was compiled."""
  compiled = []

  def compile_part(programs, name):
    c = programs.config
    compiled.append((name, c.train.micro_batches, c.model.remat, programs.mesh.shape["tensor"]))
    kinds = {"parameters": 1.0 * GIB, "optimizer": 2.0 * GIB, "reference": 0.0}
    total = wanted(c, name) * GIB
    return needs.Memory(kinds | {"temporaries": total - 3 * GIB}, total), {}

  monkeypatch.setattr(needs, "compile_part", compile_part)
  return compiled


def first_change(wanted, monkeypatch, *overrides, tries=9):
  c = load("rollout.prompts_per_step=32", *overrides)
  here = chips.open_topology("cpu:8")
  small = chips.Topology("cpu:8", here.devices, chips.Chip("ten", memory=10.0 * GIB))
  compiled, known = pretend(monkeypatch, wanted), {}
  made = needs.make_plan(c, small, known=known)
  assert not made.fits()
  tried, fitting = plan.first_that_fits(c, small, made, tries=tries, known=known)
  assert c.train.micro_batches == 1  # the caller's config is as it was
  return tried, fitting, compiled


def test_micro_batches_are_tried_first_and_only_the_update_is_compiled_again(monkeypatch):
  def by_micro(c, name):
    return 3 + 24 / c.train.micro_batches if name == "update" else 5

  tried, fitting, compiled = first_change(by_micro, monkeypatch)
  assert tried == ["--config.train.micro_batches=2", "--config.train.micro_batches=4"]
  assert fitting.fits()
  assert [name for name, *_ in compiled] == [
    "update",
    "to_sampling_params",
    "sample",
    "update",
    "update",
  ]


def test_then_remat_then_the_mesh(monkeypatch):
  def by_remat(c, name):
    return 5 if c.model.remat == "layers" or name != "update" else 30

  tried, fitting, _ = first_change(by_remat, monkeypatch)
  assert tried[-1] == "--config.model.remat=layers"
  assert not any("dots" in one for one in tried)  # what the config has already
  assert fitting.fits()

  def by_mesh(c, name):
    return 5 if c.mesh.tensor == 2 else 30

  tried, fitting, _ = first_change(by_mesh, monkeypatch)
  assert "mesh.tensor=2" in tried[-1]
  assert not any("remat" in one and "mesh" not in one for one in tried)  # it could not have helped
  assert fitting.mesh == {"data": 1, "fsdp": 4, "tensor": 2}


def test_if_nothing_fits_it_says_so(monkeypatch):
  tried, fitting, _ = first_change(lambda c, name: 30, monkeypatch, tries=2)
  assert (len(tried), fitting) == (2, None)


def test_a_report_names_what_was_refused():
  memory = {
    "update": needs.Memory({"parameters": 2.0 * GIB, "temporaries": 0.0}, 47.35 * GIB, "too big"),
    "sample": needs.Memory({"parameters": 2.0 * GIB, "KV cache": 1.0 * GIB}, 3.0 * GIB, error=0.01),
  }
  work = {"decode": needs.Work(9, costs.Cost(2e9, 2.0**30), 1.0, 0.5, "memory")}
  made = needs.Plan(
    "m", 10**9, "v5e:4x4", "TPU v5e", 16, {"fsdp": 16}, 15.75 * GIB, memory, work, 1
  )
  text = plan.report(made)
  for words in ("does NOT fit", "update does not compile: too big", "47.350", "1000.0 M", "1.00%"):
    assert words in text
  assert made.step_seconds is None


def test_the_compilers_refusal_is_read():
  used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 47.35G of 15.75G hbm."
  assert needs._needed(used) == 47.35 * GIB
  other = "the total memory required for HLO temporaries (1.16T) exceeds available HBM (15.75G)."
  assert needs._needed(other) == 1.16 * 2**40


def test_mistakes_are_named_before_anything_compiles(capsys):
  run = ["--config", "experiments/tiny.py", "--topology"]
  assert plan.main([*run, "v9:4x4"]) == 2
  assert "v5e:AxB" in capsys.readouterr().err
  assert plan.main([*run, "cpu:64"]) == 2
  assert "has 8" in capsys.readouterr().err
  assert plan.main([*run, "cpu:8", *TINY, "--config.mesh.fsdp=3"]) == 2
  assert "fsdp=3" in capsys.readouterr().err
  assert plan.main([*run, "cpu:8", "--config.model.source=Qwen/Qwen3-8B",
                    "--config.rollout.completion_length=99999", *TINY[:1]]) == 2  # fmt: skip
  assert "40960" in capsys.readouterr().err


def test_without_the_tpu_compiler_it_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert plan.main(["--config", "experiments/tiny.py", "--topology", "v5e:2x2", *TINY]) == 2
  assert "grpo_jax[plan]" in capsys.readouterr().err


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_plan():
  made = needs.make_plan(load("model.dtype=bfloat16"), chips.open_topology("v5e:2x2"))
  assert made.fits()
  assert made.available == 15.75 * 2**30
  assert made.step_seconds > 0
  assert all(
    0.9 <= work.excess < 1.5 for name, work in made.work.items() if name != "to_sampling_params"
  )


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_plan_counts_what_its_kernels_do():
  """The compiled program does what was asked for, products in kernels included."""
  topology = chips.open_topology("v5e:2x2")
  c = load("model.dtype=bfloat16", "model.attention=splash")
  programs = open_programs(c, topology)
  for name, part in (("update", "update"), ("sample", "prefill")):
    function, arguments = getattr(programs, name)()
    asked, _ = traced.product_ops(function.trace(*arguments).jaxpr)
    cost, excess = needs.compile_part(programs, name)[1][part]
    assert excess == pytest.approx(1, abs=0.02)
    assert cost.ops >= asked / 4


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_program_that_cannot_fit_is_a_verdict_and_no_crash():
  c = load("model.source=Qwen/Qwen3-8B", "rollout.completion_length=512")
  made = needs.make_plan(c, chips.open_topology("v5e:2x2"))
  assert not made.fits("update")
  assert made.memory["update"].total > made.available
  assert "does NOT fit" in plan.report(made)
