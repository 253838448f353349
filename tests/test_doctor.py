"""Plants each illness in the metrics of a healthy run; no healthy run has a finding at any step.

`tests/data/healthy_runs` holds metrics of three runs: the demo, `experiments/tiny.py` and
`experiments/smollm2_guess_number.py`. Slow tests plant illnesses in real small runs.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import default_config, load, to_saved
from grpo_jax.core.diagnosis import ORDER
from grpo_jax.doctor import CHECKS, Watcher, before, examine, main, mann_kendall, of_run
from grpo_jax.run import workdir as workdirs
from tests.helpers.model_files import UNTIED

HEALTHY = sorted(Path("tests/data/healthy_runs").glob("*.jsonl"))
TINY = "experiments/tiny.py"


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def config(steps):
  c = default_config()
  c.steps = steps
  return c


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_a_healthy_run_has_no_finding_at_any_step(path):
  rows = rows_of(path)
  steps = sum("reward" in row for row in rows)
  for end in range(1, len(rows) + 1):
    assert examine(rows[:end], config(steps)) == [], f"after {end} rows"


def test_there_are_three_healthy_runs():
  assert [path.stem for path in HEALTHY] == ["demo", "episodes", "tiny"]


# --- planted in metrics ---------------------------------------------------------------------------

N = 45
RNG = np.random.default_rng(0)
UP = np.linspace(0.1, 0.7, N)
NOISE = RNG.normal(0, 0.02, N)
FLAT = 0.3 + NOISE
LEARNING = {
  "reward": UP + NOISE,
  "accuracy": UP + NOISE,
  "rewards/math/mean": UP + NOISE,
  "entropy": 1.5 - UP,
  "frac_reward_zero_std": 0.3 + NOISE,
  "grad_norm": 1.0 + NOISE,
  "completions/clipped_ratio": 0.02 + 0 * NOISE,
  "completions/mean_length": 80 + 100 * NOISE,
  "rewards/missing": 0 * NOISE,
  "rewards/raised": 0 * NOISE,
  "clip_ratio/region_mean": 0.01 + 0 * NOISE,
  "kl": 0.01 * UP,
  "sampling/sampling_logp_difference/mean": 2e-4 + 0 * NOISE,
  "update/skipped": 0 * NOISE,
}
WITHOUT = {"reward": FLAT, "accuracy": FLAT, "rewards/math/mean": FLAT}
# What is planted, and how sure the finding is. Each is the only one.
PLANTED = {
  "no_signal": (
    {"frac_reward_zero_std": 0.7 + NOISE, **{name: UP * 0 + 0.02 for name in WITHOUT},
     "reward": 0.02 + NOISE / 10}, "likely",
  ),
  "solved": ({"frac_reward_zero_std": UP * 0 + 1.0, "accuracy": UP * 0 + 1.0}, "sure"),
  "flat_reward": (WITHOUT, "sure"),
  "fallen_reward": (
    {name: np.concatenate([UP[:30], np.full(15, 0.1) + NOISE[:15]]) for name in WITHOUT}, "sure",
  ),
  "hacked": ({"accuracy": 0.6 - UP / 2}, "likely"),
  "not_general": ({}, "likely"),
  "lost_rewards": ({"rewards/missing": UP * 0 + 0.2}, "sure"),
  "truncated": ({**WITHOUT, "completions/clipped_ratio": 0.6 + NOISE}, "sure"),
  "longer_not_better": ({**WITHOUT, "completions/mean_length": 50 + 200 * UP}, "likely"),
  "low_entropy": ({**WITHOUT, "entropy": 0.02 + NOISE / 10}, "likely"),
  "far_from_reference": ({"kl": 5 * UP}, "sure"),
  "clipped": ({"clip_ratio/region_mean": UP}, "sure"),
  "mismatch": ({"sampling/sampling_logp_difference/mean": UP * 0 + 5e-3}, "likely"),
  "no_gradient": ({"grad_norm": 0 * UP}, "sure"),
  "far_clipped": ({"grad_norm": 50 + NOISE}, "possible"),
  "skipped": ({"update/skipped": (np.arange(N) % 9 == 0) * 1.0}, "sure"),
  "no_movement": ({**WITHOUT, "entropy": 1.0 + NOISE / 10}, "likely"),
}  # fmt: skip
# A reward that does not rise belongs to these.
WITH = {
  "no_signal": {"flat_reward"}, "truncated": {"flat_reward"},
  "longer_not_better": {"flat_reward"}, "low_entropy": {"flat_reward"},
  "no_movement": {"flat_reward"},
}  # fmt: skip


def history(changes, held_out=(0.1, 0.6)):
  series = LEARNING | changes
  rows = [{"step": 0, "eval/accuracy": held_out[0], "eval/accuracy_se": 0.03}]
  rows += [{"step": i, **{name: float(v[i]) for name, v in series.items()}} for i in range(N)]
  return [*rows, {"step": N, "eval/accuracy": held_out[1], "eval/accuracy_se": 0.03}]


def test_a_run_that_learns_has_no_finding():
  assert examine(history({}), config(200)) == []


@pytest.mark.parametrize("name", CHECKS)
def test_a_planted_illness_is_found_and_no_other(name):
  changes, confidence = PLANTED[name]
  held_out = (0.1, 0.12) if name == "not_general" else (0.1, 0.6)
  found = {f.name: f for f in examine(history(changes, held_out), config(200))}
  assert set(found) == {name} | WITH.get(name, set())
  assert found[name].confidence == confidence
  assert all(np.isfinite(list(found[name].evidence.values())))
  assert min(len(found[name].seen), len(found[name].reason), len(found[name].advice)) > 15


def test_an_entropy_that_falls_fast_is_told_before_it_is_gone():
  changes = {**WITHOUT, "entropy": np.exp(-0.05 * np.arange(N))}
  found = {f.name: f for f in examine(history(changes), config(200))}
  assert found["low_entropy"].confidence == "possible"
  # From exp(-0.05 * 43) to 0.05 = exp(-3.0): 17 steps at a rate of 0.05.
  assert found["low_entropy"].evidence["steps"] == pytest.approx(17, abs=0.5)


def test_a_share_of_the_first_steps_is_no_finding():
  rows = history(PLANTED["no_signal"][0])[:5]
  assert examine(rows, config(200)) == []


def test_metrics_that_are_null_or_missing():
  rows = [{"step": i, "reward": None if i % 2 else 0.5, "entropy": None} for i in range(30)]
  assert [f.name for f in examine(rows, config(30))] == ["flat_reward"]
  assert examine([], config(30)) == []


def test_the_order_of_findings():
  changes = PLANTED["far_clipped"][0] | PLANTED["skipped"][0] | PLANTED["mismatch"][0]
  found = examine(history(changes), config(200))
  assert [f.confidence for f in found] == list(ORDER)


def test_mann_kendall_by_hand():
  # 1 2 3 4: all 6 pairs rise, variance 4 * 3 * 13 / 18.
  assert mann_kendall(np.arange(4.0)) == pytest.approx(5 / np.sqrt(26 / 3))
  assert mann_kendall(-np.arange(4.0)) == -mann_kendall(np.arange(4.0))
  assert mann_kendall(np.array([1.0, 2.0])) == 0


# --- before a run ---------------------------------------------------------------------------------


def names_before(*options):
  return [f.name for f in before(build(load(TINY, [f"--config.{o}" for o in options])))]


def test_before_a_run():
  assert names_before() == []
  assert names_before("rollout.group_size=2") == ["no_groups"]
  assert names_before("algorithm.name=grpo", "algorithm.beta=1e-7") == ["idle_reference"]


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


def test_a_watcher_says_a_sure_finding_once(tmp_path):
  watcher = Watcher(config(200), "runs/a")
  said = [line for row in history(PLANTED["skipped"][0]) for line in watcher(row)]
  assert said == [
    "doctor: 100.0% of the updates were skipped: their loss or gradient was not finite, or a spike "
    "(python -m grpo_jax.doctor runs/a)"
  ]
  assert not [line for row in history({}) for line in Watcher(config(200), "x")(row)]


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
