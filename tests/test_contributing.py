"""CONTRIBUTING.md names files, `make` targets and headings that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def anchor(heading: str) -> str:
  """Returns the anchor that GitHub and myst give a heading."""
  return re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def test_every_path_exists():
  paths = set(re.findall(r"`((?:grpo_jax|tests|tools|docs|experiments|examples)[\w/.]*)`", TEXT))
  assert {"grpo_jax/core", "tests/run/test_checkpoint.py", "experiments"} <= paths
  modules = {path for path in paths if "/" not in path and "." in path}  # grpo_jax.config
  for module in modules:
    paths.remove(module)
    name = ".".join(module.split(".")[:2]).replace(".", "/")
    assert (ROOT / f"{name}.py").exists() or (ROOT / name).exists(), module
  assert not {path for path in paths if not (ROOT / path).exists()}


def test_every_make_target_exists():
  targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", TEXT, re.MULTILINE))
  named = {first or second for first, second in targets}
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  defined = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
  assert {"check", "test", "test-matrix"} <= named
  assert named <= defined
  assert defined <= set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


def test_the_eight_errands_lead_to_their_steps():
  links = re.findall(r"\]\((docs/[\w.]+)(?:#([\w-]+))?\)", TEXT)
  assert len([link for link in links if link[1]]) == 8
  for file, section in links:
    text = (ROOT / file).read_text(encoding="utf-8")
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    assert not section or section in map(anchor, headings), (file, section)
