"""Tests the adapter of OpenEnv against a small server of the wire, and against the real package."""

import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time
import venv
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("websockets", reason="needs the extra: pip install 'grpo_jax[openenv]'")

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from grpo_jax.environments.openenv import openenv_environment
from grpo_jax.environments.workers import EnvironmentWorkers, run_in_process
from grpo_jax.tasks.base import Example, Task

SERVER = Path(__file__).parents[1] / "helpers/openenv_server.py"
CAPACITY = 4


def to_action(text):
  try:
    return {"number": int(text)}
  except ValueError:
    return {"number": text}


def to_text(data):
  return data["text"]


def to_prompt(example, data):
  return example.prompt + data["text"]


def episodes_at(url, **settings):
  defaults = {"prompt": to_prompt, "timeout": 1.0, "wait": 0.5}
  return openenv_environment(url, action=to_action, observation=to_text, **(defaults | settings))


def task_at(url, **settings):
  return Task("openenv", {}, {}, len, environment=episodes_at(url, **settings))


# --- a server of the wire -------------------------------------------------------------------------


class Wire:
  """Speaks what a server of OpenEnv speaks, for the game of `openenv_server.py`."""

  def __init__(self):
    self.sessions, self.lock = 0, threading.Lock()

  def __call__(self, connection):
    with self.lock:
      full = self.sessions >= CAPACITY
      self.sessions += not full
    try:
      for message in connection:
        if full:
          error = {"message": "no capacity", "code": "CAPACITY_REACHED"}
          connection.send(json.dumps({"type": "error", "data": error}))
          return
        request = json.loads(message)
        if request["type"] == "close":
          return
        with contextlib.suppress(ConnectionClosed):
          connection.send(self.answer(connection, request["type"], request["data"]))
    finally:
      with self.lock:
        self.sessions -= not full

  def answer(self, connection, kind, data):
    def observation(text, done=False, reward=None):
      data = {"observation": {"text": text}, "done": done, "reward": reward}
      return json.dumps({"type": "observation", "data": data})

    def error(code, message, **more):
      return json.dumps({"type": "error", "data": {"message": message, "code": code, **more}})

    if kind == "reset":
      connection.secret = random.Random(data["seed"]).randint(1, data.get("high", 9))
      return observation(f"I think of a number from 1 to {data.get('high', 9)}.")
    number = data["number"]
    if not isinstance(number, int):
      errors = [{"msg": "Input should be a valid integer"}]
      return error("VALIDATION_ERROR", "Invalid message", errors=errors)
    if number == -1:
      return error("EXECUTION_ERROR", "as ordered")
    if number == -2:
      time.sleep(1.5)
    if number == -4:
      return "not JSON"
    if number == -5:
      return json.dumps({"type": "state", "data": {}})
    if number == connection.secret:
      return observation("Correct", True, 1.0)
    return observation("Higher" if number < connection.secret else "Lower", False, 0.0)


@pytest.fixture
def url():
  with serve(Wire(), "127.0.0.1", 0) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws"
    server.shutdown()


EXAMPLES = [Example("Guess. ", {}, "a"), Example("Guess. ", {}, "b")]


