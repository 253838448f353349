"""Tests sweeps of tiny runs: what is refused, skipped, continued, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_jax import config
from grpo_jax.addresses import parse
from grpo_jax.run import record
from grpo_jax.sweep import sweepfile
from grpo_jax.sweep.__main__ import main
from grpo_jax.sweep.directory import Directory
from grpo_jax.sweep.states import State, state_of
from tests.helpers.stores import served

TINY = [
  "--config.task.settings.eval_size=4", "--config.rollout.completion_length=3",
  "--config.rollout.prompts_per_step=8", "--config.rollout.group_size=2",
  "--config.log.trackers=()",
]  # fmt: skip
EXPERIMENT = "experiments/tiny.py"
PRINT = ["--print", "shell"]


def arguments(workdir, *settings, steps=2, experiment=EXPERIMENT, more=()):
  sets = [part for text in settings for part in ("--set", text)]
  return [
    "--config", str(experiment), "--workdir", str(workdir), *sets, f"--config.steps={steps}",
    *TINY, *more,
  ]  # fmt: skip


def start(*own):
  environment = dict(os.environ, PYTHONPATH=str(Path.cwd()), PYTHONUNBUFFERED="1")
  flags = environment["XLA_FLAGS"].split()
  environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
  return subprocess.Popen(
    [sys.executable, "-m", "grpo_jax.sweep", *own],
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def sweep(*own):
  process = start(*own)
  output = process.communicate(timeout=300)[0]
  return process.returncode, output


def sessions(workdir):
  return {path.parent.name: len(record.read(path.parent)) for path in workdir.glob("*/run.json")}


# --- whole sweeps ---------------------------------------------------------------------------------


REWARDS = """
def good(prompts, completions, **columns):
  return [float("e" in text) for text in completions]
def bad(prompts, completions, **columns):
  raise RuntimeError("the judge is down")
