"""Whole runs of several processes: their settings, and the comparison of what they leave."""

import time

import jax
import numpy as np

from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from tests.helpers.processes import finish

HEARTBEAT = 10  # seconds
TIMES = ("step_time", "tokens_per_second", "time/sampling", "time/rewards", "time/waiting")
SMALL = [
  "--config=experiments/tiny.py",
  "--config.steps=3",
  "--config.checkpoint.every=2",
  "--config.eval.batch_prompts=8",
  "--config.rollout.prompts_per_step=16",
  "--config.rollout.group_size=4",
  "--config.rollout.completion_length=5",
  f"--config.hosts.heartbeat={HEARTBEAT}",
]
# Turns of several lengths, episodes that end early, and environments of each host's own.
EPISODES = [
  "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.task.name=guess_number",
  "--config.task.settings.games=0", "--config.rollout.completion_length=40",
  "--config.episode.turns=3", "--config.episode.turn_length=6",
  "--config.rollout.temperature=0.5", "--config.algorithm.advantage=turn_advantages",
]  # fmt: skip
RUNS = {
  "plain": [
    "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.task.settings.eval_size=5",
  ],
  "episodes": EPISODES,
  # Each waits for its own environment; of 8 episodes, a device has seats for 5.
  "episodes for themselves": [
    *EPISODES, "--config.episode.in_step=false", "--config.rollout.cache_gib=0.00025",
  ],
  # Statistics of the batch, a KL term, resamples, mini- and micro-batches, and all three axes.
  "rich": [
    "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
    "--config.task.settings.eval_size=5",
    "--config.algorithm.advantage=batch_normalized", "--config.algorithm.kl=k3",
    "--config.algorithm.beta=0.1", "--config.train.mini_batches=2", "--config.train.epochs=2",
    "--config.train.micro_batches=2", "--config.rollout.max_resamples=2",
    "--config.rollout.completion_length=2",
  ],
  # Rollouts ahead of the updates, on all devices, and on the last two of each host.
  "ahead": [
    "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.task.settings.eval_size=5",
    "--config.rollout.ahead=1", "--config.algorithm.correction=none",
  ],
  "ahead on devices of their own": [
    "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.rollout_devices=4",
    "--config.task.settings.eval_size=5", "--config.rollout.ahead=2",
    "--config.algorithm.anchor=sampler", "--config.rollout.max_resamples=1",
  ],
  # Counts of problems that are drawn by both hosts, some of them by a second draw of the step.
  "curriculum": [
    "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.task.settings.eval_size=5",
    "--config.data.curriculum=failure", "--config.rollout.max_resamples=1",
  ],
}  # fmt: skip


def train(workdir, *overrides):
  return ["-m", "grpo_jax.train", "--workdir", str(workdir), *SMALL, *overrides]


def rows_of(workdir):
  """Returns the rows of metrics of a run without their times."""
  rows = read_metrics(workdir)
  return [{name: v for name, v in row.items() if name not in TIMES} for row in rows]


def samples_of(workdir):
  """Returns the text of each file of samples by its name."""
  return {file.name: file.read_text() for file in sorted((workdir / "samples").iterdir())}


def state_of(workdir, options, step):
  """Returns the state of a checkpoint, which must be the newest one."""
  config = load("experiments/tiny.py", [*SMALL[1:], *options])
  with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() == step
    return checkpoints.restore(step, build(config).initial_state())


def check_same(one, two, options, step=3):
  """Checks that two runs have the same completions, and numbers that agree within rounding.

  Returns the rows of metrics of the first one, and both states.
  """
  assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
  # To the letter, for the prompts of all hosts in their order.
  assert samples_of(one) == samples_of(two)
  rows = [rows_of(workdir) for workdir in (one, two)]
  for a, b in zip(*rows, strict=True):
    assert set(a) == set(b)
    for key in a:
      values = [np.nan if row[key] is None else row[key] for row in (a, b)]
      np.testing.assert_allclose(*values, rtol=2e-5, atol=2e-5, err_msg=key)
  states = [state_of(workdir, options, step) for workdir in (one, two)]
  for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  return rows[0], states


def wait_for_step(workdir, processes):
  for _ in range(3000):
    if (workdir / "metrics.jsonl").is_file() and len(read_metrics(workdir)) > 2:
      return
    assert all(process.poll() is None for process in processes), finish(processes)
    time.sleep(0.2)
  raise AssertionError("no step has finished")
