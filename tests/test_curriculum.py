"""Tests draws by pass rate: weights and counts by hand, chances by enumeration, whole runs."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from grpo_jax import data, train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.curriculum import (
  CURRICULA,
  add,
  lookup_curriculum,
  metrics,
  new_counts,
  weigh,
  weighted_order,
)
from grpo_jax.distributed import hosts
from grpo_jax.run.checkpoint import Checkpoints
from grpo_jax.run.metrics import read_metrics

# (completions, right ones): untried, failed, half, solved.
COUNTS = np.array([[0, 0], [8, 0], [6, 3], [8, 8]], np.float32)


@pytest.mark.parametrize(
  ("name", "expected"),
  [  # p is 1/2, 1/10, 1/2, 9/10
    ("learnability", [0.25, 0.09, 0.25, 0.09]),
    ("failure", [0.5, 0.9, 0.5, 0.1]),
  ],
)
def test_weights_by_hand(name, expected):
  np.testing.assert_allclose(weigh(CURRICULA[name], COUNTS), expected, rtol=1e-12)


def test_the_chance_of_each_order_is_that_of_draws_one_after_another():
  weights, draws = np.array([3.0, 2.0, 1.0]), 20_000
  seen = Counter(tuple(weighted_order(weights, step)(3, 7, 0, 0)) for step in range(draws))
  for order in itertools.permutations(range(3)):
    left, chance = 6.0, 1.0
    for i in order:
      chance *= weights[i] / left
      left -= weights[i]
    error = np.sqrt(chance * (1 - chance) / draws)
    assert abs(seen[order] / draws - chance) < 4 * error, order


def test_orders_depend_on_seed_step_and_pass():
  order = {
    (seed, step, epoch): tuple(weighted_order(np.ones(50), step)(50, seed, 0, epoch))
    for seed, step, epoch in itertools.product(range(4), repeat=3)
  }
  assert len(set(order.values())) == 64
  assert order[1, 2, 3] == tuple(weighted_order(np.ones(50), 2)(50, 1, 0, 3))
  assert sorted(order[0, 0, 0]) == list(range(50))


def test_counts_by_hand():
  """Problem 2 is tried twice, problem 0 is not judged, problem 3 is not tried."""
  accuracy = np.array([[1, 0], [np.nan, np.nan], [1, 1], [0, np.nan]])
  before = COUNTS.copy()
  after = add(before, [2, 0, 1, 2], accuracy, memory=0.25)
  assert after.tolist() == [[0, 0], [4, 2], [4.5, 1.75], [8, 8]]
  assert after.dtype == np.float32
  assert (before == COUNTS).all()
  assert add(before, [1], np.array([[1.0]]), memory=0.0).tolist()[1] == [1, 1]
  assert add(before, [1], np.array([[1.0]]), memory=1.0).tolist()[1] == [9, 1]


def test_metrics_by_hand():
  assert metrics(COUNTS, np.array([1.0, 1, 1, 1])) == {
    "curriculum/tried": 0.75, "curriculum/spread": 1.0,
  }  # fmt: skip
  assert metrics(new_counts(2), np.array([1e-9, 1.0]))["curriculum/spread"] == pytest.approx(0.5)


@pytest.mark.parametrize(
  ("choice", "message"),
  [
    ("learnable", "unknown data.curriculum 'learnable': did you mean 'learnability'"),
    (3, "data.curriculum is 3: it must be learnability, failure, off, 'file.py:function'"),
    (lambda tries, right: right, r"<lambda> gave the weight 0 to a problem with 0 completions, 0"),
    (lambda tries, right: tries - right + np.nan, "the weight nan to a problem with 0"),
    (lambda tries, right: [1.0], r"shape \(1,\) for 3 problems: it must return one weight per"),
  ],
)
def test_wrong_curricula_are_refused_before_a_run(choice, message):
  with pytest.raises(ValueError, match=message):
    lookup_curriculum(choice)


# --- runs -----------------------------------------------------------------------------------------

TASK = """
def right(prompts, completions, answer, **columns):
  return [float(a and sum(map(ord, text)) % 2) for text, a in zip(completions, answer)]

def untried_first(tries, right):
  return 1e-12 ** (tries > 0)
