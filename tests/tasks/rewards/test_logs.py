"""Tests what reward functions get beside text and columns, what they log, and errors that cost."""

import datetime
import json
import math
from functools import partial

import numpy as np
import pytest

from grpo_jax.tasks import make_task
from grpo_jax.tasks.base import Task
from grpo_jax.tasks.rewards.logs import Logs, TrainerState, as_json, mean_metrics
from grpo_jax.tasks.rewards.scorer import MOST_IN_A_ROW
from grpo_jax.tasks.rewards.scoring import RewardError
from grpo_jax.tasks.rewards.workers import RewardWorkers, score_in_process, score_with

# Two reward functions as they are written for TRL, with chat data.
TRL = """
import asyncio

def brief(prompts, completions, completion_ids, level, trainer_state, log_extra, log_metric, **_):
  assert prompts[0][-1]["role"] == "user"
  texts = [completion[0]["content"] for completion in completions]
  assert completions[0] == [{"role": "assistant", "content": texts[0]}]
  log_extra("ids", completion_ids)
  log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
  return [float(len(text)) if n else None for text, n in zip(texts, level)]

async def judge(completions, **kwargs):
  await asyncio.sleep(0)
  kwargs["log_extra"]("verdict", [kwargs["trainer_state"].global_step] * len(completions))
  kwargs["log_metric"]("judge/ids", len(kwargs["completion_ids"]))
  return [float(completion[0]["content"] == "a") for completion in completions]
"""
PROMPTS = [[{"role": "user", "content": name}] for name in "pq"]
TEXTS, COLUMNS = [["a", "bb"], ["ccc", ""]], {"level": [1, 0], "answer": [None, None]}
IDS = [[[1], [2, 3]], [[4, 5, 6], []]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("trl")
  (folder / "rewards.py").write_text(TRL)
  rows = [{"prompt": prompt, "level": 1, "answer": 1} for prompt in PROMPTS]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  names = [f"{folder}/rewards.py:{name}" for name in ("brief", "judge")]
  return {
    "path": f"{folder}/rows.jsonl", "reward": [*names, "numeric"], "completions": "messages",
    "accuracy": names[1], "eval_fraction": 0.0,
  }  # fmt: skip


def check_scores(scores):
  nan = math.nan
  np.testing.assert_array_equal(scores.per_name["brief"], [[1, 2], [nan, nan]])
  np.testing.assert_array_equal(scores.per_name["judge"], [[1, 0], [0, 0]])
  assert np.isnan(scores.per_name["numeric"]).all()  # gets text, and has no answer to compare with
  np.testing.assert_array_equal(scores.accuracy, [[1, 0], [0, 0]])
  assert scores.extras == [
    [{"ids": [1], "verdict": 3}, {"ids": [2, 3], "verdict": 3}],
    [{"ids": [4, 5, 6], "verdict": 3}, {"ids": [], "verdict": 3}],
  ]
  assert mean_metrics(scores.logged) == {"progress": 0.25, "judge/ids": 4.0}


def test_rewards_of_trl_run_unchanged_in_this_process_and_in_workers(settings):
  state = TrainerState(global_step=3, max_steps=12)
  task = make_task("jsonl", **settings)
  check_scores(score_in_process(task)(PROMPTS, TEXTS, COLUMNS, None, ids=IDS, state=state))
  with RewardWorkers(partial(make_task, "jsonl", **settings), timeout=60.0) as pool:
    check_scores(pool(PROMPTS, TEXTS, COLUMNS, None, ids=IDS, state=state))
    alone = pool(PROMPTS, TEXTS, COLUMNS, None, ids=IDS, rewards=False)
  np.testing.assert_array_equal(alone.accuracy, [[1, 0], [0, 0]])


def test_completions_are_text_by_default_and_another_form_is_an_error(settings):
  text = {**settings, "completions": "text"}
  with pytest.raises(RewardError, match="string indices must be integers"):
    score_in_process(make_task("jsonl", **text))(PROMPTS, TEXTS, COLUMNS, None, ids=IDS)
  with pytest.raises(ValueError, match="completions is 'chat': it must be 'text' or 'messages'"):
    make_task("jsonl", **{**settings, "completions": "chat"})


def test_a_function_that_asks_for_the_step_gets_it_unless_a_column_has_that_name():
  def curriculum(completions, step, **columns):
    steps = [step] * len(completions) if isinstance(step, int) else step
    return [0.5 * n for n in steps]

  state = TrainerState(global_step=3, max_steps=9)
  scorer = score_with(curriculum)
  assert scorer(["p"], [["a", "b"]], {}, state=state).total.tolist() == [[1.5, 1.5]]
  assert scorer(["p"], [["a", "b"]], {}).total.tolist() == [[0.0, 0.0]]
  column = scorer(["p"], [["a", "b"]], {"step": [8]}, state=state)
  assert column.total.tolist() == [[4.0, 4.0]]


def test_an_argument_that_is_not_named_is_named_by_the_error():
  def curriculum(completions, **columns):
    return [columns["trainer_state"].global_step] * len(completions)

  with pytest.raises(RewardError, match=r"def f\(completions, trainer_state, \*\*_\)"):
    score_with(curriculum)(["p"], [["a"]], {})


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda logs: logs.log_extra("a", [1]), "'a'.* got 1 values for 2 completions"),
    (lambda logs: logs.log_extra("a", "xy"), "got a str: it needs a list"),
    (lambda logs: logs.log_extra("a", (x for x in (1, 2))), "got a generator"),
    (lambda logs: logs.log_extra("reward", [1, 2]), "not one that each row"),
    (lambda logs: logs.log_extra(3, [1, 2]), "must be text"),
    (lambda logs: logs.log_metric("m", "x"), "'m', 'x'.* finite number"),
    (lambda logs: logs.log_metric("m", math.inf), "finite number"),
    (lambda logs: logs.log_metric("m", [1.0]), "finite number"),
    (lambda logs: logs.log_metric("step", 1.0), "not 'step'"),
    (lambda logs: logs.log_metric("eval/n", 1.0), "not begin with 'eval/'"),
  ],
)
def test_what_cannot_be_logged_is_an_error_that_names_it(call, words):
  with pytest.raises(ValueError, match=words):
    call(Logs(2))


