"""Tests gradient accumulation, the metrics of parts, and micro-batches by a budget of tokens."""

import dataclasses
import types
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.masks import token_weights
from grpo_jax.learning import batch as batches
from grpo_jax.learning.batch import PER_PROMPT
from grpo_jax.learning.reduction import (
  WithinBudget,
  at_own_length,
  average,
  by_length,
  combine,
  count_micro_batches,
  group_parts,
  make_gradient,
  map_micro_batches,
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


def make_long_tailed():
  """Returns four prompts with four completions of 0 to 5 tokens."""
  lengths = np.array([[5, 1, 2, 5], [1, 2, 1, 1], [0, 3, 5, 3], [1, 1, 3, 1]])
  batch = make_batch(ref=True)
  arrays, other = batch.arrays(), {}
  for name in arrays.keys() - PER_PROMPT:
    fourth = jnp.roll(arrays[name][:, :1], 1, axis=-1)
    other[name] = jnp.concatenate([arrays[name], fourth], axis=1)
  other["mask"] = jnp.asarray(np.arange(5) < lengths[..., None])
  other["weights"] = token_weights(other["mask"], "token")
  return dataclasses.replace(batch, **other)


def test_groups_are_cut_into_parts_of_similar_lengths():
  """Two parts each. In order of their longest: 1, 1, 2, 2, 3, 3, 5, 5."""
  batch = make_long_tailed()
  assert group_parts(4, 4, 5) == 2
  ordered, restore = by_length(batch, 4)
  parts = split(ordered, 4)
  assert parts.mask.shape == (4, 2, 2, 5)
  assert parts.mask.sum(-1).max(2).tolist() == [[1, 1], [2, 2], [3, 3], [5, 5]]
  np.testing.assert_array_equal(restore(ordered.sampler_logp), batch.sampler_logp)
  # Every part has its own prompt and advantages.
  rows = {tuple(row): number for number, row in enumerate(batch.prompts.tolist())}
  for prompt, advantages in zip(ordered.prompts.tolist(), ordered.advantages.tolist(), strict=True):
    assert set(advantages) <= set(batch.advantages[rows[tuple(prompt)]].tolist())


def test_the_fields_without_an_axis_of_completions():
  """A new field of a batch must be sorted like its kind."""
  kinds = {f.name: get_args(f.type) or (f.type,) for f in dataclasses.fields(batches.Batch)}
  axes = {n: [k.dim_str for k in kind if hasattr(k, "dim_str")] for n, kind in kinds.items()}
  assert axes.pop("temperature") == []
  without = {name for name, (dims,) in axes.items() if not dims.startswith("P G")}
  # One number per prompt, or one per token.
  assert without == PER_PROMPT | {"entropy_coef", "staleness"}


def test_micro_batches_of_similar_lengths_change_nothing(monkeypatch):
  monkeypatch.setattr(batches, "SHORTEST", 1)
  assert batches.sizes(5) == [5, 3, 2, 1]
  params, algorithm, batch = MODEL.init(jax.random.key(0)), ALGORITHMS["dapo"], make_long_tailed()
  expected, metrics = step_once(params, batch, algorithm)
  updated, others = step_once(params, batch, algorithm, 4, sort_by_length=True)
  assert_trees_close(updated, expected, 1e-6)
  for key, value in metrics.items():
    np.testing.assert_allclose(others[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


def test_log_probs_come_back_in_the_order_of_the_prompts(monkeypatch):
  monkeypatch.setattr(batches, "SHORTEST", 1)
  batch, shapes = make_long_tailed(), []

  def numbers(part):
    shapes.append(part.mask.shape)
    return jnp.where(part.mask, part.sampler_logp, 0)

  expected = jnp.where(batch.mask, batch.sampler_logp, 0)
  for count in (1, 2, 4):
    actual = map_micro_batches(numbers, batch, count, sort_by_length=True)
    np.testing.assert_array_equal(actual, expected)
  assert set(shapes) == {(4, 4, 5), *((p, 2, t) for p in (2, 4) for t in (5, 3, 2, 1))}


@pytest.mark.parametrize(
  ("longest", "expected"), [(64, 64), (33, 64), (32, 32), (17, 32), (16, 16), (1, 16), (0, 16)]
)
def test_a_micro_batch_is_computed_at_the_shortest_length_that_holds_it(longest, expected):
  batch = make_batch()
  mask = jnp.zeros((4, 3, 64), bool).at[2, 1].set(jnp.arange(64) < longest)
  # A gap, such as an observation of an episode, does not end a completion.
  mask = mask.at[2, 1, : longest - 1].set(False) if longest else mask
  shapes = {name: array for name, array in batch.arrays().items() if array.ndim == 3}
  long = {name: jnp.zeros((4, 3, 64), array.dtype) for name, array in shapes.items()}
  batch = dataclasses.replace(batch, **{**long, "mask": mask})
  assert int(at_own_length(lambda part: jnp.int32(part.completions.shape[2]))(batch)) == expected


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
