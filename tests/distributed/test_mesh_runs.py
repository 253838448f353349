"""Compares whole runs on meshes of 1, 2, 4 and 8 devices, for every option of the update.

The rewards are coarse, so that many groups have no variance and are left out of the update: the
sizes that are left differ from step to step, and their padding from mesh to mesh.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.distributed.mesh import AXES
from grpo_jax.run.metrics import read_metrics

MESHES = {
  "1": (1, 1, 1),
  "2": (2, 1, 1),
  "4": (1, 4, 1),
  "8": (8, 1, 1),
  "8 with tensor": (2, 2, 2),
  "8 with context": (2, 1, 1, 1, 4),
}
REWARD = """
def coarse(prompts, completions, level, **columns):
  return [float(all("a" <= c <= "m" for c in t[:n].ljust(n))) for t, n in zip(completions, level)]
"""
BASE = [
  "steps=4",
  "seed=3",
  "task.name=jsonl",
  "task.settings.eval_fraction=0.1",
  "rollout.group_size=4",
  "rollout.completion_length=6",
  # Unrewarded letters end a completion, so that their lengths differ.
  "rollout.stop=('n','o','p','q','r','s','t','u','v','w','x','y','z','N','O','P','Q','R','S')",
  "rollout.prompts_per_step=16",
  "eval.every=2",
  "rewards.workers=0",
  "log.samples=0",
  "checkpoint.every=100",
  "algorithm.name=dapo",
  "optimizer.learning_rate=1e-2",
  # With the default of 1e-8, Adam makes whole steps of gradients that are rounding alone: a KL
  # term without advantages, at the reference itself, is 0 on one device and about 1e-10 on others.
  "optimizer.eps=1e-3",
]
OPTIONS = {
  "a critic": ["algorithm.name=ppo", "critic.learning_rate=1e-2", "train.mini_batches=2"],
  "one update": [],
  "mini-batches and epochs": ["train.mini_batches=2", "train.epochs=2"],
  "factors of the second moment": ["optimizer.name=adafactor", "optimizer.eps=1e-8"],
  "orthogonal updates": ["optimizer.name=muon"],
  "micro-batches": ["train.micro_batches=2"],
  "micro-batches by tokens": ["train.micro_batch_tokens=40"],
  "micro-batches of similar lengths": ["train.micro_batches=2", "train.sort_by_length=true"],
  "resampling": ["rollout.max_resamples=2"],
  "KL to a moving reference": [
    "algorithm.name=grpo", "reference.sync_every=2", "reference.sync_share=0.5"
  ],
  "statistics of the batch, truncated completions masked": [
    "algorithm.name=reinforce_pp_baseline", "rollout.mask_truncated=true"
  ],
  "a teacher, and the KL in the reward": [
    "algorithm.name=rloo_kl", "teacher.source=random:tiny", "algorithm.teacher_weight=0.5",
    "algorithm.teacher_discount=0.9",
  ],
  "the KL whitened with the rewards": ["algorithm.name=reinforce_pp_kl", "algorithm.beta=0.1"],
  "a divergence to a teacher": [
    "algorithm.teacher_weight=0.5", "teacher.source=random:tiny", "algorithm.teacher_divergence=0.5"
  ],
  "everything": [
    "algorithm.name=grpo", "rollout.prompts_per_step=32", "rollout.max_resamples=1",
    "rollout.mask_truncated=true", "rollout.prompt_length=12", "train.mini_batches=2",
    "train.epochs=2", "train.micro_batches=2", "train.micro_batch_tokens=40",
  ],
}  # fmt: skip
RUNS = """
import json, sys
from grpo_jax import train
from grpo_jax.config import load
for workdir, overrides in json.loads(sys.argv[1]).items():
  train.run(load("experiments/tiny.py", [f"--config.{o}" for o in overrides]), workdir)
"""
# Metrics of the time, and of the padding, which the mesh decides.
OWN = (
  "step_time", "tokens_per_second", "time/sampling", "time/rewards", "time/waiting",
  "update/padded",
)  # fmt: skip


def run_all(folder, shape):
  """Runs every option on a mesh, in a process with as many devices; returns option -> workdir."""
  place = [f"mesh.{axis}={size}" for axis, size in zip(AXES, shape)]
  settings = [
    f"task.settings.path={folder}/rows.jsonl", f"task.settings.reward={folder}/reward.py:coarse"
  ]  # fmt: skip
  workdirs = {name: folder / "x".join(map(str, shape)) / name for name in OPTIONS}
  runs = {str(workdirs[n]): [*BASE, *settings, *place, *more] for n, more in OPTIONS.items()}
  flags = (
    f"--xla_force_host_platform_device_count={np.prod(shape)}",
    # XLA:CPU: on few and busy cores, devices can wait for each other for longer than 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  )
  environment = dict(
    os.environ,
    XLA_FLAGS=" ".join(flags),
    PYTHONPATH=str(Path.cwd()),
  )
  process = subprocess.run(
    [sys.executable, "-c", RUNS, json.dumps(runs)], env=environment, capture_output=True, text=True
  )
  assert process.returncode == 0, process.stderr[-3000:]
  return workdirs


def samples(workdir):
  """Returns (file, prompt, completion, reward) of every completion; no reward in evaluations."""
  return [
    (file.name, row["prompt"], row["completion"], row.get("reward"))
    for file in sorted((workdir / "samples").iterdir())
    for row in map(json.loads, file.read_text().splitlines())
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("meshes")
  (folder / "reward.py").write_text(REWARD)
  rows = [{"prompt": f"{7 * i}:", "level": i % 2 + 1} for i in range(64)]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.fixture(scope="module")
def one_device(folder):
  return run_all(folder, MESHES["1"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "1"])
def test_the_mesh_changes_no_run(folder, one_device, mesh):
  workdirs = run_all(folder, MESHES[mesh])
  differing = []
  for name, workdir in workdirs.items():
    expected = samples(one_device[name])
    assert len(expected) > 200
    if samples(workdir) != expected:
      differing.append(name)
      continue
    rows, others = read_metrics(workdir), read_metrics(one_device[name])
    for a, b in zip(rows, others, strict=True):
      assert set(a) == set(b)
      for key in set(a) - set(OWN):
        values = [np.nan if row[key] is None else row[key] for row in (a, b)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4, err_msg=f"{name}: {key}")
  assert not differing


@pytest.mark.slow
def test_the_runs_leave_groups_out_and_learn(one_device):
  """Otherwise, the comparison above would show little."""
  for name, workdir in one_device.items():
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    shares = [row["frac_reward_zero_std"] for row in rows]
    assert any(0 < share < 1 for share in shares), name
    assert len(set(shares)) > 1, name
    texts = [row[2] for row in samples(workdir)]
    assert len(set(texts)) > len(texts) / 4, name
    assert any(row["reward"] != rows[0]["reward"] for row in rows), name
    assert all(0.1 < row["completions/clipped_ratio"] < 0.9 for row in rows), name
