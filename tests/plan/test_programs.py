"""Tests the programs of a config: their names, their arrays, and the problems of a config."""

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.plan.hardware import open_topology
from grpo_jax.plan.programs import bytes_of, open_programs
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


def test_a_decode_step_runs_for_every_token_but_the_first():
  assert programs_of("rollout.completion_length=6").runs_per_step("decode") == 5


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


@pytest.mark.parametrize(
  ("override", "message"),
  [("train.reduction=deterministic", "reduction=fast"), ("mesh.fsdp=3", "fsdp=3"),
   ("rollout.completion_length=99999", "exceeds the context"), ("algorithm.name=nope", "nope")],
)  # fmt: skip
def test_problems_of_a_config_are_named(override, message):
  with pytest.raises(ConfigError, match=message):
    programs_of(override)
