"""Tests completions that go on in later steps: their tokens, log-probs, order and resuming."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from grpo_jax import ahead
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.learning.step import STALENESS, score_batch
from grpo_jax.rollout import generate
from grpo_jax.sampling import partial as sampling
from grpo_jax.sampling.partial import METRICS, PartialSampler
from tests.helpers.runs import train_on
from tests.helpers.schedules import partial_schedule

TINY = "experiments/tiny.py"
LENGTH, ROUND = 40, 7
SMALL = (
  "seed=3",
  "steps=4",
  "checkpoint.every=1",
  "checkpoint.keep=9",
  "eval.every=2",
  "eval.batch_prompts=8",
  "task.settings.eval_size=3",
  "rollout.prompts_per_step=4",
  "rollout.partial_prompts=4",
  f"rollout.partial_tokens={ROUND}",
  "rollout.group_size=3",
  f"rollout.completion_length={LENGTH}",
  # 20 of 259 tokens end a completion: a third of them is longer than two rounds.
  f"rollout.stop_ids={tuple(range(236, 256))}",
  "rewards.workers=0",
  "log.samples=0",
  "algorithm.anchor=sampler",
  "optimizer.learning_rate=1e-2",
)


def options(*changes):
  return [f"--config.{change}" for change in (*SMALL, *changes)]


@pytest.fixture
def on_devices(monkeypatch):
  def limit(count):
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: count)

  return limit


@pytest.fixture
def one_device(on_devices):
  on_devices(1)


def take(run, states):
  """The rollouts of a run whose step n starts from `states[n]`."""
  with run.scorer() as scorer, ahead.Rollouts(run, scorer) as rollouts:
    return [rollouts.take(step, state) for step, state in enumerate(states)]


def changed(run, count):
  """States whose parameters differ from step to step."""
  states = [run.initial_state()]
  for number in range(1, count):
    params = jax.tree.map(lambda a: a * (1 + 0.05 * number), states[0].params)  # noqa: B023
    states.append(dataclasses.replace(states[0], params=params))
  return states


def completions_of(rollout):
  out = rollout.scored.out
  return {
    example.key: [row[mask].tolist() for row, mask in zip(*group)]
    for example, *group in zip(rollout.scored.examples, out.tokens, out.mask)
  }


@pytest.fixture(scope="module")
def unchanged():
  """Five steps with the same parameters, and (key, tokens, log-probs) of whole completions."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
    patch.setattr(jax, "device_count", lambda *_: 1)
    run = build(load(TINY, options()))
    state, whole = run.initial_state(), []
    params = run.to_sampling_params(state.params)
    for step in range(6):
      examples = run.examples(step)(0)
      out = generate(run.sampler, params, examples, run.key(step), group_size=3)
      for example, tokens, mask, logp in zip(examples, out.tokens, out.mask, out.logp):
        whole.append((example.key, [row[m].tolist() for row, m in zip(tokens, mask)], logp))
    return take(run, [state] * 5), whole


def test_with_the_same_parameters_completions_are_those_of_whole_ones(unchanged):
  rollouts, whole = unchanged
  by_key = {key: rest for key, *rest in whole}
  assert len(by_key) == 24  # no problem twice
  lengths, keys = [], []
  for rollout in rollouts:
    for row, (key, completions) in enumerate(completions_of(rollout).items()):
      tokens, logp = by_key[key]
      assert completions == tokens
      np.testing.assert_allclose(rollout.scored.out.logp[row], logp, atol=1e-5)
      lengths += map(len, completions)
      keys.append(key)
  assert len(set(keys)) == len(keys) == 20
  assert max(lengths) == LENGTH  # cut off
  assert min(lengths) < ROUND  # ended in its first round
  assert max(r.metrics[METRICS[0]] for r in rollouts) > 0.5


