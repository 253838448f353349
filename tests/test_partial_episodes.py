"""Tests episodes that go on in later steps: their games, log-probs, schedule and resuming."""

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
from grpo_jax.sampling.partial import METRICS
from tests.helpers.runs import train_on
from tests.helpers.schedules import partial_schedule

TINY = "experiments/tiny.py"
ENDS = tuple(range(192, 257))
SMALL = (
  "task.name=table",
  "task.settings.environment=tests/helpers/environments.py:Lengths",
  "task.settings.reward={'name': 'length', 'target': 3}",
  "task.settings.eval_fraction=0",
  f"rollout.stop_ids={ENDS}".replace(" ", ""),
  "steps=4",
  "checkpoint.every=1",
  "checkpoint.keep=9",
  "rollout.prompts_per_step=4",
  "rollout.partial_prompts=12",
  "rollout.partial_tokens=6",
  "rollout.group_size=2",
  "rollout.completion_length=60",
  "episode.turns=4",
  "episode.turn_length=6",
  "rewards.workers=0",
  "log.samples=0",
  "algorithm.anchor=sampler",
  "optimizer.learning_rate=1e-2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("partial_episodes")
  rows = "".join(json.dumps({"prompt": f"{i}:"}) + "\n" for i in range(64))
  (folder / "rows.jsonl").write_text(rows)
  return folder


@pytest.fixture(scope="module")
def options(folder):
  path = f"task.settings.path={folder}/rows.jsonl"
  return lambda *changes: [f"--config.{change}" for change in (*SMALL, path, *changes)]


@pytest.fixture(scope="module", autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
    patch.setattr(jax, "device_count", lambda *_: 1)
    yield


def take(run, states):
  """The rollouts of a run whose step n starts from `states[n]`."""
  with run.scorer() as scorer, ahead.Rollouts(run, scorer) as rollouts:
    return [rollouts.take(step, state) for step, state in enumerate(states)]


@pytest.fixture(scope="module")
def unchanged(options):
  """Five steps with the same parameters, and whole episodes: (key, transcripts, turns)."""
  run = build(load(TINY, options()))
  state, whole = run.initial_state(), []
  params = run.to_sampling_params(state.params)
  for step in range(8):
    examples = run.examples(step)(0)
    out = generate(run.sampler, params, examples, run.key(step), group_size=2)
    whole += zip([e.key for e in examples], out.transcripts, out.turns.tolist(), out.logp)
  return take(run, [state] * 5), whole


def test_with_the_same_parameters_games_are_those_of_whole_episodes(unchanged):
  rollouts, whole = unchanged
  by_key = {key: rest for key, *rest in whole}
  assert len(by_key) == 32  # no problem twice
  seen, turns = [], set()
  for rollout in rollouts:
    out = rollout.scored.out
    for row, example in enumerate(rollout.scored.examples):
      transcripts, _, logp = by_key[example.key]
      assert out.transcripts[row] == transcripts
      np.testing.assert_allclose(out.logp[row], logp, atol=1e-4)
      turns |= {*out.turns[row].tolist()}
      seen.append(example.key)
  assert len(set(seen)) == len(seen) == 20
  assert len(turns) >= 3
  assert max(r.metrics[METRICS[0]] for r in rollouts) > 0.2


def test_a_step_takes_the_oldest_complete_prompts_after_as_few_turns_as_possible(unchanged):
  """Plays the schedule by hand, from the turns of whole episodes."""
  rollouts, whole = unchanged
  turns = [max(row[2]) for row in whole]
  schedule = partial_schedule(turns, steps=5, count=4, size=16)
  for rollout, (chosen, played) in zip(rollouts, schedule, strict=True):
    assert [e.key for e in rollout.scored.examples] == [whole[number][0] for number in chosen]
    assert rollout.metrics[METRICS[1]] == played
  assert len({played for _, played in schedule}) > 1


def test_each_token_keeps_the_log_prob_of_the_parameters_that_drew_it(options):
  """Recomputes them with the parameters of each step; observations have no age."""
  run = build(load(TINY, options()))
  states = [run.initial_state()]
  for number in range(1, 5):
    params = jax.tree.map(lambda a: a * (1 + 0.05 * number), states[0].params)  # noqa: B023
    states.append(dataclasses.replace(states[0], params=params))
  score, carried = jax.jit(partial(score_batch, run.model)), 0
  for step, rollout in enumerate(take(run, states)):
    batch = rollout.batch
    staleness, mask = np.asarray(batch.staleness), np.asarray(batch.mask)
    assert not staleness[~mask].any()
    for version in range(step + 1):
      here = mask & (step - staleness == version)
      logp = np.asarray(score(states[version].params, batch)[0])
      np.testing.assert_allclose(np.asarray(batch.sampler_logp)[here], logp[here], atol=1e-4)
      if version < step and here.sum() > 10:
        now = np.asarray(score(states[step].params, batch)[0])
        assert np.abs(now - logp)[here].max() > 0.01
        carried += here.sum()
  assert carried > 20


def test_a_restored_pool_plays_the_same_games_in_new_environments(options, unchanged):
  run = build(load(TINY, options()))
  state = run.initial_state()
  with run.scorer() as scorer:
    with ahead.Rollouts(run, scorer) as rollouts:
      rollouts.take(0, state)
      saved = rollouts.saved()
    with ahead.Rollouts(run, scorer) as rollouts:
      rollouts.restore(saved)
      rest = [rollouts.take(step, state) for step in (1, 2)]
  for actual, expected in zip(rest, unchanged[0][1:]):
    assert actual.scored.out.transcripts == expected.scored.out.transcripts
    for name, values in expected.batch.arrays().items():
      np.testing.assert_array_equal(actual.batch.arrays()[name], values, name)


def test_an_environment_that_answers_otherwise_when_it_is_resumed_loses_its_episode(options):
  run = build(load(TINY, options()))
  state, live = run.initial_state(), []
  with run.scorer() as scorer:
    with ahead.Rollouts(run, scorer) as rollouts:
      for step in range(8):
        rollouts.take(step, state)
        groups = json.loads(rollouts.saved()["episodes"].tobytes())
        rows = [row for group in groups.values() for row in group["rows"]]
        if live := [row for row in rows if row["live"] and row["observations"]]:
          break
    live[0]["observations"][0] = "<another>"
    saved = {"episodes": np.frombuffer(json.dumps(groups).encode(), np.uint8)}
    with ahead.Rollouts(run, scorer) as rollouts:
      with pytest.warns(RuntimeWarning, match=r"had answered '<another>', and answers '<\d>' now"):
        rollouts.restore(saved)
      rest = [rollouts.take(step + number, state) for number in (1, 2)]
  assert sum(r.scored.out.failed.sum() for r in rest) == 1


@pytest.mark.slow
def test_a_run_that_is_killed_or_made_longer_is_bit_for_bit_the_whole_one(folder, options):
  whole = train_on(1, folder / "whole", options())
  killed, longer = folder / "killed", folder / "longer"
  shutil.copytree(folder / "whole", killed)
  for steps in (2, 3, 4):
    shutil.rmtree(killed / "checkpoints" / str(steps))
  train_on(1, longer, options("steps=2"))
  for workdir in (killed, longer):
    again = train_on(1, workdir, options())
    np.testing.assert_equal(again[1], whole[1])
    assert (again[0], again[2]) == (whole[0], whole[2])
  rows = [row for row in whole[1] if "loss" in row]
  assert max(row[METRICS[0]] for row in rows) > 0.1
  assert max(row[STALENESS[0]] for row in rows) > 0
  assert all(np.isfinite(row["loss"]) for row in rows)


REFUSED = {
  "rollout.partial_tokens=7": (
    "rollout.partial_tokens is 7, it must be 6 for the episodes of task 'table:rows.jsonl', whose "
    "rounds are turns"
  ),
  "episode.in_step=False": "which episodes are over would depend on how long their environments",
}


@pytest.mark.parametrize("change", REFUSED)
def test_settings_that_do_not_go_together_are_refused_before_anything_compiles(change, options):
  with pytest.raises(ConfigError) as caught:
    build(load(TINY, options("rewards.workers=1", change)))
  assert REFUSED[change] in str(caught.value)
