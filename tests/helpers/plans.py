"""Loads a small config for the tests of the plan."""

import importlib.util

import pytest

from grpo_jax import config as configs

GIB = 2**30
TINY = [
  "--config.rollout.prompt_length=8",
  "--config.rollout.completion_length=6",
  "--config.rollout.group_size=2",
]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs pip install 'grpo_jax[plan]'"
)


def load(*overrides):
  """Returns the config of the tiny experiment with overrides, each `a.b=value`."""
  return configs.load("experiments/tiny.py", [*TINY, *(f"--config.{o}" for o in overrides)])
