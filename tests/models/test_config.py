"""Tests the descriptions of models as values: hashable, changed by copies, documented whole."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from grpo_jax.models import config
from grpo_jax.models.config import ModelConfig, RopeScaling

SMALL = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6)


def test_a_config_imports_only_the_standard_library():
  tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
  modules = {
    name
    for node in ast.walk(tree)
    if isinstance(node, ast.Import | ast.ImportFrom)
    for name in (
      [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    )
  }
  assert modules == {"dataclasses", "math", "typing"}


def test_configs_of_the_same_model_are_one_static_argument():
  """jit caches programs by equality and hash of static arguments."""
  scaling = RopeScaling("linear", 2.0)
  first, second = (dataclasses.replace(SMALL, rope_scaling=scaling) for _ in range(2))
  assert first == second
  assert hash(first) == hash(second)
  assert first != SMALL
  assert SMALL.rope_scaling is None


def test_a_config_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    SMALL.width = 5


@pytest.mark.parametrize("kind", [ModelConfig, RopeScaling])
def test_every_field_is_documented(kind):
  section = inspect.getdoc(kind).split("Attributes:")[1]
  documented = re.findall(r"^ {2}(\w+): ", section, re.MULTILINE)
  assert documented == [field.name for field in dataclasses.fields(kind)]