"""


def own_experiment(folder):
  """Writes an experiment whose reward is the field to sweep, and returns its path."""
  (folder / "rewards.py").write_text(REWARDS)
  rows = [json.dumps({"prompt": letter}) + "\n" for letter in "abcdefghijkl"]
  (folder / "rows.jsonl").write_text("".join(rows))
  settings = {"path": f"{folder}/rows.jsonl", "reward": "", "eval_fraction": 0.3}
  (folder / "own.py").write_text(
    "from grpo_jax.config import default_config\n"
    "def get_config():\n"
    "  c = default_config()\n"
    "  c.task.name = 'table'\n"
    "  c.rewards.workers = 0\n"
    "  with c.unlocked():\n"
    f"    c.task.settings.update({settings})\n"
    "  return c\n"
  )
  return folder / "own.py"


def test_a_sweep_trains_skips_goes_on_after_a_failure_and_compares(tmp_path):
  experiment, out = own_experiment(tmp_path), tmp_path / "table.json"
  bad, good = (f"{tmp_path}/rewards.py:{name}" for name in ("bad", "good"))
  both, alone = f"task.settings.reward={bad},{good}", f"task.settings.reward={good}"
  own = arguments(tmp_path / "s", both, "seed=0", experiment=experiment)
  own.remove(TINY[0])
  code, output = sweep(*own)
  assert code == 3, output
  assert output.count("failed (RewardError: ") == 2, output  # at once, and at the end
  assert "the judge is down" in output
  assert "rewards.py:good  1/1" in output
  # Again, without the bad one: what is finished is skipped, and a new seed is added.
  before = sessions(tmp_path / "s")
  own[own.index("seed=0")] = "seed=0,1"
  own[own.index(both)] = alone
  code, output = sweep(*own, "--json", str(out))
  assert code == 3, output  # the failed run of before is part of the sweep
  assert "run 1 of 1: reward=rewards.py-good,seed=1" in output
  after = sessions(tmp_path / "s")
  assert {name: after[name] for name in before} == before
  assert len(after) == 3
  tree = json.loads(out.read_text())
  assert [run["state"] for run in tree["runs"].values()] == ["failed", "finished", "finished"]
  failed, done = tree["rows"]
  assert failed["values"] == {}
  assert (done["settings"], list(done["values"])) == ({"task.settings.reward": good}, ["0", "1"])
  assert done["standard_error"] is not None


def test_the_table_alone_needs_the_directory_only(tmp_path, capsys):
  runs = {f"seed={i}": {"seed": str(i)} for i in (0, 1, 2)}
  sweepfile.write(Directory(tmp_path), sweepfile.Sweep("x.py", {}, runs))
  for name, value in zip(runs, (0.25, 0.75, 0.5)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    row = {"step": 3, "reward": value, "eval/accuracy": value}
    (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    reason = "finished" if name != "seed=2" else "killed"
    session = {"sessions": [{"reason": reason}]}
    (tmp_path / name / "run.json").write_text(json.dumps(session))
  assert main(["--workdir", str(tmp_path), "--table", "--metric", "reward"]) == 3
  assert capsys.readouterr().out.splitlines()[-3:] == [
    "runs  reward         by seed",
    "2/3   0.500 ± 0.250  0: 0.25, 1: 0.75",
    "not counted: seed=2: unfinished after 4 steps (killed)",
  ]
  (tmp_path / "seed=2" / "run.json").write_text('{"sessions": [{"reason": "finished"}]}')
  assert main(["--workdir", str(tmp_path), "--table", "--metric", "no"]) == 0
  text = capsys.readouterr().out
  assert "no run has no; --metric takes one of: eval/accuracy, reward, step" in text


@pytest.mark.parametrize(
  "number",
  [
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
  ],
)
def test_a_sweep_that_was_stopped_is_continued(tmp_path, number):
  own = arguments(tmp_path / "s", "seed=0,1", steps=12)
  process = start(*own)
  first = tmp_path / "s" / "seed=0"
  wait_for(lambda: state_of(first).steps >= 2, process)
  process.send_signal(number)
  if number == signal.SIGKILL:
    process.wait(timeout=60)
    # The run outlives the sweep, and keeps its directory; it ends by itself.
    wait_for(lambda: state_of(first).kind == "finished", None)
  else:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "which is saved" in output
    state = state_of(first)
    assert (state.kind, state.reason) == ("unfinished", f"stopped by {signal.Signals(number).name}")
    assert 2 <= state.steps < 12
  assert not (tmp_path / "s" / "seed=1").exists()
  code, output = sweep(*own)
  assert code == 0, output
  assert "2/2" in output
  assert [state_of(tmp_path / "s" / f"seed={i}") for i in (0, 1)] == [State("finished", 12)] * 2


def wait_for(condition, process, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert process is None or process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, "it did not come in time"
    time.sleep(0.05)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (["optimizer.learning_rat=1"], "did you mean 'learning_rate'?"),
    (["seed=0", "seed=1"], "--set seed is given 2 times"),
    (["seed="], "has no values"),
    (["seed=0,x"], "'x' is not of type int"),
    (["seed=0,00"], "are the same run"),
    (["optimizer=1"], "optimizer is a group of fields"),
    (["steps=1,2"], "steps stands in --set and in --config.steps"),
  ],
)
def test_settings_are_refused_before_the_first_run(tmp_path, capsys, settings, message):
  assert main(arguments(tmp_path / "s", *settings)) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "s").exists()


def test_configs_that_do_not_build_are_refused_before_the_first_run(tmp_path, capsys):
  settings = ["eval.batch_prompts=2,-3", "algorithm.name=grpo,no_such", "seed=0,1"]
  assert main(arguments(tmp_path / "s", *settings)) == 2
  text = capsys.readouterr().err
  # A problem is told once, with the first run that has it.
  assert "the sweep has 2 problems" in text
  assert "batch_prompts=-3,name=grpo,seed=0 and 3 more: eval.batch_prompts is -3" in text
  assert "no_such" in text
  assert not (tmp_path / "s").exists()


def test_values_are_checked_before_they_are_printed(tmp_path, capsys):
  more = ["--print", "shell"]
  assert main(arguments(tmp_path / "s", "eval.batch_prompts=-3", more=more)) == 2
  assert "eval.batch_prompts is -3" in capsys.readouterr().err
  assert main(arguments(tmp_path / "s", "seed=0,1", more=[*more, "--accept", "chat.date"])) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  assert f"--workdir {tmp_path}/s/seed=1 --accept chat.date --config.steps=2" in lines[1]
  assert lines[1].endswith("--config.seed=1")
  assert not (tmp_path / "s").exists()


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  assert main(arguments(tmp_path / "run", "seed=0", more=["--print", "shell"])) == 2
  assert "is the directory of a run" in capsys.readouterr().err
  assert main(["--workdir", str(tmp_path), "--table"]) == 2
  assert "holds no sweep" in capsys.readouterr().err
  (tmp_path / "sweep.json").write_text('{"config": 3}')
  assert main(["--workdir", str(tmp_path), "--table"]) == 2
  assert "sweep.json is damaged" in capsys.readouterr().err


def test_another_sweep_is_refused(tmp_path, capsys):
  def begin(*overrides):
    base = config.to_saved(config.load(EXPERIMENT, [*TINY, "--config.steps=2", *overrides]))
    begun = sweepfile.Sweep(EXPERIMENT, base, {"seed=0": {"seed": "0"}})
    sweepfile.write(Directory(tmp_path), begun)

  def ask(*settings, **options):
    code = main(arguments(tmp_path, *settings, more=["--print", "shell"], **options))
    return code, capsys.readouterr().err

  begin()
  assert ask("seed=0,1") == (0, "")
  assert ask("seed=0", steps=9) == (0, "")  # steps may change
  code, text = ask("optimizer.learning_rate=1e-3")
  assert code == 2
  assert f"holds another sweep: of seed with {EXPERIMENT}, and this one is of" in text
  begin("--config.rollout.temperature=0.5")
  code, text = ask("seed=0")
  assert code == 2
  assert "was begun with another config: rollout.temperature: 0.5 -> 1.0" in text


def test_a_sweep_does_not_run_within_a_cluster(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "0")
  assert main(arguments(tmp_path / "s", "seed=0")) == 2
  assert "--print slurm" in capsys.readouterr().err


# --- on stores ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_on_a_store_is_continued_from_a_fresh_machine(tmp_path, monkeypatch):
  with served("gs", monkeypatch) as store:
    address = str(store.new("sweep"))
    monkeypatch.setenv("GRPO_JAX_STAGES", str(tmp_path / "first"))
    code, output = sweep(*arguments(address, "seed=0"))
    assert code == 0, output
    assert "seed=0/run.json" in store.contents(parse(address))
    monkeypatch.setenv("GRPO_JAX_STAGES", str(tmp_path / "second"))
    code, output = sweep(*arguments(address, "seed=0,1"))
    assert code == 0, output
    assert "run 1 of 1: seed=1" in output
    assert "2/2" in output
    code, output = sweep("--workdir", address, "--table")
    assert code == 0, output
    assert f"{address}: the last eval/accuracy" in output
    code, output = sweep(*arguments(address, "optimizer.learning_rate=1e-3", more=PRINT))
    assert (code, f"{address} holds another sweep" in output) == (2, True), output
    code, output = sweep(*arguments(f"{address}-2", "seed=7", more=PRINT))
    assert f"--workdir {address}-2/seed=7" in output
  assert not (tmp_path / "gs:").exists()
