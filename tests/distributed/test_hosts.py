"""Tests runs on several hosts, as processes on this machine: what they share and how they end.

Whole runs of several processes take a minute each and are slow tests.
"""

import json
import signal
import time

import numpy as np
import pytest

from grpo_jax.distributed import cluster, hosts
from grpo_jax.distributed import mesh as meshes
from tests.helpers.host_runs import HEARTBEAT, RUNS, SMALL, check_same, train, wait_for_step
from tests.helpers.processes import finish, free_port, run, start

# --- one process ----------------------------------------------------------------------------------


def test_a_single_process_gets_its_own_values_back():
  with hosts.session(), hosts.together("nothing"):
    pass
  values = {"a": np.array([0.1, 0.2]), "b": np.zeros((2, 0))}
  assert hosts.exchange(**values) == [values]
  assert hosts.gathered(**values) == {name: pytest.approx(v) for name, v in values.items()}
  assert hosts.gathered_json([{"x": 1}]) == [{"x": 1}]
  assert not hosts.any_host(False)
  assert hosts.any_host(True)
  hosts.same("a text", "x")
  with pytest.raises(KeyError), hosts.together("raising"):
    raise KeyError("mine")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_rows_go_to_a_global_array_and_back(shape):
  mesh = meshes.make_mesh(shape)
  hosts.check_mesh(mesh)
  rows = {"a": np.arange(32).reshape(16, 2), "b": np.arange(16) > 3}
  layout = meshes.batch_sharding(mesh)
  placed = hosts.to_global(rows, layout)
  assert placed["a"].sharding == layout
  for name, value in hosts.to_local(placed).items():
    np.testing.assert_array_equal(value, rows[name])
  np.testing.assert_array_equal(hosts.to_all(rows, layout)["a"], rows["a"])
  assert hosts.to_all(rows, layout)["a"].sharding.is_fully_replicated


# --- several processes ----------------------------------------------------------------------------

SHORT = """
import sys
import numpy as np
from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
import jax

with hosts.session(heartbeat=10):
  index, count = hosts.own_shard()
  assert count == 2 and hosts.is_first() == (index == 0)
  third = 1 / 3 + index  # not a float32
  parts = hosts.exchange(a=np.full(index + 1, third), b=np.array(["x" * index]))
  assert [part["a"].tolist() for part in parts] == [[1 / 3], [1 / 3 + 1] * 2]
  assert [part["b"].tolist() for part in parts] == [[""], ["x"]]
  assert hosts.gathered(a=np.array([index]))["a"].tolist() == [0, 1]
  assert hosts.gathered_json([index, None]) == [0, None, 1, None]
  assert hosts.any_host(index == 1) and not hosts.any_host(False)
  hosts.same("the config", "x")
  try:
    hosts.same("the config", f"{index}")
  except ValueError as error:
    print(error)

  mesh = meshes.make_mesh((2, 1, 2))
  hosts.check_mesh(mesh)
  layout = meshes.batch_sharding(mesh)
  rows = np.arange(6).reshape(3, 2) + 10 * index
  placed = hosts.to_global(rows, layout)
  assert placed.shape == (6, 2)
  assert float(jax.jit(lambda a: a.sum())(placed)) == 90.0  # 15 + 75
  np.testing.assert_array_equal(hosts.to_local(placed), rows)
  with jax.transfer_guard("disallow"):
    everywhere = hosts.to_all(np.arange(3), layout)
  assert everywhere.sharding.is_fully_replicated
  try:
    hosts.check_mesh(meshes.make_mesh((1, 1, 4)))
  except ValueError as error:
    print(error)

  with hosts.together("an easy thing"):
    pass
  with hosts.together("a hard thing"):
    if index == 1:
      raise LookupError("no such judge")
"""


