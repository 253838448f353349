"""Tests that every experiment loads and takes one step, with a tiny model in place of its own."""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import config as configs
from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.export import export_model
from grpo_jax.models.load import open_weights
from grpo_jax.run.metrics import read_metrics
from grpo_jax.tasks import make_task
from tests.helpers.model_files import UNTIED

EXPERIMENTS = sorted(Path("experiments").glob("*.py"))
# One of each kind; a step of each of the others is a slow test.
QUICK = ("my_task_jsonl", "smollm2_calculator")
TINY = "random:tiny"
# Overrides that make a run small; all other fields are those of the experiment.
SMALL = [
  "--config.model.source=random:tiny",
  "--config.model.dtype=float32",
  "--config.steps=1",
  "--config.rollout.prompts_per_step=16",
  "--config.train.micro_batches=1",
  "--config.rollout.group_size=2",
  "--config.rollout.prompt_length=0",
  "--config.rollout.completion_length=4",
  "--config.eval.batch_prompts=8",
  "--config.log.samples=0",
  "--config.rewards.workers=0",
]
SIZES = {
  "gsm8k": ["--config.task.settings.jsonl=tests/data/gsm8k", "--config.task.settings.eval_size=4"],
  "countdown": [
    "--config.task.settings.train_size=40",
    "--config.task.settings.eval_size=4",
  ],
  "reasoning_gym": [
    "--config.task.settings.train_size=40",
    "--config.task.settings.eval_size=4",
  ],
  "jsonl": [],
  "code": [],
  "guess_number": [
    "--config.rollout.completion_length=24",
    "--config.task.settings.ranges=2",
    "--config.task.settings.eval_fraction=0.5",
  ],
  "letters": ["--config.task.settings.eval_size=4"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
  """Returns the folder of a tiny reward model with the context of random:tiny."""
  folder, weights = tmp_path_factory.mktemp("reward") / "model", open_weights(TINY).with_score()
  score = np.ones(weights.shapes["score"].shape, np.float32)
  export_model(weights.config, weights.read() | {"score": score}, TINY, folder, pad_id=256)
  return folder


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory):
  """Returns the folder of a tiny model whose chat template shows tools, as Qwen3's does."""
  folder = tmp_path_factory.mktemp("tools") / "model"
  shutil.copytree(UNTIED, folder)
  template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  thought = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
  shown = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
  (folder / "chat_template.jinja").write_text(shown + template + thought, encoding="utf-8")
  settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  settings["max_position_embeddings"] = 2048
  (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
  return folder


@pytest.mark.parametrize(
  "path",
  [
    path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow)
    for path in EXPERIMENTS
  ],
  ids=lambda path: path.stem,
)
def test_an_experiment_takes_a_step(path, tmp_path, data_dir, reward_model, model_with_tools):
  experiment = load(str(path))
  task, sizes = experiment.task, [*SIZES[experiment.task.name]]
  if task.name == "gsm8k":
    sizes.append(f"--config.task.settings.data_dir={data_dir}")
  if task.settings.get("tool_settings", {}).get("format") == "hermes":
    sizes.append(f"--config.model.source={model_with_tools}")
  if experiment.rollout.given:
    sizes.append("--config.rollout.group_size=1")  # the column holds one completion
  if experiment.episode.turn_length:
    sizes += ["--config.episode.turn_length=0", "--config.episode.observation_length=0"]
  if experiment.reward_model.source:
    sizes.append(f"--config.reward_model.source={reward_model}")
  if experiment.teacher.source:
    sizes.append(f"--config.teacher.source={TINY}")
  config = load(str(path), SMALL + sizes)
  results = train.run(config, tmp_path)
  row = next(row for row in read_metrics(tmp_path) if "loss" in row)
  assert row["step"] == 0
  assert math.isfinite(row["loss"])
  assert results["eval/n"] >= 4
  assert row["num_tokens"] > 64


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_docstring_names_hardware_and_command(path):
  text = path.read_text(encoding="utf-8").split('"""')[1]
  assert "Hardware" in text
  assert f"--config experiments/{path.name} --workdir" in text


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_batch_divides_over_the_hardware_of_the_docstring(path):
  text = path.read_text(encoding="utf-8").split('"""')[1]
  hardware = text[text.index("Hardware") : text.index("Time")]
  mesh = re.findall(r"--config\.mesh\.\S+=-?\d+", hardware)
  assert configs.check(load(str(path)), 1) == []
  for chips in map(int, re.findall(r"v5e-(\d+)", hardware)):
    options = [m for m in mesh if m[-1] != "8" or chips == 8]
    assert configs.check(load(str(path), options), chips) == []


@pytest.mark.slow
def test_a_learned_reward_stands_beside_the_true_one(tmp_path, reward_model):
  """PPO, as the docstring says, with a critic that starts from the reward model."""
  config = load("experiments/smollm2_learned_reward.py", [
    *SMALL, f"--config.reward_model.source={reward_model}", "--config.algorithm.name=ppo",
    f"--config.critic.source={reward_model}",
  ])  # fmt: skip
  train.run(config, tmp_path)
  row = next(row for row in read_metrics(tmp_path) if "loss" in row)
  assert row["reward"] == row["rewards/reward_model/mean"] != 0
  assert row["rewards/shorter_correct/mean"] == 0
  assert math.isfinite(row["critic/loss"])


def test_the_pairs_of_the_learned_reward_are_decided_by_its_rule(monkeypatch):
  folder = Path("experiments/shorter_wins")
  monkeypatch.syspath_prepend(folder)
  scope = runpy.run_path(str(folder / "make_pairs.py"))
  pairs, questions = scope["make_rows"]()
  for name, rows in (("pairs", pairs), ("questions", questions)):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
  reward = runpy.run_path(str(folder / "reward.py"))["shorter_correct"]
  sums = [tuple(map(int, re.findall(r"(\d+) \+ (\d+)\nA:$", r["prompt"])[0])) for r in pairs]
  chosen, rejected = (
    reward([], [row[name] for row in pairs], [a + b for a, b in sums])
    for name in ("chosen", "rejected")
  )
  assert all(high > low for high, low in zip(chosen, rejected))
  assert min(chosen) > 0  # correct
  assert 0.2 < sum(low > 0 for low in rejected) / len(pairs) < 0.4  # correct and longer
  assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in questions}
  assert reward([], [" 46", " 12 plus 34 is 46.", "46 or 47", "no", "4" * 99], [46] * 5) == [
    1 - 2 / 80, 1 - 17 / 80, 0, 0, 0,
  ]  # fmt: skip


