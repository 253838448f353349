"""Tests gradient accumulation, the metrics of parts, and micro-batches by a budget of tokens."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.learning.reduction import (
  WithinBudget,
  average,
  combine,
  count_micro_batches,
  make_gradient,
  split,
)
from tests.helpers.learning import MODEL, assert_trees_close, make_batch, step_once

# --- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing(name, micro_batches):
  params, algorithm = MODEL.init(jax.random.key(0)), ALGORITHMS[name]
  batch = make_batch(ref=True, average=algorithm.average)
  expected, metrics = step_once(params, batch, algorithm)
  updated, part_metrics = step_once(params, batch, algorithm, micro_batches)
  assert_trees_close(updated, expected, 1e-6)
  assert set(metrics) == set(part_metrics)
  for key, value in metrics.items():
    np.testing.assert_allclose(part_metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


def test_a_micro_batch_takes_a_share_of_every_device():
  """Splits rows 0 to 7 of two devices, four each: each half has two rows of each device."""
  parts = split(jnp.arange(8), 2)
  np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_the_accumulated_gradient_by_hand():
  """Loss w sum(a): gradient 1 + 2 + 3 + 4; metrics are weighted by 3 and 1 of 4 tokens."""
  batch = types.SimpleNamespace(mask=jnp.array([[[1, 1]], [[1, 0]], [[1, 0]], [[0, 0]]], bool))
  leaves = {"a": jnp.arange(1.0, 5.0), "mask": batch.mask}

  @jax.tree_util.register_pytree_node_class
  class Part:
    def __init__(self, a, mask):
      self.a, self.mask = a, mask

    def tree_flatten(self):
      return (self.a, self.mask), None

    @classmethod
    def tree_unflatten(cls, _, children):
      return cls(*children)

  def loss(w, part, _):
    return w * part.a.sum(), {"first": part.a[0], "first/max": part.a[0]}

  grads, value, metrics = make_gradient(loss, 2)(jnp.float32(0.5), Part(**leaves), None)
  assert (float(grads), float(value)) == (10.0, 5.0)
  # Rows 0 and 2 have 3 tokens, rows 1 and 3 have 1; their first entries are 1 and 2.
  assert float(metrics["first"]) == 0.75 * 1 + 0.25 * 2
  assert float(metrics["first/max"]) == 2.0


# --- metrics --------------------------------------------------------------------------------------


def test_extremes_leave_out_micro_batches_without_tokens():
  """The mesh decides how many micro-batches are padding alone; these report a minimum of 0."""
  metrics = {"ratio/min": jnp.array([0.0, 0.5, 0.75]), "gap/max": jnp.array([9.0, -2.0, -1.0])}
  combined = combine(metrics, jnp.array([0.0, 0.25, 0.75]))
  assert {k: float(v) for k, v in combined.items()} == {"ratio/min": 0.5, "gap/max": -1.0}
  empty = combine(metrics, jnp.zeros(3))
  assert {k: float(v) for k, v in empty.items()} == {"ratio/min": 0.0, "gap/max": 9.0}


def test_combine_weights_by_tokens():
  metrics = {
    "kl": jnp.array([1.0, 4.0]),
    "x/max": jnp.array([3.0, 2.0]),
    "x/min": jnp.array([3.0, 2.0]),
  }
  combined = combine(metrics, jnp.array([0.25, 0.75]))
  expected = {"kl": 3.25, "x/max": 3.0, "x/min": 2.0}
  assert {name: float(value) for name, value in combined.items()} == expected


def test_metrics_of_several_updates():
  """Means, extremes, and the number of skipped updates."""
  updates = [
    {"kl": jnp.float32(1), "x/max": jnp.float32(2), "update/skipped": 1.0},
    {"kl": 3.0, "x/max": 1.0, "update/skipped": 1.0},
  ]
  expected = {"kl": 2.0, "x/max": 2.0, "update/skipped": 2.0}
  assert {name: float(value) for name, value in average(updates).items()} == expected


# --- the budget of tokens -------------------------------------------------------------------------

# prompts, tokens of each, budget, prompt_shards, least -> number of micro-batches
CASES = {
  "no budget": ((12, 100, 0, 1, 1), 1),
  "no budget, but at least three": ((12, 100, 0, 1, 3), 3),
  "all at once": ((12, 100, 1200, 1, 1), 1),
  "one token too many": ((12, 100, 1199, 1, 1), 2),
  "five prompts do not divide twelve": ((12, 100, 599, 1, 1), 3),
  "a device has a third": ((12, 100, 400, 3, 1), 1),
  "two of its four prompts at once": ((12, 100, 399, 3, 1), 2),
  "a multiple of the least": ((12, 100, 500, 1, 2), 4),
  "a prompt is not cut": ((12, 100, 10, 2, 1), 6),
}


@pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES)
def test_the_number_of_micro_batches(arguments, expected):
  prompts, tokens, budget, prompt_shards, least = arguments
  limits = {"budget": budget, "prompt_shards": prompt_shards, "least": least}
  assert count_micro_batches(prompts, tokens, **limits) == expected


def test_a_step_is_made_once_for_each_number_of_micro_batches():
  counts = []

  def make(count):
    counts.append(count)
    return lambda state, batch, base_params: (state, count, base_params)

  step = WithinBudget(make, budget=100, prompt_shards=1)

  def batch(prompts, n, group, t):
    return types.SimpleNamespace(prompts=np.zeros((prompts, n)), mask=np.zeros((prompts, group, t)))

  assert step("s", batch(8, 4, 2, 10), "f") == ("s", 2, "f")  # 24 tokens a prompt: four at once
  assert step("s", batch(8, 4, 2, 4), "f") == ("s", 1, "f")  # 12 tokens: eight
  assert step("s", batch(4, 9, 4, 10), None) == ("s", 2, None)  # 49 tokens: two
  assert counts == [2, 1]


def test_the_step_for_a_shape_can_be_lowered():
  """The plan compiles it without running it."""
  step = WithinBudget(
    lambda count: jax.jit(lambda scale, batch: scale * count * batch.weights),
    budget=24,
    prompt_shards=1,
  )
  batch = make_batch()  # 4 prompts of 4 + 3 * 5 = 19 tokens: one at a time
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
  compiled = step.lower(jnp.float32(1), shapes).compile()
  np.testing.assert_array_equal(compiled(jnp.float32(1), batch), 4 * batch.weights)
  assert step.trace(jnp.float32(1), shapes).jaxpr.out_avals[0].shape == batch.weights.shape
