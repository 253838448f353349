"""The README's code is run: the pure functions, and a task of one's own from the files it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path("README.md").read_text(encoding="utf-8")


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def named(file):
  """The block that follows the line naming `file`."""
  pattern = rf"^`{re.escape(file)}`[^`]*?(?:`[^`\n]*`[^`]*?)*:\n\n```\w*\n(.*?)```"
  return re.search(pattern, README, re.DOTALL | re.MULTILINE).group(1)


def test_the_pure_functions_example_runs():
  example = next(block for block in blocks("python") if "import grpo_jax" in block)
  scope = {}
  exec(example, scope)
  assert scope["loss"].shape == ()
  assert scope["gradient"].shape == (2, 4, 6, 5)
  assert bool((scope["gradient"][~scope["mask"]] == 0).all())


def test_the_task_of_ones_own_runs(tmp_path):
  for file in ("questions.jsonl", "reward.py", "my_task.py"):
    (tmp_path / file).write_text(named(file), encoding="utf-8")
  environment = dict(os.environ, XLA_FLAGS="", PYTHONPATH=str(Path.cwd()))
  command = re.search(r"python -m grpo_jax\.train --config my_task\.py[^\n`]*", README).group(0)
  command = command.replace("python ", f"{sys.executable} ", 1)
  small = "--config.model.source=random:tiny --config.steps=2 --config.rollout.completion_length=4"
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


def test_the_file_tree_names_every_module():
  for file in Path("grpo_jax").rglob("*.py"):
    if file.name != "__init__.py":
      assert file.name in README, f"{file} is missing from the README's tree"
  for file in Path("experiments").glob("*.py"):
    assert file.name in README, f"{file} is missing from the README"


def test_links_lead_somewhere():
  for target in re.findall(r"\]\(([^)#]+)\)", README):
    assert target.startswith("http") or Path(target).exists(), target