def test_two_processes_share_values_and_errors():
  (first, output), (second, other) = run(["-c", SHORT], 2, devices=2)
  assert "the config differs between process 0 and [1]" in output
  assert "mesh.tensor x mesh.context must divide the devices of a host" in output
  message = "a hard thing failed on process 1 of 2: LookupError: no such judge"
  assert f"HostError: {message}" in output, output
  assert "LookupError: no such judge" in other
  assert "HostError" not in other
  assert first == second == 1


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_hosts_of_four_devices_compute_what_one_of_eight_does(tmp_path, name):
  one, two = tmp_path / "one", tmp_path / "two"
  [(code, output)] = run(train(one, *RUNS[name]), 1, devices=8)
  assert code == 0, output
  for code, output in run(train(two, *RUNS[name]), 2):
    assert code == 0, output
  rows, states = check_same(one, two, RUNS[name])
  if name.startswith("episodes"):
    assert max(row.get("episode/turns", 0) for row in rows) > 1
  if name == "rich":
    assert rows[1]["dynamic_sampling/resamples"] > 0
  if name == "curriculum":
    assert np.array_equal(states[0].counts, states[1].counts)
    assert (states[0].counts[:, 0] > 0).sum() >= 3 * 16


REWARD = """
import os, time
calls = 0
def right(prompts, completions, **columns):
  global calls
  calls += 1
  if calls > 4 and os.environ.get("JAX_PROCESS_ID") == "1" and os.environ.get("FAILS"):
    raise RuntimeError("the judge is down")
  return [float(len(text)) for text in completions]
"""


def own_task(folder):
  (folder / "reward.py").write_text(REWARD)
  rows = [json.dumps({"prompt": letter}) + "\n" for letter in "abcdefgh"]
  (folder / "rows.jsonl").write_text("".join(rows))
  return [
    "--config.task.name=table",
    f"--config.task.settings.path={folder}/rows.jsonl",
    f"--config.task.settings.reward={folder}/reward.py:right",
    "--config.task.settings.eval_fraction=0.3",
    "--config.rewards.isolate=false",  # this one reads the environment
    "--config.steps=500",
  ]


def own_run(folder):
  """Returns the arguments of a run of `own_task`, without the settings of another task."""
  return ["-m", "grpo_jax.train", "--workdir", str(folder / "run"), *SMALL, *own_task(folder)]


@pytest.mark.slow
def test_a_reward_that_raises_on_one_host_ends_all_hosts_with_its_message(tmp_path):
  (first, output), (second, other) = run(own_run(tmp_path), 2, devices=1, FAILS="1")
  assert first == cluster.FAILED, output
  assert "scoring the completions failed on process 1 of 2: RewardError" in output
  assert "RuntimeError: the judge is down" in output
  assert second not in (0, cluster.FAILED)
  assert "RuntimeError: the judge is down" in other


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends(tmp_path, victim):
  """It ends within the heartbeat and the grace period."""
  port = free_port()
  program = own_run(tmp_path)
  processes = [start(program, i, 2, port, devices=1) for i in range(2)]
  wait_for_step(tmp_path / "run", processes)
  processes[victim].kill()
  began = time.monotonic()
  results = finish(processes, seconds=HEARTBEAT + hosts.GRACE + 30)
  assert time.monotonic() - began < HEARTBEAT + hosts.GRACE + 30
  code, output = results[1 - victim]
  assert code != 0
  assert "another task died" in output or "failed" in output, output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_on_one_host_stops_all_after_a_saved_step(tmp_path, number, exit_code):
  port = free_port()
  processes = [start(own_run(tmp_path), i, 2, port, devices=1) for i in range(2)]
  wait_for_step(tmp_path / "run", processes)
  processes[1].send_signal(number)
  for code, output in finish(processes):
    assert code == exit_code, output
    assert "which is saved" in output


STUCK = """
import time
import numpy as np
from grpo_jax.distributed import hosts
with hosts.session(heartbeat=100, wait=3.0):
  hosts.exchange(a=np.zeros(1))
  if hosts.is_first():
    hosts.exchange()
  time.sleep(600)
"""


@pytest.mark.slow
def test_a_host_that_waits_too_long_dumps_its_stacks_and_ends():
  (first, output), (second, _) = run(["-c", STUCK], 2, devices=1)
  assert first == cluster.FAILED, output
  assert "process 0 ends: no exchange between the hosts for 3 s (hosts.wait)" in output
  assert "in exchange" in output  # the stack
  assert second != 0