def check_a_game(runner):
  """Plays two groups of two by bisection."""
  prompts = runner.reset(EXAMPLES, group=2, seeds=[1, 2])
  assert prompts == ["Guess. I think of a number from 1 to 9."] * 2
  bounds, numbers = {(p, g): (1, 9) for p in range(2) for g in range(2)}, {}
  while bounds:
    guesses = {key: sum(bound) // 2 for key, bound in bounds.items()}
    outcomes = runner.step({key: str(guess) for key, guess in guesses.items()})
    for key, outcome in outcomes.items():
      assert outcome.failure is None
      if outcome.done:
        assert (outcome.observation, outcome.reward) == ("Correct", 1.0)
        numbers[key] = guesses[key]
        del bounds[key]
      else:
        assert outcome.reward == 0.0
        low, high = bounds[key]
        higher = outcome.observation == "Higher"
        bounds[key] = (guesses[key] + 1, high) if higher else (low, guesses[key] - 1)
  seeded = [random.Random(seed).randint(1, 9) for seed in (1, 2)]
  assert numbers == {(p, g): seeded[p] for p in range(2) for g in range(2)}


def check_faults(runner):
  """Tells of a bad action; loses the one episode whose server raises or sleeps."""
  runner.reset(EXAMPLES, group=2, seeds=[1, 2])
  with pytest.warns(RuntimeWarning):
    outcomes = runner.step({(0, 0): "what?", (0, 1): "-1", (1, 0): "-2", (1, 1): "0"})
  assert outcomes[0, 0].observation.startswith("Invalid action: Invalid message; Input should be")
  assert outcomes[0, 0].metrics == {"openenv/invalid": 1.0}
  assert "server failed in step: EXECUTION_ERROR: as ordered" in outcomes[0, 1].failure
  assert "did not answer within 1 s" in outcomes[1, 0].failure
  assert outcomes[1, 1].observation == "Higher"
  assert runner.step({(0, 0): "0", (1, 1): "99"})[1, 1].observation == "Lower"


def check_capacity(runner):
  """Plays six episodes on four places: two are lost, and a later batch has its places again."""
  runner.reset(EXAMPLES, group=3, seeds=[1, 2])
  with pytest.warns(RuntimeWarning, match="has no free session"):
    outcomes = runner.step({(p, g): "0" for p in range(2) for g in range(3)})
  failures = [outcome.failure for outcome in outcomes.values() if outcome.failure]
  assert len(failures) == 2
  assert all("raise its max_concurrent_envs" in failure for failure in failures)


def test_a_game_over_the_wire(url):
  with run_in_process(task_at(url)) as runner:
    check_a_game(runner)
    check_faults(runner)


def test_faults_of_the_wire(url):
  with run_in_process(task_at(url)) as runner:
    runner.reset(EXAMPLES, group=2, seeds=[1, 2])
    with pytest.warns(RuntimeWarning):
      outcomes = runner.step({(0, 0): "-4", (0, 1): "-5", (1, 0): "0"})
    assert "failed: JSONDecodeError" in outcomes[0, 0].failure
    assert "failed: ValueError: a message of type 'state'" in outcomes[0, 1].failure
    assert outcomes[1, 0].failure is None
    check_capacity(runner)
    check_a_game(runner)


def test_arguments_are_sent_to_reset(url):
  def reset(example, seed):
    return {"seed": seed, "high": example.columns["high"]}

  with run_in_process(task_at(url, reset=reset, prompt=None)) as runner:
    assert runner.reset([Example("p", {"high": 5}, "p")], 1, [3]) == [None]


def test_a_server_that_is_not_there_costs_the_episodes():
  with run_in_process(task_at("ws://127.0.0.1:9/ws")) as runner:
    runner.reset(EXAMPLES[:1], 1, [0])
    with pytest.warns(RuntimeWarning):
      assert "cannot be reached" in runner.step({(0, 0): "1"})[0, 0].failure
  with pytest.raises(ValueError, match="begins with ws://"):
    episodes_at("http://127.0.0.1:8000")


# --- the real package -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_url(tmp_path_factory):
  """Runs a server of the real package, in a Python of its own: it takes 450 MB of packages."""
  python = os.environ.get("OPENENV_PYTHON")
  if python is None:
    folder = tmp_path_factory.mktemp("openenv")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "openenv==0.10.*"]
    if subprocess.run(install, check=False, timeout=900).returncode:
      pytest.skip("the package openenv cannot be installed here")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  command = [python, str(SERVER), str(port)]
  server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      assert server.poll() is None, "the server ended"
      with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
          break
      time.sleep(0.2)
    yield f"ws://127.0.0.1:{port}/ws"
  finally:
    server.kill()
    server.wait()


@pytest.mark.slow
def test_a_game_of_the_real_package(real_url):
  with run_in_process(task_at(real_url)) as runner:
    check_a_game(runner)
    check_capacity(runner)
    check_faults(runner)  # last: a place stays taken until the sleeping step ends


@pytest.mark.slow
def test_a_game_of_the_real_package_in_workers(real_url):
  time.sleep(6)  # until the step that slept in the other test has ended
  make = partial(task_at, real_url)
  with EnvironmentWorkers(make, workers=2, timeout=10.0, isolate=False) as runner:
    check_a_game(runner)


@pytest.mark.slow
def test_a_reward_of_nan_arrives_as_none(real_url):
  """Documents the wire of the real package: it has no NaN."""
  with run_in_process(task_at(real_url)) as runner:
    runner.reset(EXAMPLES[:1], 1, [0])
    outcome = runner.step({(0, 0): "-3"})[0, 0]
    assert (outcome.reward, outcome.done, outcome.failure) == (None, False, None)