@pytest.mark.parametrize("program", sorted(Path("experiments").glob("*/make_*.py")), ids=str)
def test_a_file_of_problems_is_what_its_program_writes(program, tmp_path):
  for file in program.parent.glob("*.py"):
    shutil.copy(file, tmp_path)
  subprocess.run([sys.executable, str(tmp_path / program.name)], check=True)
  written = sorted(tmp_path.glob("*.jsonl"))
  assert written
  for file in written:
    assert file.read_bytes() == (program.parent / file.name).read_bytes()


@pytest.mark.parametrize(
  ("name", "held_out"), [("calculator", 100), ("functions", 116), ("guess_number", 77)]
)
def test_no_problem_of_an_episode_demo_is_in_both_splits(name, held_out):
  task = load(f"experiments/smollm2_{name}.py").task
  splits = make_task(task.name, **task.settings).splits
  prompts = [{example.prompt for example in split} for split in splits.values()]
  assert not prompts[0] & prompts[1]
  assert len(splits["eval"]) == held_out  # as docs/results.md says


def test_a_lora_experiment_trains_only_its_adapters():
  overrides = [*SMALL, "--config.task.name=letters", "--config.lora.rank=2"]
  run = build(load("experiments/tiny.py", overrides))
  state, base_params = run.initial_state(), run.base_params
  assert all("lora" in jax.tree_util.keystr(path)
             for path, _ in jax.tree_util.tree_leaves_with_path(state.params))  # fmt: skip
  assert set(base_params) == {"embed", "layers", "final_norm"}
