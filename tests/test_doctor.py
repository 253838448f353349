"""Tests what the doctor says of configs and of work directories, and plants illnesses in runs.

`tests/run/test_health.py` has what it says of metrics.
"""

import json
import shutil
import subprocess
import sys

import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import load, to_saved
from grpo_jax.doctor import before, main, of_run
from grpo_jax.run import workdir as workdirs
from tests.helpers.model_files import UNTIED

TINY = "experiments/tiny.py"


# --- before a run ---------------------------------------------------------------------------------


def names_before(*options):
  return [f.name for f in before(build(load(TINY, [f"--config.{o}" for o in options])))]


def test_before_a_run():
  assert names_before() == []
  assert names_before("rollout.group_size=2") == ["no_groups"]
  assert names_before("algorithm.name=grpo", "algorithm.beta=1e-7") == ["idle_reference"]


REGIONS = """
import jax.numpy as jnp

def of_the_token(log_ratio, logp, old_logp, advantages):
  never = jnp.zeros(logp.shape, bool)
  return jnp.minimum(jnp.exp(log_ratio), 2.0) * advantages, never, never

def of_the_batch(log_ratio, logp, old_logp, advantages):
  ratio, never = jnp.exp(log_ratio), jnp.zeros(logp.shape, bool)
  return ratio / ratio.mean() * advantages, never, never
"""


def test_a_teacher_in_the_loss_is_no_reason_to_stop():
  teacher = ("teacher.source=random:tiny", "algorithm.teacher_divergence=0.5")
  assert names_before("algorithm.name=opd", *teacher) == []


@pytest.mark.parametrize(
  ("name", "expected"), [("of_the_token", []), ("of_the_batch", ["changing_loss"])]
)
def test_a_loss_of_ones_own_is_tried_before_the_run(tmp_path, name, expected):
  """A ratio that is divided by its mean over the batch depends on the number of micro-batches."""
  (tmp_path / "regions.py").write_text(REGIONS)
  region = f"algorithm.trust_region={tmp_path}/regions.py:{name}"
  assert names_before("algorithm.name=reinforce", region) == expected


@pytest.mark.parametrize(
  ("template", "name"),
  [
    ("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
     "doubled_start"),
    ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<think></think>\n",
     "closed_thought"),
  ],
)  # fmt: skip
def test_chat_templates(tmp_path, template, name):
  folder = tmp_path / "model"
  shutil.copytree(UNTIED, folder)
  (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
  data = tmp_path / "task.jsonl"
  data.write_text(
    "".join(
      json.dumps({"prompt": [{"role": "user", "content": f"{i}+1"}], "answer": str(i)}) + "\n"
      for i in range(30)
    )
  )
  options = [
    f"--config.model.source={folder}", "--config.task.name=jsonl",
    f"--config.task.settings.path={data}",
    "--config.task.settings.reward=numeric", "--config.rollout.completion_length=4",
  ]  # fmt: skip
  found = before(build(load(TINY, options)))
  assert [f.name for f in found] == [name]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_on_runs(tmp_path, capsys):
  (tmp_path / "run").mkdir()
  workdirs.write_config(tmp_path / "run", to_saved(load(TINY)))
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
  assert main([str(tmp_path / "run")]) == 0
  assert capsys.readouterr().out.endswith("run, 1 steps\nnothing found\n")
  rows = [
    {"step": i, "reward": 0.0, "accuracy": 0.0, "frac_reward_zero_std": 1.0} for i in range(20)
  ]
  lines = [json.dumps(row) for row in rows]
  (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "rew')
  assert main([str(tmp_path / "run")]) == 1
  out = capsys.readouterr().out
  assert "no_signal (sure): in 100% of the groups all rewards are equal, and 0.0% of the ans" in out
  assert "  why:  a group without two different rewards has no gradient" in out
  assert "  next: look at samples/" in out
  (tmp_path / "run" / "metrics.jsonl").unlink()
  assert of_run(tmp_path / "run") == ([], 0)


def test_what_is_no_run(tmp_path, capsys):
  assert main([str(tmp_path)]) == 2
  assert "not a work directory" in capsys.readouterr().err
  assert main([]) == 2
  assert "give either a work directory or --config" in capsys.readouterr().err
  assert main(["--config", TINY, "--config.rollout.group_size=2"]) == 0
  assert "no_groups (possible): rollout.group_size is 2" in capsys.readouterr().out


def test_a_run_shows_what_is_found(tmp_path, capsys):
  """Seven steps of a task that the tiny model never solves."""
  options = [
    "task.name=countdown", "task.settings.eval_size=0", "steps=7", "rollout.group_size=2",
    "rollout.completion_length=2", "rewards.workers=0", "log.samples=0",
  ]  # fmt: skip
  train.run(load(TINY, [f"--config.{o}" for o in options]), tmp_path / "run")
  out = capsys.readouterr().out
  assert "doctor     rollout.group_size is 2: with a pass rate of 0.1, 82% of such groups" in out
  assert out.count("doctor: in 100% of the groups all rewards are equal") == 1
  assert f"(python -m grpo_jax.doctor {tmp_path / 'run'})" in out


# --- planted in real runs -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (["optimizer.learning_rate=1e-12", "steps=40"], "no_movement"),
    (["task.name=countdown", "rollout.completion_length=4", "steps=16"], "no_signal"),
    (["algorithm.name=grpo", "algorithm.beta=50.0", "steps=40"], "flat_reward"),
  ],
)  # fmt: skip
def test_real_runs(tmp_path, options, expected):
  command = [sys.executable, "-m", "grpo_jax.train", "--config", TINY, "--workdir", str(tmp_path)]
  subprocess.run([*command, *(f"--config.{o}" for o in options)], check=True, capture_output=True)
  assert expected in [f.name for f in of_run(tmp_path)[0]]
