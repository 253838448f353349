"""Tests the programs of a config: their names, their arrays, and the problems of a config."""

import jax
import pytest

from grpo_jax.build import build
from grpo_jax.config import ConfigError
from grpo_jax.models.decoder import LANES
from grpo_jax.plan.hardware import open_topology
from grpo_jax.plan.programs import bytes_of, open_programs, read_prompts
from grpo_jax.sampling.stopping import stop_table
from tests.helpers import tiny_gguf
from tests.helpers.plans import load

KL = ("algorithm.name=grpo", "algorithm.beta=0.1")


def programs_of(*overrides):
  return open_programs(load(*overrides), open_topology("cpu:8"))


@pytest.mark.parametrize(
  ("overrides", "scores"),
  [((), 0), (KL, 1), (("train.mini_batches=2", "mesh.data=4",
    "mesh.fsdp=1", "mesh.tensor=2"), 1), (("train.epochs=3", *KL), 2)],
)  # fmt: skip
def test_a_rollout_is_scored_for_a_reference_and_for_several_updates(overrides, scores):
  programs = programs_of(*overrides)
  assert ("score" in programs.names) == (scores > 0)
  assert programs.runs_per_step("score") == scores
  assert programs.runs_per_step("update") == programs.updates
  batch = programs.batch(8)
  assert (batch.ref_logp is not None) == ("algorithm.beta=0.1" in overrides)
  assert (batch.old_logp is not None) == (programs.updates > 1)
  assert programs.batch(8, scored=False).ref_logp is None


def test_ratios_to_the_sampler_need_no_pass_and_right_answers_have_weights():
  programs = programs_of("algorithm.anchor=sampler", "algorithm.nll_weight=0.1", "train.epochs=2")
  assert programs.runs_per_step("score") == 0
  batch = programs.batch(8)
  assert batch.old_logp is None
  assert batch.nll_weights.shape == batch.mask.shape
  shares = programs_of("algorithm.entropy_share=0.2").batch(8)
  assert shares.advantages.shape == shares.mask.shape
  assert programs_of().batch(8).nll_weights is None


def test_a_decode_step_runs_for_every_token_but_the_first():
  assert programs_of("rollout.completion_length=6").runs_per_step("decode") == 5


def test_a_budget_of_the_cache_bounds_its_rows():
  """16 completions over 8 devices, or 3 at a time on two: six rounds of up to 6 tokens each."""
  assert programs_of().cache_rows == 16
  programs = programs_of("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4")
  m = programs.model.config
  row = 2 * 4 * m.layers * m.kv_heads * m.head_dim * (LANES + programs.prompts.length)
  assert m.kv_heads % 4  # the heads are not split
  budget = f"rollout.cache_gib={3.5 * row / 2**30}"
  bounded = programs_of("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4", budget)
  assert bounded.cache_rows == 6
  assert bounded.runs_per_step("decode") == 6 * 3
  # Of a device: its rows with a copy of the prompt each, and its 4 prompts.
  prompt = 2 * 4 * m.layers * m.kv_heads * m.head_dim * programs.prompts.length
  assert bytes_of(bounded.cache) == 3 * row + 4 * prompt
  with pytest.raises(ConfigError, match="which holds 1 of the 2 completions of a prompt"):
    programs_of("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4", f"rollout.cache_gib={row / 2**30}")


def test_devices_that_only_sample_hold_the_weights_of_the_sampler():
  apart = programs_of(
    "rollout.ahead=1", "algorithm.anchor=sampler", "mesh.rollout_devices=4", "mesh.data=4",
    "mesh.fsdp=1", "mesh.tensor=1",
  )  # fmt: skip
  learners = set(apart.mesh.devices.flat)
  samplers = set(apart.mesh_of("sample").devices.flat)
  assert len(learners) == len(samplers) == 4
  assert not learners & samplers
  assert {s.sharding.mesh for s in jax.tree.leaves(apart.sampling_params)} == {apart.rollout_mesh}
  assert apart.batch(8).staleness.shape == (8,)
  apart.sample().trace()


