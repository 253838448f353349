"""The README's code runs, its tables name what exists, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import grpo_jax
from grpo_jax import config
from grpo_jax.models.io.families import FAMILIES
from grpo_jax.tasks import TASKS
from tests.helpers.processes import xla_flags

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
  """Returns the code blocks of a language."""
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block_of(file: str) -> str:
  """Returns the block that follows the paragraph beginning with the name of `file`."""
  pattern = rf"^`{re.escape(file)}`[^`]*?(?:`[^`\n]*`[^`]*?)*:\n\n```\w*\n(.*?)```"
  return re.search(pattern, README, re.DOTALL | re.MULTILINE).group(1)


def section(title: str) -> str:
  """Returns the text under a heading of the second level."""
  return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE).group(1)


def test_the_pure_functions_example_runs():
  example = next(block for block in blocks("python") if "import jax, jax.numpy" in block)
  scope = {}
  exec(example, scope)
  assert scope["loss"].shape == ()
  assert scope["gradient"].shape == (2, 4, 6, 5)
  assert bool((scope["gradient"][~scope["mask"]] == 0).all())
  assert bool((scope["gradient"][0][scope["mask"][0]] != 0).all())
  assert bool((scope["gradient"][1] == 0).all())  # its rewards are all equal


def test_the_loop_is_the_file_that_it_names():
  example = (ROOT / "examples" / "loop.py").read_text(encoding="utf-8")
  assert blocks("python")[1] == example, "copy examples/loop.py into the README"


def test_the_task_of_ones_own_runs(tmp_path):
  for file in ("questions.jsonl", "reward.py", "my_task.py"):
    (tmp_path / file).write_text(block_of(file), encoding="utf-8")
  environment = dict(os.environ, XLA_FLAGS=xla_flags(), PYTHONPATH=str(ROOT))
  command = re.search(r"python -m grpo_jax\.train --config my_task\.py[^\n`]*", README).group(0)
  command = command.replace("python ", f"{sys.executable} ", 1)
  small = "--config.model.source=random:tiny --config.steps=2 --config.rollout.prompts_per_step=2"
  done = subprocess.run(
    f"{command} {small}",
    shell=True,
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "after 2 steps" in done.stdout


def test_the_task_of_ones_own_is_the_experiment():
  folder = ROOT / "experiments" / "my_task"
  assert (
    (folder / "questions.jsonl").read_text(encoding="utf-8").startswith(block_of("questions.jsonl"))
  )
  scopes = [{}, {}]
  for code, scope in zip((block_of("reward.py"), (folder / "reward.py").read_text()), scopes):
    exec(code, scope)
  for scope in scopes:
    assert scope["largest"]([], [" 63", "63 59", "15"], [[59, 63, 15]] * 3) == [1.0, 0.0, 0.0]
  scope = {}
  exec(block_of("my_task.py"), scope)
  short = scope["get_config"]()
  experiment = config.load(str(ROOT / "experiments" / "my_task_jsonl.py"))
  assert short.steps == experiment.steps
  assert short.rollout == experiment.rollout
  assert short.algorithm == experiment.algorithm
  assert short.optimizer.learning_rate == experiment.optimizer.learning_rate


def test_the_table_of_algorithms_has_every_row_with_its_paper():
  rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section("Algorithms"), re.MULTILINE))
  assert list(rows) == list(grpo_jax.ALGORITHMS)
  for name, paper in rows.items():
    assert paper.strip() in grpo_jax.ALGORITHMS[name].source, name


def test_the_table_of_models_and_tasks_is_complete():
  table = section("Models, tasks, rewards").lower()
  models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
  assert "docs/models.md" in table
  for family in FAMILIES:
    assert f"`{family}`" in models, family
  for task in set(TASKS) - {"letters", "table"}:  # a smoke test; jsonl and parquet by another name
    assert f"`{task}`" in table, task


def test_the_tree_names_every_folder_of_the_package():
  tree = re.search(r"```\n(.*?)```", section("Where things are"), re.DOTALL).group(1)
  folders = {path.parent.name for path in (ROOT / "grpo_jax").glob("*/__init__.py")}
  indented = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
  assert indented == folders
  for name in re.findall(r"^(\w+)/|(?<= )(\w+)/", tree, re.MULTILINE):
    path = "".join(name)
    assert (ROOT / path).is_dir() or (ROOT / "grpo_jax" / path).is_dir(), path


def test_commands_name_modules_and_files_that_exist():
  for module in re.findall(r"python -m ((?:grpo_jax|benchmarks)[\w.]*)", README):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
  for file in re.findall(r"`((?:examples|experiments|tests)/[\w/.]+)`", README):
    assert (ROOT / file).exists(), file
  for target in re.findall(r"make ([a-z-]+)", README):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
  for target in re.findall(r"\]\(([^)#]+)\)", README):
    assert target.startswith("http") or (ROOT / target).exists(), target


def test_it_is_read_in_four_minutes():
  prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("|", " ")  # bars of tables
  assert len(prose.split()) < 1000
