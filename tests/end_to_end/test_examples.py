"""The programs in examples/ run as they stand and learn."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.run.compilation import Watch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
  spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def gain(rewards):
  """Mean reward of the last five steps less that of the first five."""
  return np.mean(rewards[-5:]) - np.mean(rewards[:5])


def test_the_loop_learns():
  assert gain(load("loop").train()) > 0.3


@pytest.mark.slow
def test_the_loop_with_a_kl_term_and_two_updates_learns():
  rewards, kl = load("loop_kl").train()
  assert gain(rewards) > 0.2
  assert 0 < kl[0] < 1  # the mean of two updates: none at the first, which starts at the reference
  assert kl[-1] > 2 * kl[0]


@pytest.mark.parametrize("name", ["jax", "nnx", "equinox"])
def test_the_bandit_learns(name):
  bandit = load("bandit")
  assert gain(bandit.learn(*bandit.POLICIES[name](), steps=60)) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_model_of_ones_own_learns(name):
  own = load("bring_your_model")
  assert gain(own.train(own.MODELS[name])) > 0.2


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step_of_the_loop():
  loop = load("loop")
  loop.train(steps=1)  # and what belongs to no loop
  counts = []
  for steps in (1, 2):
    with Watch() as watch:
      loop.train(steps=steps)
    counts.append(watch.programs)
  assert counts[0] == counts[1] > 0
