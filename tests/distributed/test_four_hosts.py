"""Runs on four hosts of two devices: equal to one host, slow hosts, and hosts that die.

`make test-hosts` runs them. Four processes share the cores of this machine, so each test takes a
minute or two.
"""

import json
import re
import signal
import time

import pytest

from grpo_jax.distributed import hosts
from tests.helpers.host_runs import (
  HEARTBEAT,
  RUNS,
  check_same,
  rows_of,
  samples_of,
  state_of,
  train,
  wait_for_step,
)
from tests.helpers.learning import bits
from tests.helpers.processes import finish, free_port, run, start

pytestmark = pytest.mark.slow
COUNT = 4
VICTIM = 2
STEPS = 6
# How a host ends when another one died. Gloo: "collective mismatch" is of a host that still waited
# for numbers when one whose collective was cut off had begun the next exchange.
ENDS = ("another task died", "failed", "collective mismatch")

# Trains with a process that dies, or is slow, in one phase of the step or of the evaluation after
# step 2. What it patches is how the loop is put together, not what is tested.
PROGRAM = """
import os, signal, sys, threading, time
from grpo_jax import rollout, train
from grpo_jax.run import checkpoint

phase, *arguments = sys.argv[1:]

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def at(number, function, act):
  calls = 0
  def called(*a, **k):
    nonlocal calls
    calls += 1
    if calls == number:
      act()
    return function(*a, **k)
  return called

def soon():
  threading.Timer(0.003, die).start()

if os.environ.get("JAX_PROCESS_ID") == os.environ.get("VICTIM"):
  if phase == "sampling":
    rollout.generate = at(3, rollout.generate, soon)
  elif phase == "reward":
    rollout.score = at(3, rollout.score, die)
  elif phase == "update":
    train._learn = at(3, train._learn, soon)
  elif phase == "save":
    save = checkpoint.Checkpoints.save
    def dying(self, step, *more):
      save(self, step, *more)
      if step == 4:
        die()
    checkpoint.Checkpoints.save = dying
  elif phase == "evaluation":
    train.evaluate = at(2, train.evaluate, soon)
  elif phase == "slow":
    score = rollout.score
    def slow(*a, **k):
      time.sleep(0.7)
      return score(*a, **k)
    rollout.score = slow
sys.exit(train.main(arguments))
"""


def program(workdir, phase="none", *more):
  arguments = train(workdir, *RUNS["plain"], f"--config.steps={STEPS}", "--config.eval.every=3")
  return ["-c", PROGRAM, phase, *arguments[2:], *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The work directory of an uninterrupted run on four hosts."""
  workdir = tmp_path_factory.mktemp("four") / "run"
  for code, output in run(program(workdir), COUNT, devices=2):
    assert code == 0, output
  return workdir


def check_bits(one, two):
  """Checks that two runs on the same hosts leave the same, bit for bit."""
  assert samples_of(one) == samples_of(two)
  assert rows_of(one) == rows_of(two)
  states = [state_of(workdir, RUNS["plain"], STEPS) for workdir in (one, two)]
  assert bits(states[0]) == bits(states[1])


def test_four_hosts_of_two_devices_compute_what_one_of_eight_does(whole, tmp_path):
  [(code, output)] = run(program(tmp_path / "one"), 1, devices=8)
  assert code == 0, output
  check_same(tmp_path / "one", whole, RUNS["plain"], STEPS)
  # All of them are told in run.json.
  [session] = json.loads((whole / "run.json").read_text())["sessions"]
  assert [host["process"] for host in session["hosts"]] == [0, 1, 2, 3]
  assert [host["devices"] for host in session["hosts"]] == ["2 x cpu"] * 4
  assert len({host["pid"] for host in session["hosts"]}) == 4
  assert len({i for host in session["hosts"] for i in host["ids"]}) == 8


def test_two_simulated_slices_of_two_hosts_compute_what_one_does(whole, tmp_path):
  arguments = program(tmp_path / "run", "none", "--config.mesh.slices=2")
  for code, output in run(arguments, COUNT, devices=2):
    assert code == 0, output
  assert "in 2 slices" in (tmp_path / "run" / "console.log").read_text()
  check_bits(tmp_path / "run", whole)


def test_a_slow_host_changes_nothing_but_the_time(whole, tmp_path):
  for code, output in run(program(tmp_path / "run", "slow"), COUNT, devices=2, VICTIM=str(VICTIM)):
    assert code == 0, output
  check_bits(tmp_path / "run", whole)


def test_a_stop_on_one_host_stops_all_at_the_same_step(whole, tmp_path):
  port, workdir = free_port(), tmp_path / "run"
  arguments = program(workdir, "slow")  # slow enough to be stopped in the middle
  processes = [start(arguments, i, COUNT, port, devices=2, VICTIM="1") for i in range(COUNT)]
  wait_for_step(workdir, processes)
  processes[3].send_signal(signal.SIGINT)
  results = finish(processes)
  assert [code for code, _ in results] == [130] * COUNT, results
  steps = {re.search(r"stopped after step (\d+), which is saved", out)[1] for _, out in results}
  assert len(steps) == 1
  assert int(*steps) < STEPS
  for code, output in run(program(workdir), COUNT, devices=2):
    assert code == 0, output
  check_bits(workdir, whole)


@pytest.mark.parametrize("phase", ["sampling", "reward", "update", "save", "evaluation"])
def test_when_a_host_dies_the_others_end_and_the_same_command_continues(whole, tmp_path, phase):
  workdir = tmp_path / "run"
  port = free_port()
  arguments = program(workdir, phase)
  processes = [
    start(arguments, i, COUNT, port, devices=2, VICTIM=str(VICTIM)) for i in range(COUNT)
  ]
  assert processes[VICTIM].wait(timeout=400) == -signal.SIGKILL, finish(processes)
  began = time.monotonic()
  results = finish(processes, seconds=HEARTBEAT + hosts.GRACE + 30)
  assert time.monotonic() - began < HEARTBEAT + hosts.GRACE + 30
  for index, (code, output) in enumerate(results):
    if index != VICTIM:
      assert code != 0, output
      assert any(text in output for text in ENDS), output
  for code, output in run(program(workdir), COUNT, devices=2):
    assert code == 0, output
  check_bits(workdir, whole)
