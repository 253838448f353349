"""Tests rewards in worker processes: the same values, and a hang or crash costs a single one."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.tasks import RewardError
from grpo_jax.tasks.base import Task
from grpo_jax.tasks.rewards import workers
from grpo_jax.tasks.rewards.workers import RewardWorkers, score_in_process
from tests.helpers import guarded_rewards

NAN = np.nan
PROMPTS = ["p", "q", "r"]
ANSWERS = {"answer": ["a", "bb", "c"]}


@pytest.fixture(scope="module")
def pool():
  here = {"here": (lambda completions, **columns: [0.5] * len(completions), 1000.0)}
  # These functions write a log and kill themselves, which isolated ones cannot.
  make = partial(guarded_rewards.task)
  with RewardWorkers(make, workers=2, timeout=1.0, here=here, isolate=False) as pool:
    yield pool


def test_scores_equal_those_of_this_process(pool):
  texts, lengths = [["a", "xyz"], ["", "bb"], ["c", "cc"]], np.arange(6).reshape(3, 2)
  scores = pool(PROMPTS, texts, ANSWERS, lengths)
  expected = score_in_process(guarded_rewards.task())(PROMPTS, texts, ANSWERS, lengths)
  np.testing.assert_array_equal(expected.per_name["obey"], [[1, 0], [0, 1], [1, 0]])
  np.testing.assert_array_equal(expected.per_name["letters"], [[1, 3], [NAN, 2], [1, 2]])
  np.testing.assert_array_equal(expected.total, [[11, 130], [200, 321], [411, 520]])
  np.testing.assert_array_equal(scores.total, expected.total + 500)
  np.testing.assert_array_equal(scores.accuracy, expected.per_name["obey"])
  np.testing.assert_array_equal(expected.accuracy, expected.per_name["obey"])
  assert scores.missing == expected.missing == 0
  assert list(scores.per_name) == [*expected.per_name, "here"]
  for name in set(expected.per_name) - {"jax"}:
    np.testing.assert_array_equal(scores.per_name[name], expected.per_name[name])
  assert (scores.per_name["together"] == 6).all()


def test_workers_do_without_jax(pool):
  assert "jax" in sys.modules
  scores = pool(PROMPTS, [["a"]] * 3, ANSWERS, [[1]] * 3)
  assert (scores.per_name["jax"] == 0).all()


def test_accuracy_alone(pool):
  for scorer in (pool, score_in_process(guarded_rewards.task())):
    scores = scorer(PROMPTS, [["a", "sleep"]] * 3, ANSWERS, rewards=False)
    np.testing.assert_array_equal(scores.accuracy, [[1, 0], [0, 0], [0, 0]])
    assert np.isnan(scores.total).all()
    assert scores.total.shape == (3, 2)
    assert scores.per_name == {}


def test_no_completions(pool):
  for scorer in (pool, score_in_process(guarded_rewards.task())):
    assert scorer([], [], {"answer": []}).total.shape == (0, 0)
    assert scorer(PROMPTS, [[]] * 3, ANSWERS, [[]] * 3).accuracy.shape == (3, 0)


def test_each_completion_that_hangs_or_crashes_costs_itself_only(pool):
  """Scores the group of prompt r, which has none, still in one call."""
  texts = [["a", "sleep", "kill", "loop"], ["exit", "bb", "system exit", "backtrack"], ["c"] * 4]
  with pytest.warns(RuntimeWarning) as caught:
    scores = pool(PROMPTS, texts, ANSWERS, [[0] * 4] * 3)
  missing = np.array([[text not in ("a", "bb", "c") for text in row] for row in texts])
  assert scores.missing == 6
  np.testing.assert_array_equal(np.isnan(scores.total), missing)
  np.testing.assert_array_equal(np.isnan(scores.accuracy), missing)
  np.testing.assert_array_equal(np.isnan(scores.per_name["obey"]), missing)
  assert (scores.per_name["obey"][~missing] == 1).all()
  np.testing.assert_array_equal(scores.total[~missing], [511, 521, 511, 511, 511, 511])
  np.testing.assert_array_equal(scores.per_name["together"][2], [4] * 4)
  assert (scores.per_name["here"] == 0.5).all()
  messages = "\n".join(str(warning.message) for warning in caught)
  assert messages.count("reward function 'obey'") == len(caught) == 6
  assert messages.count("took more than 1 s") == 3
  assert "ended its process (exit code 3)" in messages
  assert "ended its process (exit code 4)" in messages
  assert "ended its process (signal SIGKILL)" in messages
  assert all(f"'{text}'" in messages for text in np.array(texts)[missing])


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("raise", "raised RuntimeError: as ordered"),
    ("too few", "returned 1 values for 2 completions"),
  ],
)
def test_a_failing_function_stops_the_run(pool, text, message):
  with pytest.raises(RewardError, match=message) as caught:
    pool(PROMPTS[:2], [["a"], [text]], {"answer": ["a", "b"]}, [[1], [1]])
  assert "reward function 'obey'" in str(caught.value)
  assert text in str(caught.value)
  assert "guarded_rewards.py" in str(caught.value)
  assert pool(["p"], [["a"]], {"answer": ["a"]}, [[0]]).total == 511


def test_arguments_are_checked(pool):
  with pytest.raises(ValueError, match="2 prompts but 1 lists of completions"):
    pool(["p", "q"], [["a"]], {})
  with pytest.raises(RewardError, match="the columns answer, bad cannot be sent"):
    pool(["p"], [["a"]], {"answer": ["a"], "bad": [lambda: 0]}, [[1]])
  with pytest.raises(RewardError, match="requires completion_lengths, which is not available"):
    pool(["p"], [["a"]], {"answer": ["a"]})


def test_an_interrupted_call_leaves_no_result_for_the_next_one(pool, monkeypatch):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
      pool(["p"], [["xyz"]], {"answer": ["xyz"]}, [[0]])
  assert pool(["p"], [["a"]], {"answer": ["a"]}, [[0]]).total == 511


def test_a_batch_that_is_too_slow_for_one_call_is_scored_by_prompt(pool, tmp_path):
  """Exceeds the time limit by four pauses of 0.3 s, so that later calls are made per prompt."""
  texts, log = [["pause"]] * 4, tmp_path / "calls"
  columns = {"answer": ["a"] * 4, "log": [str(log)] * 4}
  for _ in range(2):
    scores = pool(list("pqrs"), texts, columns, [[0]] * 4)
    assert scores.missing == 0
    assert (scores.per_name["obey"] == 0).all()
  assert log.read_text().split() == ["4", *"1111", *"1111"]


def test_a_task_that_a_worker_cannot_build_is_an_error():
  with pytest.raises(ValueError, match=r"cannot be built in another process: .*rewards\.workers=0"):
    RewardWorkers(lambda: guarded_rewards.task())
  with pytest.raises(ValueError, match="workers is 0"):
    RewardWorkers(partial(guarded_rewards.task), workers=0)
  message = "could not build the task: ValueError: no such file"
  pool = RewardWorkers(partial(guarded_rewards.task, error="no such file"))
  with pool, pytest.raises(RewardError, match=message):
    pool(["p"], [["a"]], {"answer": ["a"]})


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  log = tmp_path / "heartbeats"
  parent = subprocess.Popen(
    [sys.executable, str(Path(guarded_rewards.__file__)), str(log)],
    env=dict(os.environ, PYTHONPATH=str(Path.cwd())),
  )
  for _ in range(1500):
    if log.exists() and log.stat().st_size > 3:
      break
    time.sleep(0.02)
  parent.kill()
  parent.wait()
  time.sleep(0.3)
  beats = log.stat().st_size
  assert beats > 3
  time.sleep(0.3)
  assert log.stat().st_size == beats


def test_a_task_without_rewards_is_an_error():
  task = Task(name="empty", splits={}, rewards={}, accuracy=guarded_rewards.together)
  with pytest.raises(ValueError, match="rewards is empty"):
    score_in_process(task)(["p"], [["a"]], {})