def test_a_metric_is_the_mean_over_completions_without_nan():
  logs = Logs(3)
  for value in (1.0, math.nan, np.float32(2.0), np.array(3)):
    logs.log_metric("m", value)
  assert mean_metrics([*logs.metrics, ("m", 6.0, 9)]) == {"m": (3 * 6 + 9 * 6) / 18}


def test_anything_becomes_json():
  class Odd:
    def __str__(self):
      raise RuntimeError

  nested = []
  for _ in range(2000):
    nested = [nested]
  value = {
    1: np.array([1.5, math.nan]), "day": datetime.date(2026, 1, 2), "odd": Odd(), "big": 10**9000,
    "half": "\ud800", "set": {1}, "nested": nested, "yes": np.bool_(True),
  }  # fmt: skip
  plain = json.loads(json.dumps(as_json(value)))
  assert (plain["1"], plain["day"], plain["odd"]) == ([1.5, None], "2026-01-02", "a Odd")
  assert (plain["half"], plain["set"], plain["yes"]) == ("\ud800", [1], True)
  assert int(plain["big"], 16) == 10**9000


# --- errors that cost rewards ---------------------------------------------------------------------


def refuses(prompts, completions, **columns):
  """Raises for "bad", and ends the process for "exit"."""
  import os

  if "exit" in completions:
    os._exit(3)
  if "bad" in completions:
    raise TimeoutError("the judge did not answer")
  return [float(len(text)) for text in completions]


def task_of_refuses():
  return Task("refuses", {}, {"refuses": (refuses, 1.0)}, refuses)


def test_with_skip_an_error_costs_the_completions_that_raise():
  texts = [["a", "bad"], ["bbb", "cc"], ["bad", "bad"]]
  expected = [[1, math.nan], [3, 2], [math.nan, math.nan]]
  skipping = score_in_process(task_of_refuses(), "skip")
  with RewardWorkers(task_of_refuses, timeout=60.0, on_error="skip") as pool:
    for scorer in (skipping, pool):
      with pytest.warns(RuntimeWarning, match="no reward for 3 completions.*did not answer"):
        scores = scorer(list("pqr"), texts, {})
      np.testing.assert_array_equal(scores.total, expected)
      np.testing.assert_array_equal(scores.accuracy, expected)
      assert (scores.raised, scores.missing) == (3, 0)
    with pytest.warns(RuntimeWarning):
      scores = pool(["p"], [["a", "bad", "exit"]], {})
    assert (scores.raised, scores.missing) == (1, 1)
    np.testing.assert_array_equal(scores.total, [[1, math.nan, math.nan]])


def test_with_skip_a_reward_that_always_raises_is_not_called_forever():
  calls = []

  def down(completions, **columns):
    calls.append(len(completions))
    raise ConnectionError("down")

  scorer = score_in_process(Task("down", {}, {"down": (down, 1.0)}, down), "skip")
  with pytest.warns(RuntimeWarning, match="no reward for 4096 completions"):
    scores = scorer(["p"] * 64, [["x"] * 64] * 64, {})
  assert np.isnan(scores.total).all()
  # Each call that raises is made again on parts, to find the completion that makes it raise.
  assert len(calls) < MOST_IN_A_ROW * 16


def test_a_function_that_exits_in_this_process_is_an_error():
  def leaves(completions, **columns):
    raise SystemExit(3)

  with pytest.raises(RewardError, match=r"SystemExit: 3\n.*test_logs\.py.*, in leaves"):
    score_with(leaves)(["p"], [["a"]], {})


@pytest.mark.parametrize("value", ["skipp", None, True])
def test_another_way_to_treat_errors_is_refused(value):
  with pytest.raises(ValueError, match="must be one of raise, skip"):
    score_in_process(task_of_refuses(), value)
