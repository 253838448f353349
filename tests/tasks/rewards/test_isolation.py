"""Tests that a completion which a reward runs as code does nothing outside its worker."""

import os
import socket
import sys
from functools import partial

import pytest

from grpo_jax.environments import isolation
from grpo_jax.tasks.rewards.scoring import RewardError
from grpo_jax.tasks.rewards.workers import RewardWorkers, WorkerProcess, _message
from tests.helpers import hostile_rewards

linux = pytest.mark.skipif(
  sys.platform != "linux" or not isolation.landlock_version(), reason="needs Linux with Landlock"
)


@pytest.fixture(scope="module")
def workers():
  os.environ["SECRET_KEY_OF_TEST"] = "secret"
  with RewardWorkers(partial(hostile_rewards.task), timeout=20.0) as pool:
    yield pool
  del os.environ["SECRET_KEY_OF_TEST"]


def score(workers, text):
  return float(workers(["p"], [[text]], {}).total[0, 0])


@linux
def test_a_harmless_completion_is_scored(workers):
  assert score(workers, "1 + 1") == 2.0


@linux
@pytest.mark.parametrize(
  "call",
  [
    "open('{file}', 'w')", "__import__('os').mkdir('{file}')", "__import__('os').remove('{there}')",
    "__import__('os').system('touch {file}') and 1 / 0",
    "__import__('os').fork() and open('{file}', 'w')",
    "__import__('subprocess').run(['touch', '{file}'])", "__import__('socket').socket()",
    "__import__('socket').create_connection(('127.0.0.1', {port}))",
    "__import__('os').kill({parent}, 0)", "__import__('os').chmod('{there}', 0)",
    "__import__('os').rename('{there}', '{file}')", "__import__('os').symlink('/', '{file}')",
  ],
)  # fmt: skip
def test_nothing_outside_the_worker_can_be_changed(workers, tmp_path, call):
  there = tmp_path / "there"
  there.write_text("x")
  with socket.create_server(("127.0.0.1", 0)) as listener:
    listener.settimeout(0.2)
    names = {
      "file": tmp_path / "new", "there": there, "parent": os.getpid(),
      "port": listener.getsockname()[1],
    }  # fmt: skip
    with pytest.raises(RewardError, match=r"PermissionError|ZeroDivisionError"):
      score(workers, call.format(**names))
    with pytest.raises(TimeoutError):
      listener.accept()
  assert os.listdir(tmp_path) == ["there"]
  assert there.read_text() == "x"
  assert os.access(there, os.R_OK)


@linux
def test_every_thread_is_confined(workers):
  """Finds none whose functions, such as `Connection.recv_bytes`, a completion could replace."""
  threads = "__import__('threading').enumerate()"
  status = "open(f'/proc/self/task/{t.native_id}/status').read()"
  assert score(workers, f"len({threads})") == 2.0
  assert score(workers, f"min('Seccomp:\\t2' in {status} for t in {threads})") == 1.0


@linux
def test_the_environment_holds_no_secrets(workers):
  assert score(workers, "'SECRET_KEY_OF_TEST' in __import__('os').environ") == 0.0
  assert score(workers, "b'SECRET' in open('/proc/self/environ', 'rb').read()") == 0.0


@linux
def test_an_error_of_isolation_says_how_to_lift_it(workers):
  with pytest.raises(RewardError, match=r"rewards\.isolate=false"):
    score(workers, "__import__('socket').socket()")


def test_isolation_can_be_lifted_by_name(tmp_path):
  with RewardWorkers(partial(hostile_rewards.task), timeout=20.0, isolate=False) as pool:
    assert score(pool, f"open('{tmp_path / 'new'}', 'w').write('x')") == 1.0
  assert (tmp_path / "new").is_file()


@pytest.mark.parametrize(
  "payload",
  [
    b"", b"[", b"[]", b'["done", [{"a": [[1.0, 2.0]]}, [[0.0]]]]', b'["done", [{}, "x"]]',
    b'["ready", 3]', b'["other", "x"]', b'["raised", 3]', b"cos\nsystem\n(S\'true\'\ntR.",
  ],
)  # fmt: skip
def test_what_a_worker_sends_is_data_and_checked(payload):
  with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
    _message(payload, (slice(0, 1), slice(0, 1)))


@pytest.mark.parametrize("rewards", ['{"b": [[1.0]]}', '{"a": [[1.0]], "b": [[1.0]]}',
                                     f'{{"a": [[1{"0" * 400}]]}}'])  # fmt: skip
def test_a_worker_that_sends_other_rewards_ends_the_run(rewards, monkeypatch):
  class Sends:
    def recv_bytes(self, limit):
      return f'["done", [{rewards}, [[0.0]]]]'.encode()

  worker = WorkerProcess(b"", True)
  worker.connection, worker.unit = Sends(), (slice(0, 1), slice(0, 1))
  worker.weights, worker._ready = {"a": 1.0}, True
  monkeypatch.setattr(worker, "kill", lambda: None)
  with pytest.raises(RewardError, match="sent something else than rewards"):
    worker.receive()


def test_a_scorer_that_a_completion_changed_ends_the_run():
  """Needs more than isolation: the completion changes the process that evaluates it."""
  with RewardWorkers(partial(hostile_rewards.task_with_canary), timeout=20.0) as pool:
    assert (score(pool, "right"), score(pool, "banana")) == (1.0, 0.0)
    with pytest.raises(RewardError, match=r"scorer 'right' of task 'hostile' was changed .* 1 and"):
      score(pool, "rights.append('banana')")
