"""Tests that all hosts save the same step when one of them is preempted."""

import re
import signal

import pytest

from grpo_jax.run import checkpoint
from tests.helpers.processes import finish, free_port, run, start

SHORT = """
import os, signal, sys, time
from grpo_jax.distributed import hosts
from grpo_jax.run.signals import Signals

with hosts.session(heartbeat=10):
  index, _ = hosts.own_shard()
  early = sys.argv[1] == "early"
  if index == 1 and early:  # nothing of ours handles it yet
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
  with Signals() as signals:
    for step in range(200):
      time.sleep(0.02 * (1 + index))  # one host is slower
      if index == 1 and step == 5 and not early:
        os.kill(os.getpid(), signal.SIGTERM)
      if stop := signals.of_any_host(step):
        print(f"stops at {step} by {stop}")
        break
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_all_hosts_stop_at_the_same_step(when):
  """Before there is a handler, JAX's service takes the signal; then the step itself is the last."""
  results = run(["-c", SHORT, when], 2, devices=1)
  lines = [re.search(r"stops at (\d+) by 15", output) for _, output in results]
  assert all(code == 0 for code, _ in results), results
  assert all(lines), results
  first, second = (int(line.group(1)) for line in lines)
  assert first == second
  if when == "late":
    assert first == 5


REWARD = """
import os, signal, time
if os.environ.get("JAX_PROCESS_ID") == "1" and os.environ.get("PREEMPTED"):
  os.kill(os.getpid(), signal.SIGTERM)  # while the run reads its files
def right(prompts, completions, **columns):
  return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_host_that_is_preempted_while_it_starts_stops_all_after_a_saved_step(tmp_path):
  (tmp_path / "reward.py").write_text(REWARD)
  (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{c}"}}\n' for c in "abcdefgh"))
  program = [
    "-m", "grpo_jax.train", "--workdir", str(tmp_path / "run"), "--config=experiments/tiny.py",
    "--config.steps=60", "--config.checkpoint.every=100", "--config.rollout.group_size=4",
    "--config.rollout.completion_length=4", "--config.rewards.workers=0",
    "--config.task.name=table", "--config.task.settings.eval_fraction=0.3",
    f"--config.task.settings.path={tmp_path}/rows.jsonl",
    f"--config.task.settings.reward={tmp_path}/reward.py:right",
  ]  # fmt: skip
  port = free_port()
  processes = [start(program, i, 2, port, devices=1, PREEMPTED="1") for i in range(2)]
  results = finish(processes)
  steps = {re.search(r"stopped after step (\d+), which is saved", out)[1] for _, out in results}
  assert [code for code, _ in results] == [128 + signal.SIGTERM] * 2, results
  with checkpoint.Checkpoints(tmp_path / "run", keep=2, read_only=True) as checkpoints:
    assert steps == {str(checkpoints.latest())}
  assert checkpoints.latest() < 20
  # The same command goes on.
  more = [*program, f"--config.steps={int(*steps) + 2}"]
  for code, output in run(more, 2, devices=1):
    assert code == 0, output
