"""Updates that go wrong: skipped bit for bit, counted, kept, and made again exactly."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import replay, train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.learning.skipping import MEMORY, WARM_UP, History, accept_update
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.learning.updates import SkippedError
from grpo_jax.run import checkpoint
from grpo_jax.run import skipped as dumps
from grpo_jax.run.metrics import read_metrics
from tests.learning.test_step import MODEL, make_batch

SPIKE = 3.0
RATE = optax.constant_schedule(1e-3)
ADAM = optax.adam(RATE)


@pytest.fixture(scope="module")
def step():
  """An update with everything: two micro-batches, Adam, a limit on spikes."""
  return make_train_step(
    MODEL, ALGORITHMS["dapo"], ADAM, RATE, temperature=0.7, micro_batches=2, spike=SPIKE
  )


def new_state():
  params = MODEL.init(jax.random.key(0))
  return TrainState(jnp.int32(0), params, ADAM.init(params), history=History.new())


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def scaled(batch, factor):
  return dataclasses.replace(batch, advantages=batch.advantages * factor)


def test_an_update_that_is_not_finite_changes_nothing(step):
  good = make_batch(average="token")
  state, metrics = step(new_state(), good)
  assert float(metrics["update/skipped"]) == 0.0
  infinite = dataclasses.replace(good, advantages=good.advantages.at[1, 2].set(jnp.inf))
  overflow = scaled(good, 1e25)  # the loss and each gradient are finite, the sum of squares is not
  for number, bad in enumerate((infinite, scaled(good, jnp.nan), overflow), start=1):
    before = bits((state.step, state.params, state.opt_state))
    state, metrics = step(state, bad)
    assert bits((state.step, state.params, state.opt_state)) == before
    assert float(metrics["update/skipped"]) == 1.0
    assert int(state.history.skipped) == number
  assert math.isfinite(metrics["loss"])
  assert not math.isfinite(metrics["grad_norm"])
  before = bits(state.params)
  state, metrics = step(state, good)
  assert bits(state.params) != before
  assert (int(state.step), int(state.history.skipped)) == (2, 0)


def test_a_parameter_that_is_nan_skips_everything(step):
  state = new_state()
  params = state.params | {"final_norm": state.params["final_norm"].at[3].set(jnp.nan)}
  before = bits((params, state.opt_state))
  state, metrics = step(dataclasses.replace(state, params=params), make_batch(average="token"))
  assert bits((state.params, state.opt_state)) == before
  assert float(metrics["update/skipped"]) == 1.0


def test_a_spike_is_skipped_once_the_usual_norm_is_known(step):
  good, state, norms = make_batch(average="token"), new_state(), []
  for number in range(WARM_UP):
    state, metrics = step(state, scaled(good, 50.0 if number == 0 else 1.0))
    assert float(metrics["update/skipped"]) == 0.0
    norms.append(float(metrics["grad_norm"]))
  assert max(norms) > SPIKE * np.exp(np.mean(np.log(norms)))
  np.testing.assert_allclose(state.history.log_norm, np.mean(np.log(norms)), rtol=1e-5)
  before, history = bits((state.step, state.params, state.opt_state)), state.history
  log_norm, counted = float(history.log_norm), int(history.counted)
  state, metrics = step(state, scaled(good, 50.0))
  assert float(metrics["grad_norm"]) > SPIKE * np.exp(log_norm)
  assert float(metrics["update/skipped"]) == 1.0
  assert bits((state.step, state.params, state.opt_state)) == before
  assert (float(state.history.log_norm), int(state.history.counted)) == (log_norm, counted)
  state, metrics = step(state, scaled(good, 1.2))
  assert float(metrics["update/skipped"]) == 0.0


def test_the_history_by_hand():
  history = History.new()
  ok, history = accept_update(history, 1.0, jnp.float32(np.e), 2.0)
  assert (bool(ok), float(history.log_norm), int(history.counted)) == (True, 1.0, 1)
  _, history = accept_update(history, 1.0, jnp.float32(0.0), 2.0)  # no gradient: not counted
  assert (float(history.log_norm), int(history.counted)) == (1.0, 1)
  _, history = accept_update(history, 1.0, jnp.float32(np.e**4), 2.0)
  np.testing.assert_allclose(history.log_norm, 2.5, rtol=1e-6)  # (1 + 4) / 2
  long = dataclasses.replace(history, counted=jnp.int32(MEMORY), log_norm=jnp.float32(0.0))
  _, moved = accept_update(long, 1.0, jnp.float32(np.e**0.5), 2.0)
  np.testing.assert_allclose(moved.log_norm, 0.5 / MEMORY, rtol=1e-6)
  assert int(moved.counted) == MEMORY
  assert not accept_update(long, 1.0, jnp.float32(2.001), 2.0)[0]  # exp(0) = 1, times 2
  assert accept_update(long, 1.0, jnp.float32(2.001), 0.0)[0]
  with pytest.raises(ValueError, match="needs a history"):
    accept_update(None, 1.0, 1.0, 2.0)


# --- whole runs -----------------------------------------------------------------------------------

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
  "--config.train.micro_batches=2",
]
POISONED = (1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(5 steps of which two are poisoned; the same with a run that gives up in between; its error)"""
  folder = tmp_path_factory.mktemp("skipped")
  whole, parts = folder / "whole", folder / "parts"
  collect = train.collect

  def poisoned(*args, **kwargs):
    rolled = collect(*args, **kwargs)
    step = int(jax.random.key_data(args[4])[1])
    if step not in steps:
      return rolled
    advantages = rolled.batch.advantages.at[3, 1].set(jnp.inf)
    advantages = jax.device_put(advantages, rolled.batch.advantages.sharding)
    return dataclasses.replace(
      rolled, batch=dataclasses.replace(rolled.batch, advantages=advantages)
    )

  c = load("experiments/tiny.py", OPTIONS)
  keys = [jax.random.fold_in(jax.random.key(c.seed), step) for step in range(c.steps)]
  steps = {int(jax.random.key_data(keys[step])[1]) for step in POISONED}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "collect", poisoned)
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
    assert str(dumps.folder(parts, step, 0)) in error
  assert bits(state_of(whole, 5)) == bits(state_of(parts, 5))
  assert len([row for row in read_metrics(parts) if "loss" in row]) == 5


