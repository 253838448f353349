"""Mutants of `grpo_jax/core`, and the explanations of those that no test can notice."""

import ast
from pathlib import Path

from tools.mutants_explained import EXPLAINED
from tools.mutations import Apply, find_mutants


def test_every_explanation_is_of_a_mutant():
  core = Path(__file__).parents[2] / "grpo_jax" / "core"
  keys = {mutant.key for file in core.glob("*.py") for mutant in find_mutants(file)}
  assert {(place, change) for place in EXPLAINED for change in EXPLAINED[place]} <= keys


def test_a_mutant_is_one_change(tmp_path):
  file = tmp_path / "f.py"
  file.write_text('def f(x: "a") -> int:\n  """Doc."""\n  return stop_gradient(x) + 2\n')
  changed = [ast.unparse(Apply(m).visit(ast.parse(file.read_text()))) for m in find_mutants(file)]
  assert [text.splitlines()[-1].strip() for text in changed] == [
    "return stop_gradient(x) - 2",
    "return x + 2",
    "return stop_gradient(x) + 3",
    "return stop_gradient(x) + -2",
  ]