def test_a_batch_is_sharded_over_the_prompts():
  """8 prompts over 8 devices: one prompt of 8 tokens and its mask, 2 completions of 6 tokens."""
  tokens, numbers = 8 * (4 + 1) + 2 * 6 * (4 + 1), 2 * 4 + 2 * 6 * 2 * 4
  assert bytes_of(programs_of().batch(8)) == tokens + numbers


def test_a_reference_takes_memory_unless_adapters_are_trained():
  whole = programs_of(*KL)
  assert bytes_of(whole.reference) == bytes_of(whole.weights)
  adapters = programs_of(*KL, "lora.rank=2")
  assert adapters.reference is None
  assert bytes_of(adapters.state.params) < bytes_of(adapters.base_params)
  moving = programs_of(*KL, "reference.sync_every=2")
  assert moving.reference is None
  assert bytes_of(moving.state.reference) == bytes_of(moving.weights)


def test_a_quantized_base_takes_fewer_bytes_and_has_no_copy_for_the_sampler():
  wide = programs_of("lora.rank=2")
  for scheme, bits in (("int8", 8), ("nf4", 4)):
    programs = programs_of("lora.rank=2", f"lora.quantize={scheme}")
    layers = [bytes_of(p.base_params["layers"]) for p in (wide, programs)]
    block = 32 if scheme == "int8" else 64  # divides the widths of the model
    assert layers[1] < layers[0] * (bits / 32 + 1 / block + 0.02)  # and the norms
    assert "to_sampling_params" not in programs.names
    assert programs.copied_for_sampling is None
    for name in programs.names:
      getattr(programs, name)().trace()
  assert programs_of(
    "lora.rank=2", "lora.quantize=int8", "mesh.data=4", "mesh.fsdp=2"
  ).copied_for_sampling


def test_the_types_of_a_file_are_planned(tmp_path):
  """Matrices of 64 x 64: q in Q4_1 has 5 bits a number, k in float16 is held in float32."""
  tiny_gguf.write(tmp_path / "model.gguf")
  source = f"model.source={tmp_path / 'model.gguf'}"
  layers = programs_of(source, "lora.rank=2", "lora.quantize=file").base_params["layers"]
  assert bytes_of(layers["q"]) == 2 * 64 * 64 * 5 / 8
  assert bytes_of(layers["k"]) == 2 * 64 * 32 * 4


TAUGHT = ("algorithm.name=opd", "teacher.source=['random:tiny','random:tiny']")


def test_teachers_take_memory_and_score_the_rollout():
  programs = programs_of(*TAUGHT)
  assert "teach" in programs.names
  assert programs.runs_per_step("teach") == 2
  assert programs.batch(8).teacher_logp is not None
  (one, two), run = programs.taught_by, build(load(*TAUGHT, "mesh.fsdp=8", "mesh.data=1"))
  assert bytes_of(one.params) == bytes_of(two.params) == bytes_of(programs.weights)
  programs = open_programs(run.config, open_topology("cpu:8"))
  assert described(programs.taught_by[0].params) == described(run.loaded_teachers()[0].params)
  assert programs_of().runs_per_step("teach") == 0


def test_teachers_in_the_loss_are_part_of_the_update():
  programs = programs_of(*TAUGHT, "algorithm.teacher_divergence=1")
  assert programs.runs_per_step("teach") == 0
  assert programs.batch(8).teacher_logp is None
  whole, alone = (len(scans_of(p.update())) for p in (programs, programs_of("algorithm.name=dapo")))
  assert whole == alone + 2 * (1 + 3)  # of each teacher: its layers, and three passes over tiles


@pytest.mark.parametrize(
  ("override", "message"),
  [("algorithm.name=opd", "there is no teacher"),
   ("train.reduction=deterministic", "reduction=fast"), ("mesh.fsdp=3", "fsdp=3"),
   ("rollout.completion_length=99999", "exceeds the context"), ("algorithm.name=nope", "nope")],
)  # fmt: skip
def test_problems_of_a_config_are_named(override, message):
  with pytest.raises(ConfigError, match=message):
    programs_of(override)


