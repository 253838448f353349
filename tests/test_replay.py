"""Tests whole runs with poisoned updates: skipped, counted, written, and run again exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import ahead, replay, train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.learning.updates import SkippedError
from grpo_jax.run import checkpoint, skipped
from grpo_jax.run.metrics import read_metrics
from grpo_jax.run.stores import open_store
from tests.helpers.learning import bits
from tests.helpers.stores import served

OPTIONS = [
  "--config.steps=5",
  "--config.checkpoint.every=1",
  "--config.checkpoint.keep=9",
  "--config.task.settings.eval_size=0",
  "--config.rollout.completion_length=5",
  "--config.rollout.prompts_per_step=16",
  "--config.log.samples=0",
  "--config.rewards.workers=0",
  "--config.lora.rank=2",
  "--config.algorithm.name=grpo",
  "--config.algorithm.beta=0.05",
  "--config.algorithm.entropy_target=9.0",
  "--config.algorithm.entropy_delta=0.01",
  "--config.train.micro_batches=2",
]
POISONED = (1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns two work directories of 5 steps, two of them poisoned, and an error.

  The second run gives up in between, with that error, and is continued.
  """
  folder = tmp_path_factory.mktemp("skipped")
  whole, parts = folder / "whole", folder / "parts"
  collect = ahead.collect

  def poisoned(*args, **kwargs):
    rollout = collect(*args, **kwargs)
    if int(jax.random.key_data(args[4])[1]) not in keys:
      return rollout
    advantages = rollout.batch.advantages.at[3, 1].set(jnp.inf)
    advantages = jax.device_put(advantages, rollout.batch.advantages.sharding)
    return dataclasses.replace(
      rollout, batch=dataclasses.replace(rollout.batch, advantages=advantages)
    )

  c = load("experiments/tiny.py", OPTIONS)
  run_key = jax.random.key(c.seed)
  keys = {int(jax.random.key_data(jax.random.fold_in(run_key, step))[1]) for step in POISONED}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ahead, "collect", poisoned)
    train.run(c, whole)
    fewer = load("experiments/tiny.py", [*OPTIONS, "--config.train.max_skipped=2"])
    with pytest.raises(SkippedError) as caught:
      train.run(fewer, parts)
    train.run(fewer, parts)
  return whole, parts, str(caught.value)


def state_of(workdir, step):
  run = build(load("experiments/tiny.py", OPTIONS))
  with checkpoint.Checkpoints(workdir, keep=9) as checkpoints:
    return checkpoints.restore(step, run.initial_state())


def test_a_run_skips_counts_and_goes_on(runs):
  whole, *_ = runs
  rows = [row for row in read_metrics(whole) if "loss" in row]
  assert [row["update/skipped"] for row in rows] == [0.0, 1.0, 1.0, 0.0, 0.0]
  assert [row["loss"] is None for row in rows] == [False, True, True, False, False]
  states = [state_of(whole, step) for step in (1, 3, 4)]
  assert [int(state.step) for state in states] == [1, 1, 2]
  assert bits(states[0].params) == bits(states[1].params) != bits(states[2].params)
  assert bits(states[0].opt_state) == bits(states[1].opt_state)


def test_a_run_gives_up_after_too_many_and_can_be_continued(runs):
  whole, parts, error = runs
  assert "2 updates in a row were skipped (max_skipped is 2)" in error
  assert "step 3 is saved" in error
  for step in POISONED:
    assert str(skipped.folder(parts, step, 0)) in error
  assert bits(state_of(whole, 5)) == bits(state_of(parts, 5))
  assert len([row for row in read_metrics(parts) if "loss" in row]) == 5


def test_a_dump_is_replayed_exactly_and_names_the_culprit(runs, capsys):
  whole, *_ = runs
  first, second = skipped.complete(whole)
  assert (first / "state").is_dir()
  assert not (second / "state").exists()  # it is that of the first
  assert replay.main([str(second), "--tokens", "4"]) == 0
  text = capsys.readouterr().out
  assert "step 2, update 0" in text
  assert "equal: yes, bit for bit" in text
  assert "first non-finite: token advantages, at [3, 1, 0]" in text
  worst = text.split("worst tokens")[1].splitlines()[2:]
  assert len(worst) == 4
  assert all(line.split()[0].startswith("3,1,") and "inf" in line for line in worst[:2])
  assert "gradient layers/q_lora_b" in text

  replayed = replay.replay(skipped.read(first))
  assert replayed.differing() == []
  assert bits(replayed.state.params) == bits(state_of(whole, 1).params)
  logp = replayed.tokens["logp"][replayed.mask]
  assert np.isfinite(logp).all()
  assert (logp < 0).all()
  recorded = dict(replayed.recorded, grad_norm=1.0, kl=replayed.recorded["kl"] + 1e-9)
  other = dataclasses.replace(replayed, recorded=recorded)
  assert other.differing() == ["grad_norm", "kl"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_dump_on_a_store_is_replayed(runs, scheme, capsys):
  whole, *_ = runs
  second = skipped.complete(whole)[1]
  with pytest.MonkeyPatch.context() as patch, served(scheme, patch) as store:
    address = store.new()
    files = [path for path in (whole / skipped.FOLDER).rglob("*") if path.is_file()]
    for path in files:
      open_store(address).write(path.relative_to(whole).as_posix(), path)
    assert replay.main([f"{address}/skipped/{second.name}"]) == 0
    text = capsys.readouterr().out
    assert "equal: yes, bit for bit" in text
    assert "first non-finite: token advantages, at [3, 1, 0]" in text
    assert replay.main([f"{address}/skipped/other"]) == 2
    assert "holds no recorded.json" in capsys.readouterr().err
    assert replay.main([f"{store.new()}/skipped/other"]) == 2
    assert "holds nothing: give the work directory of a run" in capsys.readouterr().err


def test_a_folder_that_is_not_a_dump_is_refused(tmp_path, capsys):
  assert replay.main([str(tmp_path)]) == 2
  assert "holds no recorded.json" in capsys.readouterr().err


def test_the_fields_are_checked(tmp_path):
  c = load("experiments/tiny.py", ["--config.train.spike=0.5", "--config.train.max_skipped=0"])
  with pytest.raises(ConfigError) as caught:
    train.run(c, tmp_path)
  assert "train.spike is 0.5, it must be 0 (off) or above 1" in str(caught.value)
  assert "train.max_skipped is 0, it must be at least 1" in str(caught.value)


@pytest.mark.slow
def test_an_update_beside_a_critic_is_replayed(tmp_path):
  """The critic is not part of the dump: the batch holds the advantages it gave."""
  collect = ahead.collect

  def poisoned(*args, **kwargs):
    rollout = collect(*args, **kwargs)
    weights = rollout.batch.weights.at[1, 0].set(jnp.inf)
    weights = jax.device_put(weights, rollout.batch.weights.sharding)
    return dataclasses.replace(rollout, batch=dataclasses.replace(rollout.batch, weights=weights))

  small = ("steps=1", "algorithm.name=ppo", "rollout.completion_length=3", "rewards.workers=0")
  options = [f"--config.{change}" for change in (*small, "task.settings.eval_size=0")]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ahead, "collect", poisoned)
    train.run(load("experiments/tiny.py", options), tmp_path)
  row = next(row for row in read_metrics(tmp_path) if "loss" in row)
  assert row["update/skipped"] == row["critic/skipped"] == 1
  [dump] = skipped.complete(tmp_path)
  assert replay.replay(skipped.read(dump)).differing() == []
