"""Tests how batches are cut, padded, trimmed and reordered, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.batch import SHORTEST, Batch, mini_batches, select, sizes, trim
from tests.helpers.learning import MODEL, assert_trees_close, make_batch, step_once


def numbered():
  """Returns a batch whose advantages are numbered, so that they tell the prompts apart."""
  return dataclasses.replace(make_batch(), advantages=jnp.arange(12.0).reshape(4, 3))


def wide_batch():
  """Returns 3 prompts (up to 17 of 40 tokens), each with 2 completions (up to 30 of 100)."""
  prompt_tokens, lengths = np.array([17, 5, 9]), np.array([[30, 2], [1, 8], [29, 29]])
  rng = np.random.default_rng(0)
  mask = np.arange(100) < lengths[..., None]
  batch = Batch(
    prompts=jnp.asarray(rng.integers(1, 9, (3, 40)), jnp.int32),
    prompt_mask=jnp.asarray(np.arange(40) >= 40 - prompt_tokens[:, None]),
    completions=jnp.asarray(rng.integers(1, 9, mask.shape), jnp.int32),
    mask=jnp.asarray(mask),
    advantages=jnp.ones((3, 2)),
    weights=jnp.asarray(mask, jnp.float32),
    sampler_logp=jnp.zeros(mask.shape),
    temperature=0.7,
  )
  return batch, prompt_tokens, lengths


def test_the_arrays_of_a_batch():
  batch = make_batch(temperature=0.7)
  assert set(batch.arrays()) == {
    "prompts", "prompt_mask", "completions", "mask", "advantages", "weights", "sampler_logp",
  }  # fmt: skip
  assert batch.arrays()["mask"] is batch.mask
  assert Batch(**batch.arrays()).temperature is None
  assert "ref_logp" in make_batch(ref=True).arrays()


def test_the_temperature_is_not_an_array():
  """It survives `jax.tree.map`, and each temperature compiles its own program."""
  batch = make_batch(temperature=0.7)
  assert len(jax.tree.leaves(batch)) == 7
  assert jax.tree.map(lambda a: a[:2], batch).temperature == 0.7
  temperatures = []
  step = jax.jit(lambda batch: temperatures.append(batch.temperature))
  for temperature in (0.7, 0.7, 1.0):
    step(make_batch(temperature=temperature))
  assert temperatures == [0.7, 1.0]


def test_selected_prompts_are_padded_with_masked_ones():
  batch = numbered()
  selected = select(batch, np.array([3, 1]), 3)
  assert selected.mask.shape[0] == 3
  np.testing.assert_array_equal(selected.advantages[:2], batch.advantages[np.array([3, 1])])
  np.testing.assert_array_equal(selected.completions[2], batch.completions[0])
  np.testing.assert_array_equal(selected.mask[:2], batch.mask[np.array([3, 1])])
  assert not selected.mask[2].any()
  assert not selected.weights[2].any()
  assert (np.asarray(selected.weights[:2]) > 0).any()


@pytest.mark.parametrize(
  ("rows", "multiple", "expected"), [(0, 2, 2), (1, 1, 1), (2, 2, 2), (3, 2, 4)]
)
def test_the_number_of_selected_prompts(rows, multiple, expected):
  assert select(numbered(), np.arange(rows), multiple).mask.shape[0] == expected


def test_trimming_cuts_what_no_row_uses():
  batch, prompt_tokens, lengths = wide_batch()
  trimmed, padding = trim(batch, prompt_tokens, lengths)
  assert trimmed.prompts.shape == (3, 20)  # 40, 20: 17 tokens are used
  assert trimmed.mask.shape == (3, 2, 50)  # 100, 50, 25: 30 tokens are used
  np.testing.assert_array_equal(trimmed.prompts, batch.prompts[:, 20:])
  np.testing.assert_array_equal(trimmed.completions, batch.completions[..., :50])
  np.testing.assert_array_equal(trimmed.mask.sum(-1), lengths)
  np.testing.assert_array_equal(trimmed.advantages, batch.advantages)
  assert trimmed.temperature == 0.7
  # 31 prompt tokens and 99 completion tokens, of 3 prompts with 20 + 2 * 50 tokens
  np.testing.assert_allclose(padding, 1 - (31 + 99) / (3 * 120))


def test_a_batch_that_uses_its_room_is_returned_as_it_is():
  batch, prompt_tokens, lengths = wide_batch()
  same, padding = trim(batch, prompt_tokens + 20, lengths + 60)
  assert same is batch
  assert padding < 0.5


def test_sizes_are_halvings_down_to_the_shortest():
  assert sizes(1024) == [1024, 512, 256, 128]
  assert sizes(SHORTEST) == [SHORTEST]
  assert sizes(2 * SHORTEST - 1) == [2 * SHORTEST - 1, SHORTEST]


def test_mini_batches_are_the_batch_in_a_new_order():
  batch = numbered()
  parts = list(mini_batches(batch, 2, 2, (0, 7)))
  assert [part.mask.shape[0] for part in parts] == [2] * 4
  prompts = [np.asarray(part.advantages[:, 0] // 3).astype(int).tolist() for part in parts]
  assert sorted(prompts[0] + prompts[1]) == sorted(prompts[2] + prompts[3]) == [0, 1, 2, 3]
  for part, rows in zip(parts, prompts):
    np.testing.assert_array_equal(part.completions, batch.completions[np.array(rows)])
    np.testing.assert_array_equal(part.weights, 2 * batch.weights[np.array(rows)])

  def orders(seed):
    return [np.asarray(p.advantages).tolist() for p in mini_batches(batch, 2, 2, seed)]

  assert orders((0, 7)) == orders((0, 7))
  assert len({str(orders((0, step))) for step in range(6)}) > 1
  assert next(mini_batches(batch, 1, 1, (0, 7))) is batch


def test_any_integer_is_a_seed():
  """NumPy refuses negative ones, and would do so in the middle of the first rollout."""
  batch, orders = numbered(), []
  for seed in (-1, 2**64 - 2, 5, 2**70):
    parts = list(mini_batches(batch, 2, 1, (seed, 0)))
    orders.append([float(a) for part in parts for a in np.asarray(part.advantages)[:, 0]])
  assert len(orders) == 4
  assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_the_mean_of_the_mini_batches_is_the_update_of_the_whole():
  params, batch = MODEL.init(jax.random.key(0)), make_batch(average="token")
  whole, _ = step_once(params, batch, ALGORITHMS["dapo"])
  parts = [
    step_once(params, part, ALGORITHMS["dapo"])[0] for part in mini_batches(batch, 2, 1, (0, 1))
  ]
  assert_trees_close(jax.tree.map(lambda a, b: (a + b) / 2, *parts), whole, 1e-6)


def test_weights_of_right_answers_are_cut_padded_and_multiplied_with_the_others():
  batch = numbered()
  batch = dataclasses.replace(batch, nll_weights=0.5 * batch.weights)
  for part in mini_batches(batch, 2, 1, (0, 7)):
    np.testing.assert_array_equal(part.nll_weights, 0.5 * part.weights)
  few = select(batch, np.array([2]), 2)
  np.testing.assert_array_equal(few.nll_weights, 0.5 * few.weights)
  assert few.nll_weights[0].any()
  assert not few.nll_weights[1].any()
  batch, prompt_tokens, lengths = wide_batch()
  batch = dataclasses.replace(batch, nll_weights=batch.weights)
  trimmed, _ = trim(batch, prompt_tokens, lengths)
  assert trimmed.nll_weights.shape == trimmed.mask.shape != batch.mask.shape


def test_the_sharding_stays():
  layout = meshes.batch_sharding(meshes.make_mesh((2, 1, 1), jax.devices()[:2]))
  batch = jax.device_put(numbered(), layout)
  parts = [select(batch, np.array([0, 3]), 2), *mini_batches(batch, 2, 1, (0, 0))]
  for part in parts:
    for name, array in part.arrays().items():
      assert array.sharding.is_equivalent_to(layout, array.ndim), name


@pytest.mark.parametrize(("epochs", "count"), [(1, 2), (2, 3)])
def test_mini_batches_do_not_depend_on_the_number_of_empty_prompts(epochs, count):
  """The padding of a batch grows with the mesh; which prompts go together must not."""
  real = 7

  def order(size):
    batch = Batch(
      prompts=jnp.arange(size)[:, None],
      prompt_mask=jnp.ones((size, 1), bool),
      completions=jnp.zeros((size, 2, 3), jnp.int32),
      mask=jnp.broadcast_to((jnp.arange(size) < real)[:, None, None], (size, 2, 3)),
      advantages=jnp.ones((size, 2)),
      weights=jnp.ones((size, 2, 3)),
      sampler_logp=jnp.zeros((size, 2, 3)),
    )
    parts = mini_batches(batch, count, epochs, (0, 5))
    return [np.asarray(p.prompts[np.asarray(p.mask).any((1, 2))])[:, 0].tolist() for p in parts]

  small, large = order(12), order(24)
  assert small == large
  assert len(small) == epochs * count
  for epoch in range(epochs):
    own = [number for part in small[epoch * count : (epoch + 1) * count] for number in part]
    assert sorted(own) == list(range(real))
