"""Tests the program of a reward worker: its messages, and that it ends with its parent."""

import json
import os
import pickle
from functools import partial

import numpy as np
import pytest

from grpo_jax.environments import child
from grpo_jax.tasks.rewards.worker_process import score_task
from tests.helpers import guarded_rewards


@pytest.fixture
def worker():
  """Yields (connection, process) of a worker, with the module search path already sent."""
  process, connection = child.start("grpo_jax.tasks.rewards.worker_process", os.environ)
  yield connection, process
  process.kill()
  process.wait()


def messages_until(connection, kind):
  """Returns all messages up to the first of this kind."""
  messages = []
  while not messages or messages[-1][0] != kind:
    assert connection.poll(60), f"no message {kind!r} after {messages}"
    messages.append(tuple(json.loads(connection.recv_bytes())))
  return messages


def build(**settings):
  """Returns a pickled request to build the task, without isolation."""
  return pickle.dumps((partial(guarded_rewards.task, **settings), False))


def batch(*texts):
  """Returns a pickled request to score completions of one prompt, with answer "a"."""
  arguments = (["p"], [list(texts)], {"answer": ["a"]}, [[1] * len(texts)])
  return pickle.dumps((60.0, True, *arguments))


def test_a_worker_announces_each_call_and_returns_the_scores(worker):
  connection, _ = worker
  connection.send_bytes(build())
  weights = {"obey": 1.0, "letters": 10.0, "tokens": 100.0, "together": 0.0, "jax": 0.0}
  assert messages_until(connection, "ready") == [("ready", [weights, []])]
  connection.send_bytes(batch("a", "xyz"))
  *calls, (_, (rewards, accuracy)) = messages_until(connection, "done")
  functions = [f"reward function {name!r}" for name in weights]
  assert calls == [("calling", name) for name in (*functions, "the accuracy")]
  assert rewards["obey"] == accuracy == [[1, 0]]
  assert rewards["letters"] == [[1, 3]]
  assert rewards["jax"] == [[0, 0]]


def test_an_error_is_a_message_and_the_worker_goes_on(worker):
  connection, _ = worker
  connection.send_bytes(build())
  messages_until(connection, "ready")
  connection.send_bytes(batch("raise"))
  assert "raised RuntimeError: as ordered" in messages_until(connection, "raised")[-1][1]
  connection.send_bytes(b"not a pickle")
  assert messages_until(connection, "raised")[-1][1].startswith("UnpicklingError")
  connection.send_bytes(batch("a"))
  assert messages_until(connection, "done")[-1][1][1] == [[1.0]]


def test_a_task_that_cannot_be_built_is_a_message_and_ends_the_worker(worker):
  connection, process = worker
  connection.send_bytes(build(error="no such file"))
  assert messages_until(connection, "raised") == [("raised", "ValueError: no such file")]
  assert process.wait(timeout=60) == 0


def test_a_worker_ends_when_its_parent_is_gone(worker):
  connection, process = worker
  connection.send_bytes(build())
  messages_until(connection, "ready")
  connection.send_bytes(batch("sleep"))
  messages_until(connection, "calling")
  connection.close()
  assert process.wait(timeout=60) == 0


def test_accuracy_alone_calls_no_reward():
  task = guarded_rewards.task()
  texts = [["a", "raise"]]
  rewards, accuracy = score_task(task, False, ["p"], texts, {"answer": ["a"]}, None)
  assert rewards == {}
  np.testing.assert_array_equal(accuracy, [[1, 0]])
