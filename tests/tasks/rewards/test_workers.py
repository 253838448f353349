"""Rewards in processes: the same numbers, and a function that hangs or dies costs one of them."""

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
  with RewardWorkers(partial(guarded_rewards.task), workers=2, timeout=1.0, here=here) as pool:
    yield pool


def test_the_numbers_are_those_of_this_process(pool):
  texts, lengths = [["a", "xyz"], ["", "bb"], ["c", "cc"]], np.arange(6).reshape(3, 2)
  got = pool(PROMPTS, texts, ANSWERS, lengths)
  want = score_in_process(guarded_rewards.task())(PROMPTS, texts, ANSWERS, lengths)
  np.testing.assert_array_equal(want.per_name["obey"], [[1, 0], [0, 1], [1, 0]])
  np.testing.assert_array_equal(want.per_name["letters"], [[1, 3], [NAN, 2], [1, 2]])
  np.testing.assert_array_equal(want.total, [[11, 130], [200, 321], [411, 520]])
  np.testing.assert_array_equal(got.total, want.total + 500)
  np.testing.assert_array_equal(got.accuracy, want.per_name["obey"])
  np.testing.assert_array_equal(want.accuracy, want.per_name["obey"])
  assert got.missing == want.missing == 0
  assert list(got.per_name) == [*want.per_name, "here"]
  for name in set(want.per_name) - {"jax"}:
    np.testing.assert_array_equal(got.per_name[name], want.per_name[name])
  assert (got.per_name["together"] == 6).all()


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


def test_each_order_to_hang_or_die_costs_its_own_completion(pool):
  """Prompt r is never in trouble: it keeps being scored with its whole group."""
  texts = [["a", "sleep", "kill", "loop"], ["exit", "bb", "system exit", "backtrack"], ["c"] * 4]
  with pytest.warns(RuntimeWarning) as caught:
    scores = pool(PROMPTS, texts, ANSWERS, [[0] * 4] * 3)
  lost = np.array([[text not in ("a", "bb", "c") for text in row] for row in texts])
  assert scores.missing == 6
  np.testing.assert_array_equal(np.isnan(scores.total), lost)
  np.testing.assert_array_equal(np.isnan(scores.accuracy), lost)
  np.testing.assert_array_equal(np.isnan(scores.per_name["obey"]), lost)
  assert (scores.per_name["obey"][~lost] == 1).all()
  np.testing.assert_array_equal(scores.total[~lost], [511, 521, 511, 511, 511, 511])
  np.testing.assert_array_equal(scores.per_name["together"][2], [4] * 4)
  assert (scores.per_name["here"] == 0.5).all()
  said = "\n".join(str(warning.message) for warning in caught)
  assert said.count("reward function 'obey'") == len(caught) == 6
  assert said.count("took more than 1 s") == 3
  assert "ended its process (exit code 3)" in said
  assert "ended its process (exit code 4)" in said
  assert "ended its process (signal SIGKILL)" in said
  assert all(f"'{text}'" in said for text in np.array(texts)[lost])


@pytest.mark.parametrize(
  ("text", "says"),
  [("raise", "raised RuntimeError: as told"), ("too few", "returned 1 values for 2 completions")],
)
def test_a_function_that_is_wrong_stops_the_run(pool, text, says):
  with pytest.raises(RewardError, match=says) as caught:
    pool(PROMPTS[:2], [["a"], [text]], {"answer": ["a", "b"]}, [[1], [1]])
  assert "reward function 'obey'" in str(caught.value)
  assert text in str(caught.value)
  assert "guarded_rewards.py" in str(caught.value)
  assert pool(["p"], [["a"]], {"answer": ["a"]}, [[0]]).total == 511


def test_arguments_are_checked_before_they_are_sent(pool):
  with pytest.raises(ValueError, match="2 prompts but 1 lists of completions"):
    pool(["p", "q"], [["a"]], {})
  with pytest.raises(RewardError, match="the columns answer, bad cannot be sent"):
    pool(["p"], [["a"]], {"answer": ["a"], "bad": [lambda: 0]}, [[1]])
  with pytest.raises(RewardError, match="asks for completion_lengths, which is not given"):
    pool(["p"], [["a"]], {"answer": ["a"]})


def test_an_interruption_leaves_no_old_result_behind(pool, monkeypatch):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
      pool(["p"], [["xyz"]], {"answer": ["xyz"]}, [[0]])
  assert pool(["p"], [["a"]], {"answer": ["a"]}, [[0]]).total == 511


def test_functions_that_are_slow_and_do_not_hang_lose_nothing(pool, tmp_path):
  """Four moments of 0.3 s are too long for one call; from then on prompts are scored apart."""
  texts, log = [["take a moment"]] * 4, tmp_path / "calls"
  columns = {"answer": ["a"] * 4, "log": [str(log)] * 4}
  for _ in range(2):
    scores = pool(list("pqrs"), texts, columns, [[0]] * 4)
    assert scores.missing == 0
    assert (scores.per_name["obey"] == 0).all()
  assert log.read_text().split() == ["4", *"1111", *"1111"]


def test_what_cannot_be_built_elsewhere_is_said_at_once():
  with pytest.raises(ValueError, match=r"cannot be built in another process: .*rewards\.workers=0"):
    RewardWorkers(lambda: guarded_rewards.task())
  with pytest.raises(ValueError, match="workers is 0"):
    RewardWorkers(partial(guarded_rewards.task), workers=0)
  says = "could not build the task: ValueError: no such file"
  pool = RewardWorkers(partial(guarded_rewards.task, fails="no such file"))
  with pool, pytest.raises(RewardError, match=says):
    pool(["p"], [["a"]], {"answer": ["a"]})


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  heart = tmp_path / "heart"
  parent = subprocess.Popen(
    [sys.executable, str(Path(guarded_rewards.__file__)), str(heart)],
    env=dict(os.environ, PYTHONPATH=str(Path.cwd())),
  )
  for _ in range(1500):
    if heart.exists() and heart.stat().st_size > 3:
      break
    time.sleep(0.02)
  parent.kill()
  parent.wait()
  time.sleep(0.3)
  beats = heart.stat().st_size
  assert beats > 3
  time.sleep(0.3)
  assert heart.stat().st_size == beats


def test_a_task_without_rewards_is_an_error_here_too():
  task = Task(name="empty", splits={}, rewards={}, accuracy=guarded_rewards.together)
  with pytest.raises(ValueError, match="rewards is empty"):
    score_in_process(task)(["p"], [["a"]], {})