def test_a_step_takes_the_oldest_complete_prompts_after_as_few_rounds_as_possible(unchanged):
  """Plays the schedule by hand, from the lengths of whole completions."""
  rollouts, whole = unchanged
  rounds = [-(-max(map(len, tokens)) // ROUND) for _, tokens, _ in whole]
  schedule = partial_schedule(rounds, steps=5, count=4, size=8)
  for rollout, (chosen, played) in zip(rollouts, schedule, strict=True):
    assert list(completions_of(rollout)) == [whole[number][0] for number in chosen]
    assert rollout.metrics[METRICS[1]] == played
  assert len({played for _, played in schedule}) > 1


def test_a_reward_that_raises_leaves_the_completions_to_be_saved(one_device, unchanged):
  run = build(load(TINY, options()))
  state = run.initial_state()
  with run.scorer() as scorer:

    def away(*arguments, state, **options):
      if state.global_step == 1:
        raise TimeoutError
      return scorer(*arguments, state=state, **options)

    with ahead.Rollouts(run, away) as rollouts:
      rollouts.take(0, state)
      with pytest.raises(TimeoutError):
        rollouts.take(1, state)
      saved = rollouts.saved()
    with ahead.Rollouts(run, scorer) as rollouts:
      rollouts.restore(saved)
      rest = [rollouts.take(step, state) for step in (1, 2)]
  for actual, expected in zip(rest, unchanged[0][1:]):
    assert completions_of(actual) == completions_of(expected)
    for name, values in expected.batch.arrays().items():
      np.testing.assert_array_equal(actual.batch.arrays()[name], values, name)


def test_each_token_keeps_the_log_prob_of_the_parameters_that_drew_it(one_device):
  """Recomputes them with the parameters of each step; others give others."""
  run = build(load(TINY, options()))
  states = changed(run, 5)
  versions, carried = set(), 0
  score = jax.jit(partial(score_batch, run.model))
  for step, rollout in enumerate(take(run, states)):
    batch = rollout.batch
    staleness, mask = np.asarray(batch.staleness), np.asarray(batch.mask)
    drawn = step - staleness
    logp = [np.asarray(score(s.params, batch)[0]) for s in states]
    for version in range(5):
      here = mask & (drawn == version)
      np.testing.assert_allclose(
        np.asarray(batch.sampler_logp)[here], logp[version][here], atol=2e-5
      )
      versions |= {(step, version)} if here.any() else set()
      if version != step and here.sum() > 20:
        assert np.abs(logp[step] - logp[version])[here].max() > 0.01
    # Versions of a completion never go back, and its first token is of the oldest.
    assert (np.diff(np.where(mask, drawn, step), axis=-1) >= 0).all()
    carried += ((staleness > 0) & mask).sum()
    expected = ((staleness > 0) & mask).sum() / mask.sum()
    assert rollout.metrics[METRICS[0]] == pytest.approx(expected)
  assert carried > 100
  assert any(len({v for s, v in versions if s == step}) > 1 for step in range(5))


def test_the_ratio_of_a_token_is_to_the_policy_that_drew_it(one_device):
  """By hand, from log-probs of the saved parameters, for a batch of several versions."""
  run = build(load(TINY, options()))
  states = changed(run, 4)
  batch = take(run, states)[3].batch
  mask = np.asarray(batch.mask)
  drawn = (3 - np.asarray(batch.staleness)).astype(int)
  assert len(np.unique(drawn[mask])) > 1
  score = jax.jit(partial(score_batch, run.model))
  by_version = np.stack([score(s.params, batch)[0] for s in states])
  old = np.take_along_axis(by_version, drawn[None], axis=0)[0]
  ratio = np.exp(by_version[3] - old)
  _, metrics = run.learner()(states[3], batch, 3)
  assert metrics["ratio/max"] == pytest.approx(ratio[mask].max(), rel=1e-3)
  assert metrics[STALENESS[0]] == pytest.approx((3 - drawn)[mask].mean(), rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("partial")


@pytest.fixture(scope="module")
def whole(folder):
  return train_on(1, folder / "whole", options())


def same(a, b):
  np.testing.assert_equal(a[1], b[1])
  return a[0] == b[0] and a[2] == b[2]


@pytest.mark.slow
def test_a_run_that_is_killed_or_made_longer_is_bit_for_bit_the_whole_one(folder, whole):
  killed, longer = folder / "killed", folder / "longer"
  shutil.copytree(folder / "whole", killed)
  for steps in (2, 3, 4):
    shutil.rmtree(killed / "checkpoints" / str(steps))
  train_on(1, longer, options("steps=2"))
  for workdir in (killed, longer):
    assert same(train_on(1, workdir, options()), whole)
  rows = [row for row in whole[1] if "loss" in row]
  assert max(row[METRICS[0]] for row in rows) > 0.3
  assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
def test_two_devices_give_the_same_completions(folder, whole):
  def completions(result):
    return [json.loads(line)["completion"] for text in result[2] for line in text.splitlines()]

  assert completions(train_on(2, folder / "two", options())) == completions(whole)


# --- the sampler ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_are_read_in_pieces_that_need_not_divide_them(one_device, monkeypatch):
  """With pieces of 3 and of 16 tokens, and rounds of 13, tokens are the same."""
  texts = []
  for size in (3, 16):
    monkeypatch.setattr(sampling, "READ", size)
    run = build(load(TINY, options("rollout.partial_tokens=13")))
    texts.append([completions_of(r) for r in take(run, [run.initial_state()] * 3)])
  assert texts[0] == texts[1]


def test_a_model_that_cannot_read_is_refused(one_device):
  run = build(load(TINY, options()))

  class Model:
    config = run.model.config

  sampler = dataclasses.replace(run.sampler)
  object.__setattr__(sampler, "model", Model())
  with pytest.raises(ValueError, match="Model has no method 'extend', which partial rollouts need"):
    PartialSampler(sampler, 4)


# --- bad input ------------------------------------------------------------------------------------

REFUSED = {
  "rollout.partial_tokens=-1": "rollout.partial_tokens is -1, it must be at least 0 tokens",
  "rollout.partial_prompts=-8": "rollout.partial_prompts is -8, it must be at least 0",
  "rollout.partial_tokens=0": "rollout.partial_prompts is 4, but rollout.partial_tokens is 0",
  "rollout.partial_tokens=40": (
    "rollout.partial_tokens is 40, it must be below rollout.completion_length=40"
  ),
  "rollout.partial_prompts=0": "but rollout.partial_prompts is 0, so that a step would wait",
  "rollout.partial_prompts=3": "rollout.partial_prompts is 3, it must be a multiple of 2, since",
  "rollout.ahead=1": "does not go together with rollout.ahead=1: set rollout.ahead=0, or",
  "rollout.max_resamples=2": "does not go together with rollout.max_resamples=2",
  "rollout.cache_gib=1.0": "does not go together with rollout.cache_gib=1.0",
  "data.curriculum=failure": "does not go together with data.curriculum='failure'",
  "train.reduction=deterministic": "does not go together with train.reduction='deterministic'",
  "algorithm.anchor=old": (
    "rollout.partial_tokens is 7, but algorithm 'dr_grpo' takes rollouts to be from the policy it"
  ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_settings_that_do_not_go_together_are_refused_before_anything_compiles(change, on_devices):
  on_devices(2)
  with pytest.raises(ConfigError) as caught:
    build(load(TINY, options(change)))
  assert REFUSED[change] in str(caught.value)


def test_several_hosts_are_refused(monkeypatch, one_device):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ConfigError, match=r"it must be 0 on several hosts \(2 here\)"):
    build(load(TINY, options("rollout.ahead=1")))


def test_experts_that_are_replayed_are_refused(one_device):
  with pytest.raises(ConfigError, match="a completion that goes on is read again"):
    build(load(TINY, options("model.source=random:tiny_moe", "train.routes=sampled")))