# --- the same as the run's ------------------------------------------------------------------------


def described(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)


ADAPTIVE = ("algorithm.entropy_target=0.2", "algorithm.entropy_delta=0.005")


@pytest.mark.parametrize(
  "overrides",
  [
    (),
    (*KL, "reference.sync_every=2"),
    ("lora.rank=2",),
    ("lora.rank=2", "lora.quantize=int8"),
    ADAPTIVE,
  ],
)
def test_state_and_sampling_params_are_those_of_the_run(overrides):
  c = load("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", *overrides)
  run, programs = build(c), open_programs(c, open_topology("cpu:8"))
  state = run.initial_state()
  assert described(programs.state) == described(state)
  params = run.to_sampling_params(state.params)
  assert described(programs.sampling_params) == described(params)


def test_the_state_of_the_critic_is_that_of_the_run_and_each_program_is_traced():
  c = load("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "algorithm.name=ppo")
  run, programs = build(c), open_programs(c, open_topology("cpu:8"))
  assert described(programs.critic_state) == described(run.initial_state().critic)
  assert {"update_critic", "values"} <= set(programs.names)
  for name in programs.names:
    getattr(programs, name)().trace()
  assert programs_of().critic_state is None


def test_a_value_head_is_a_parameter_of_the_policy():
  c = load(
    "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "algorithm.name=ppo", "critic.trunk=policy"
  )
  run, programs = build(c), open_programs(c, open_topology("cpu:8"))
  assert described(programs.state) == described(run.initial_state())
  assert programs.critic_state is None
  assert {"values", "update"} <= set(programs.names)
  assert "update_critic" not in programs.names
  for name in programs.names:
    getattr(programs, name)().trace()
  assert "values" not in programs_of().names


def test_the_update_skips_spikes_if_the_run_does():
  plain, spike = programs_of(), programs_of("train.spike=2")
  jaxprs = [str(programs.update().trace().jaxpr) for programs in (plain, spike)]
  assert jaxprs[0] != jaxprs[1]


def test_the_update_keeps_to_a_budget_of_tokens():
  """24 prompts over 8 devices, of 8 + 2 * 6 tokens each: one at a time takes 3 micro-batches."""
  shape = "rollout.prompts_per_step=24"
  whole, parts = programs_of(shape), programs_of(shape, "train.micro_batch_tokens=20")
  for name, count in (("update", 1), ("score", 1), ("sample", 0)):
    assert scans_of(getattr(whole, name)()).count(3) == 0
    assert scans_of(getattr(parts, name)()).count(3) == count


def scans_of(program):
  """Lengths of the outermost scans."""
  equations = program.trace().jaxpr.jaxpr.eqns
  return [e.params["length"] for e in equations if e.primitive.name == "scan"]


# --- the task -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("ab",), ("ab", "ac")])
def test_the_stop_table_is_that_of_the_run(stop, tmp_path):
  """The stop strings of the task and of the config together, which share some of their states."""
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(f'{{"prompt": "{i} =", "answer": "{i}"}}\n' for i in range(20)))
  c = load("task.name=jsonl")
  with c.unlocked():
    settings = {"path": str(path), "reward": "exact", "stop": "\n\n", "eval_fraction": 0.2}
    c.task.settings.update(settings)
    c.rollout.stop = stop
  (table,) = open_programs(c, open_topology("cpu:8")).sample().arguments[-1:]
  pieces = [b"a", b"b", b"c", b"\n"]
  assert table.shape == (len(stop_table(pieces, ["\n\n", *stop], [0], 257)), 257)


def test_a_task_that_is_not_on_this_machine_is_noted():
  c = load("task.name=jsonl")
  with c.unlocked():
    c.task.settings.update(path="absent.jsonl", reward="exact")
  prompts = read_prompts(c)
  assert (prompts.length, prompts.stop_states) == (8, 2)
  assert "absent.jsonl" in prompts.notes[0]
  c.rollout.prompt_length = 0
  with pytest.raises(ValueError, match=r"absent\.jsonl.*prompt_length=512"):
    read_prompts(c)