def test_a_dump_is_replayed_exactly_and_names_the_culprit(runs, capsys):
  whole, *_ = runs
  first, second = dumps.complete(whole)
  assert (first / "state").is_dir()
  assert not (second / "state").exists()  # that of the first
  assert replay.main([str(second), "--tokens", "4"]) == 0
  text = capsys.readouterr().out
  assert "step 2, update 0" in text
  assert "equal: yes, bit for bit" in text
  assert "first non-finite: token advantages, at [3, 1, 0]" in text
  worst = text.split("worst tokens")[1].splitlines()[2:]
  assert len(worst) == 4
  assert all(line.split()[0].startswith("3,1,") and "inf" in line for line in worst[:2])
  assert "gradient layers/q_lora_b" in text

  replayed = replay.replay(dumps.read(first))
  assert replayed.differing() == []
  assert bits(replayed.state.params) == bits(state_of(whole, 1).params)
  logp = replayed.tokens["logp"][replayed.mask]
  assert np.isfinite(logp).all()
  assert (logp < 0).all()
  recorded = dict(replayed.recorded, grad_norm=1.0, kl=replayed.recorded["kl"] + 1e-9)
  other = dataclasses.replace(replayed, recorded=recorded)
  assert other.differing() == ["grad_norm", "kl"]


def test_few_dumps_are_kept_and_half_written_ones_do_not_count(tmp_path, capsys):
  for number in range(2):
    path = dumps.folder(tmp_path, number, 0)
    path.mkdir(parents=True)
    if number:
      (path / dumps.RECORDED).write_text(json.dumps({}))
  assert [path.name for path in dumps.complete(tmp_path)] == ["step_000001_update_0"]
  assert replay.main([str(dumps.folder(tmp_path, 0, 0))]) == 2
  assert "holds no recorded.json" in capsys.readouterr().err


def test_an_old_checkpoint_without_a_history_is_read(tmp_path):
  state = new_state()
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, dataclasses.replace(state, history=None))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    restored = checkpoints.restore(1, state)
  assert bits(restored) == bits(state)


def test_the_fields_are_checked(tmp_path):
  c = load("experiments/tiny.py", ["--config.train.spike=0.5", "--config.train.max_skipped=0"])
  with pytest.raises(ConfigError) as caught:
    train.run(c, tmp_path)
  assert "train.spike is 0.5, it must be 0 (off) or above 1" in str(caught.value)
  assert "train.max_skipped is 0, it must be at least 1" in str(caught.value)
