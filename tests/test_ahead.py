"""Tests rollouts that are sampled ahead of the updates: their parameters, resuming, two meshes."""

import dataclasses
import json
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from grpo_jax import ahead, train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import STALENESS
from grpo_jax.rollout import generate
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from grpo_jax.tasks.rewards.scoring import RewardError
from tests.helpers.runs import TIMES, train_on

TINY = "experiments/tiny.py"
SMALL = (
  "seed=3",
  "steps=4",
  "checkpoint.every=1",
  "checkpoint.keep=9",
  "eval.every=2",
  "eval.batch_prompts=8",
  "task.settings.eval_size=3",
  "rollout.prompts_per_step=8",
  "rollout.group_size=4",
  "rollout.completion_length=5",
  "rewards.workers=0",
  "log.samples=0",
  "algorithm.anchor=sampler",
  "optimizer.learning_rate=1e-2",
)


def options(*changes):
  return [f"--config.{change}" for change in (*SMALL, *changes)]


def same(a, b):
  """Whether two runs agree: bits of the state, rows of metrics, completions."""
  rows = [[{k: v for k, v in row.items() if k != "time/waiting"} for row in x[1]] for x in (a, b)]
  np.testing.assert_equal(*rows)
  return a[0] == b[0] and a[2] == b[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("ahead")


@pytest.fixture(scope="module")
def whole(folder):
  """Uninterrupted runs by `rollout.ahead`."""
  return {k: train_on(1, folder / str(k), options(f"rollout.ahead={k}")) for k in (0, 1, 2)}


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_rollout_has_the_parameters_of_k_steps_before(whole, folder, k, monkeypatch):
  """Samples each rollout anew with the checkpoint that it should be from."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  run = build(load(TINY, options(f"rollout.ahead={k}")))
  for step in range(4):
    state = run.initial_state()
    if step > k:
      with checkpoint.Checkpoints(folder / str(k), keep=9, read_only=True) as checkpoints:
        state = checkpoints.restore(step - k, state)
    examples, params = run.examples(step)(0), run.to_sampling_params(state.params)
    texts = generate(run.sampler, params, examples, run.key(step), group_size=4).texts
    saved = json.loads(f"[{','.join(whole[k][2][-4:][step].splitlines())}]")
    assert [row["completion"] for row in saved] == [text for group in texts for text in group]
  ages = [row[STALENESS[0]] for row in whole[k][1] if "loss" in row] if k else [0] * 4
  assert ages == [min(step, k) for step in range(4)]


def test_staleness_shows_in_the_ratios_and_the_effective_sample_size(whole):
  rows = [row for row in whole[2][1] if "loss" in row]
  shares = [row[STALENESS[1]] for row in rows]
  assert shares[0] == pytest.approx(1.0, abs=1e-5)
  assert all(0 < share < 0.9 for share in shares[1:])
  assert rows[0]["ratio/max"] == pytest.approx(1.0, abs=1e-4)
  assert all(row["ratio/max"] > 1.2 for row in rows[1:])
  assert not any(set(STALENESS) & set(row) for row in whole[0][1])


@pytest.mark.parametrize("k", [1, 2])
def test_a_run_that_is_killed_or_made_longer_is_bit_for_bit_the_whole_one(whole, folder, k):
  killed, longer = folder / f"killed {k}", folder / f"longer {k}"
  shutil.copytree(folder / str(k), killed)
  for steps in (2, 3, 4):
    shutil.rmtree(killed / "checkpoints" / str(steps))
  train_on(1, longer, options(f"rollout.ahead={k}", "steps=2"))
  for workdir in (killed, longer):
    assert same(train_on(1, workdir, options(f"rollout.ahead={k}")), whole[k])