"""
SMALL = (
  "task.settings.eval_fraction=0.0", "rollout.prompts_per_step=8", "rollout.group_size=2",
  "rollout.completion_length=2", "checkpoint.every=50", "rewards.workers=0", "log.samples_every=0",
)  # fmt: skip


def config(folder, *changes, problems=24):
  """A task in which every third problem cannot be solved, and the others by chance."""
  (folder / "task.py").write_text(TASK)
  rows = [json.dumps({"prompt": f"{n:02}", "answer": n % 3 > 0}) for n in range(problems)]
  (folder / "rows.jsonl").write_text("\n".join(rows))
  own = (
    "task.name=table", f"task.settings.path={folder}/rows.jsonl",
    f"task.settings.reward={folder}/task.py:right",
  )  # fmt: skip
  changes = (*own, *SMALL, *changes)
  return load("experiments/tiny.py", [f"--config.{change}" for change in changes])


def samples(workdir, step):
  text = (workdir / "samples" / f"step_{step:06d}.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def saved_counts(workdir, step, c):
  with Checkpoints(workdir, 9, read_only=True) as checkpoints:
    return checkpoints.restore(step, build(c).initial_state()).counts


@pytest.mark.slow
def test_a_resumed_run_draws_and_counts_as_the_uninterrupted_one(tmp_path):
  settings = ("data.curriculum=learnability", "data.memory=0.75", "rollout.max_resamples=1")
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  c = config(tmp_path, "steps=5", *settings)
  train.run(c, whole)
  train.run(config(tmp_path, "steps=2", *settings), parts)
  train.run(c, parts)
  counts = saved_counts(whole, 5, c)
  assert np.array_equal(counts, saved_counts(parts, 5, c))
  expected = {f"{n:02}": [0.0, 0.0] for n in range(24)}
  for step in range(5):
    rows = samples(whole, step)
    assert rows == samples(parts, step)
    drawn = [row["prompt"] for row in rows[::2]]
    assert len(set(drawn)) == len(drawn)  # those of a resample are others
    for prompt, pair in zip(drawn, zip(rows[::2], rows[1::2])):
      old = expected[prompt]
      expected[prompt] = [
        0.75 * old[0] + 2, 0.75 * old[1] + sum(row["accuracy"] == 1 for row in pair)
      ]  # fmt: skip
  np.testing.assert_allclose(counts, list(expected.values()), rtol=1e-6)
  assert 0 < counts[:, 1].sum() < counts[:, 0].sum()
  tried = [row["curriculum/tried"] for row in read_metrics(whole) if "curriculum/tried" in row]
  assert tried == sorted(tried)
  assert tried[-1] == (counts[:, 0] > 0).mean()


def test_the_counts_decide_what_is_drawn(tmp_path):
  """A curriculum that hardly ever draws a problem twice covers all 24 in three steps."""
  c = config(tmp_path, "steps=4", f"data.curriculum={tmp_path}/task.py:untried_first")
  train.run(c, tmp_path / "run")
  drawn = [row["prompt"] for step in range(3) for row in samples(tmp_path / "run", step)[::2]]
  assert sorted(drawn) == [f"{n:02}" for n in range(24)]
  assert {row["prompt"] for row in samples(tmp_path / "run", 3)} <= set(drawn)


def test_hosts_draw_the_blocks_of_what_one_host_draws(tmp_path, monkeypatch):
  run = build(config(tmp_path, "data.curriculum=failure"))
  counts = new_counts(24)
  counts[::2] = 4, 1
  whole = [run.examples(3, counts)(draw) for draw in range(4)]
  blocks = []
  for host in range(4):
    monkeypatch.setattr(hosts, "own_shard", lambda host=host: (host, 4))
    blocks.append([run.examples(3, counts)(draw) for draw in range(4)])
  for draw in range(4):
    assert [e for block in blocks for e in block[draw]] == whole[draw]
  first_pass = [example.key for draw in whole[:3] for example in draw]
  assert len(set(first_pass)) == 24
  assert len({example.key for example in whole[3]}) == 8  # the beginning of another pass


def test_more_problems_than_there_are(tmp_path):
  run = build(config(tmp_path, "data.curriculum=failure", problems=5))
  drawn = [example.key for example in run.examples(0, new_counts(5))(0)]
  assert len(set(drawn[:5])) == 5
  assert len(set(drawn[5:])) == 3
  order = weighted_order(weigh(CURRICULA["failure"], new_counts(5)), 0)
  assert data.examples(range(5), 0, 8, 0, order=order) == [int(key) for key in drawn]


@pytest.mark.slow
def test_a_checkpoint_without_counts_or_with_others_starts_them_again(tmp_path):
  plain = config(tmp_path, "steps=1")
  train.run(plain, tmp_path / "run")
  c = config(tmp_path, "steps=1", "data.curriculum=learnability")
  assert (saved_counts(tmp_path / "run", 1, c) == new_counts(24)).all()
  assert saved_counts(tmp_path / "run", 1, plain) is None
  with pytest.raises(ConfigError, match=r"--accept data\.curriculum"):
    train.run(c, tmp_path / "run")
  train.run(
    config(tmp_path, "steps=2", "data.curriculum=learnability"), tmp_path / "run",
    accept=["data.curriculum"],
  )  # fmt: skip
  assert (saved_counts(tmp_path / "run", 2, c) > 0).any()
  assert saved_counts(tmp_path / "run", 2, plain) is None
  fewer = config(tmp_path, "data.curriculum=learnability", problems=20)
  assert (saved_counts(tmp_path / "run", 2, fewer) == new_counts(20)).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (("epochs=2",), r"epochs is 2.0, but data.curriculum is 'failure'.*set epochs to 0, and steps"),
    (("data.shuffle=false",), "data.shuffle is False.*set data.shuffle to true"),
    (("data.memory=1.5",), "data.memory is 1.5, it must be between 0 and 1"),
    (("data.curriculum=none",), "data.curriculum is None: it must be learnability"),
    (("data.curriculum=missing.py:weights",), "missing.py"),
  ],
)
def test_settings_that_do_not_go_together(tmp_path, changes, message):
  with pytest.raises(ConfigError, match=message):
    build(config(tmp_path, "data.curriculum=failure", *changes))
