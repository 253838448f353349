"""Micro-batches by a budget of tokens."""

import types

import numpy as np
import pytest

from grpo_jax.learning.reduction import WithinBudget, count_micro_batches

# prompts, tokens of each, budget, prompt_shards, least -> parts
CASES = {
  "no budget": ((12, 100, 0, 1, 1), 1),
  "no budget, but at least three": ((12, 100, 0, 1, 3), 3),
  "all at once": ((12, 100, 1200, 1, 1), 1),
  "one token too many": ((12, 100, 1199, 1, 1), 2),
  "five prompts do not divide twelve": ((12, 100, 599, 1, 1), 3),
  "a device has a third": ((12, 100, 400, 3, 1), 1),
  "and two of its four prompts at once": ((12, 100, 399, 3, 1), 2),
  "a multiple of what is asked for": ((12, 100, 500, 1, 2), 4),
  "a prompt is not cut": ((12, 100, 10, 2, 1), 6),
}


@pytest.mark.parametrize(("arguments", "parts"), CASES.values(), ids=CASES)
def test_the_number_of_parts(arguments, parts):
  prompts, tokens, budget, prompt_shards, least = arguments
  limits = {"budget": budget, "prompt_shards": prompt_shards, "least": least}
  assert count_micro_batches(prompts, tokens, **limits) == parts


def test_a_step_is_made_once_for_each_number_of_parts():
  made = []

  def make(parts):
    made.append(parts)
    return lambda state, batch, base_params: (state, parts, base_params)

  step = WithinBudget(make, budget=100, prompt_shards=1)

  def batch(prompts, n, group, t):
    return types.SimpleNamespace(prompts=np.zeros((prompts, n)), mask=np.zeros((prompts, group, t)))

  assert step("s", batch(8, 4, 2, 10), "f") == ("s", 2, "f")  # 24 tokens a prompt: four at once
  assert step("s", batch(8, 4, 2, 4), "f") == ("s", 1, "f")  # 12 tokens: eight
  assert step("s", batch(4, 9, 4, 10), None) == ("s", 2, None)  # 49 tokens: two
  assert made == [2, 1]
