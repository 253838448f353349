"""Tests that sums in chunks have the same bits on 1, 2, 4 and 8 devices, where XLA's differ."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.config import check, load
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import deterministic
from grpo_jax.learning.step import TrainState, make_score, make_train_step
from tests.helpers.learning import MODEL, assert_trees_close, bits, make_batch, step_once
from tests.helpers.runs import train_on

RATE = optax.constant_schedule(1e-2)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(RATE))


def wide_batch():
  """Returns 16 prompts, no two of them alike; in half of them an observation cuts completions."""
  batch = jax.tree.map(lambda a: jnp.concatenate([a] * 4), make_batch(average="token"))
  rng = np.random.default_rng(1)
  observed = (jnp.arange(16)[:, None, None] < 8) & (jnp.arange(5) == 2)
  return dataclasses.replace(
    batch,
    mask=batch.mask & ~observed,
    completions=jnp.asarray(rng.integers(0, 19, batch.completions.shape), jnp.int32),
    advantages=jnp.asarray(rng.normal(size=batch.advantages.shape), jnp.float32),
    weights=batch.weights / 4,
  )


def two_steps(shape, in_chunks=True):
  """Returns bits of (state, log-probs, metrics) after two steps with clipping, AdamW and KL."""
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  chunks = deterministic.Chunks(8, mesh) if in_chunks else None
  teaching = {"teacher_weight": 0.5, "teacher_discount": 0.9}
  algorithm = dataclasses.replace(ALGORITHMS["grpo"], beta=0.1, **teaching)
  step = make_train_step(MODEL, algorithm, OPTIMIZER, RATE, temperature=0.7, chunks=chunks)
  score = make_score(MODEL, temperature=0.7, chunks=chunks)

  def put(tree):
    return jax.device_put(tree, meshes.param_shardings(mesh, tree))

  params, teacher = (put(MODEL.init(jax.random.key(seed))) for seed in (0, 1))
  state = TrainState.create(params, OPTIMIZER)
  batch = jax.device_put(wide_batch(), meshes.batch_sharding(mesh))
  with jax.transfer_guard("disallow"):
    for _ in range(2):
      logp = score(state.params, batch)
      logps = {"old_logp": logp, "ref_logp": logp, "teacher_logp": score(teacher, batch)}
      state, metrics = step(state, dataclasses.replace(batch, **logps))
  assert state.params["embed"].sharding.is_equivalent_to(params["embed"].sharding, 2)
  return bits(state), bits(logp), bits(metrics)


@pytest.fixture(scope="module")
def on_one_device():
  return two_steps((1, 1, 1))


@pytest.mark.slow
def test_a_step_has_the_same_bits_on_one_and_eight_devices():
  """Runs in a process of its own, whose programs are compiled as for a user."""
  compare = (
    "from tests.learning.test_deterministic import two_steps\n"
    "assert two_steps((1, 1, 1)) == two_steps((4, 2, 1))"
  )
  environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
  subprocess.run([sys.executable, "-c", compare], env=environment, check=True)


WIDTHS = [(2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 2, 1), (2, 4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_a_step_has_the_same_bits_on_every_width(shape, on_one_device):
  assert two_steps(shape) == on_one_device


@pytest.mark.slow
def test_xlas_own_order_has_other_bits():
  """This is why the tests above are needed."""
  assert two_steps((1, 1, 1), in_chunks=False) != two_steps((8, 1, 1), in_chunks=False)


def test_chunks_add_up_to_the_gradient_of_the_whole():
  params = MODEL.init(jax.random.key(0))
  batch = wide_batch()
  whole, metrics = step_once(params, batch, ALGORITHMS["dapo"])
  chunks = deterministic.Chunks(8, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
  updated, in_chunks = step_once(params, batch, ALGORITHMS["dapo"], chunks=chunks)
  assert_trees_close(updated, whole, 1e-6)
  assert set(in_chunks) == set(metrics)
  for name, value in metrics.items():
    np.testing.assert_allclose(in_chunks[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_rows_come_back_in_their_order():
  """With eight chunks on two devices: twice each row, plus 100 times the first of its chunk."""
  mesh = meshes.make_mesh((2, 1, 1), jax.devices()[:2])
  run = deterministic.in_chunks(
    lambda params, rows, _: params * rows + 100 * rows[:1], deterministic.Chunks(8, mesh)
  )
  rows = jnp.arange(16.0)
  result = jax.jit(run)(jnp.float32(2), rows, None, rows > -1)
  np.testing.assert_array_equal(result, 2 * rows + 100 * (np.arange(16) // 2 * 2))


def test_a_mesh_that_does_not_fit_is_refused():
  mesh = meshes.make_mesh((1, 2, 2), jax.devices()[:4])
  with pytest.raises(ValueError, match=r"mesh\.tensor=1"):
    deterministic.Chunks(8, mesh)
  options = [
    "--config.train.reduction=deterministic", "--config.train.chunks=12", "--config.mesh.tensor=2",
    "--config.train.micro_batches=2", "--config.rollout.prompts_per_step=18",
    "--config.model.remat=layers",
  ]  # fmt: skip
  problems = check(load("experiments/tiny.py", options), 16)
  assert [problem.split(" is ")[0] for problem in problems] == [
    "train.chunks", "mesh.tensor", "train.micro_batches", "model.remat", "rollout.prompts_per_step",
  ]  # fmt: skip
  problems = check(load("experiments/tiny.py", ["--config.train.reduction=slow"]), 1)
  assert problems == ["train.reduction is 'slow', it must be 'fast' or 'deterministic'"]


# --- whole runs -----------------------------------------------------------------------------------

OPTIONS = [
  "--config.steps=3", "--config.checkpoint.every=1", "--config.task.settings.eval_size=0",
  "--config.rollout.completion_length=5", "--config.rewards.workers=0", "--config.log.samples=0",
  "--config.train.reduction=deterministic", "--config.algorithm.name=grpo",
  "--config.algorithm.advantage=batch_normalized", "--config.checkpoint.keep=9",
  "--config.model.remat=none",
]  # fmt: skip


def check_widths(tmp_path, widths):
  one = train_on(1, tmp_path / "1", OPTIONS)
  assert len(one[1]) == len(one[2]) == 3
  for width in widths:
    assert train_on(width, tmp_path / str(width), OPTIONS) == one
  train_on(1, tmp_path / "resumed", [*OPTIONS, "--config.steps=1"])
  assert train_on(widths[-1], tmp_path / "resumed", OPTIONS) == one


@pytest.mark.slow
def test_a_run_and_its_resume_have_the_same_bits_on_one_and_eight_devices(tmp_path):
  check_widths(tmp_path, [8])


@pytest.mark.slow
def test_a_run_has_the_same_bits_on_every_width(tmp_path):
  check_widths(tmp_path, [2, 4])
