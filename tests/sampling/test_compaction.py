"""Tests compaction on random patterns against a plain statement of where each row may lie."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.sampling import compaction

fits = jax.jit(compaction.fits, static_argnums=2)


@partial(jax.jit, static_argnums=4)
def regroup(row_map, live, rows, of_prompt, shape):
  """Returns the new row map, and rows, prompts of chunks and valid rows in their new places."""
  row_map, gather = compaction.regroup(row_map, live, shape)
  return row_map, gather.rows(rows), gather.chunks(of_prompt), gather.valid


def needed(live, width):
  """Returns the number of chunks that the live rows of one shard [P, G] take."""
  return sum(-(-int(row.sum()) // width) for row in live)


def test_shapes_halve_any_number_of_rows():
  for prompts, group in ((4, 8), (1, 1), (3, 5), (50, 1), (1, 16)):
    rows = [shape.chunks * shape.width for shape in compaction.shapes(prompts, group, 30)]
    assert rows[0] == prompts * group
    assert rows[-1] == 1
    for before, after in itertools.pairwise(rows):
      assert before / 2 <= after <= before / 2 + max(group // 4, 1)
      assert after < before
  assert len(compaction.shapes(4, 8, 0)) == 1


def test_live_rows_keep_their_numbers_and_share_chunks_with_their_prompt_alone():
  prompts, group, shards = 4, 6, 3
  rng = np.random.default_rng(shards)
  for share in (0.2, 0.5):
    first, *smaller = compaction.shapes(prompts, group, 9)
    row_map = compaction.start(shards, first)
    number = np.arange(prompts * group).reshape(prompts, group)
    alive = rng.random((shards, prompts, group)) < share
    of_prompt = np.broadcast_to(np.arange(prompts), (shards, prompts)).reshape(-1)
    rows = np.broadcast_to(number, alive.shape).reshape(shards * prompts, group)
    live, width = alive.reshape(rows.shape), group
    for shape in smaller:
      room = all(needed(shard, shape.width) <= shape.chunks for shard in alive)
      assert bool(fits(row_map, jnp.asarray(live), shape)) == room
      if not room:
        continue
      row_map, *moved = regroup(row_map, *map(jnp.asarray, (live, rows, of_prompt)), shape)
      rows, of_prompt, live = map(np.asarray, moved)
      width = shape.width
      assert rows.shape == live.shape == (shards * shape.chunks, width)
      for b in range(shards):
        part = slice(b * shape.chunks, (b + 1) * shape.chunks)
        assert sorted(rows[part][live[part]]) == sorted(number[alive[b]])
        assert (rows[part] // group == of_prompt[part, None])[live[part]].all()
      original_index = np.asarray(row_map.original_index).reshape(live.shape)
      np.testing.assert_array_equal(original_index[live], rows[live])
      # Some of the rows end before the next shape.
      alive &= rng.random(alive.shape) < 0.7
      shard = np.repeat(np.arange(shards), shape.chunks)[:, None]
      live = live & alive.reshape(shards, -1)[shard, rows]


def test_rows_return_to_their_original_index():
  """Covers arrays with a leading axis, such as a stacked cache, as well."""
  live = jnp.asarray([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
  row_map = compaction.start(1, compaction.Shape(3, 4))
  values = jnp.arange(2 * 12 * 5).reshape(2, 3, 4, 5)
  row_map, gather = compaction.regroup(row_map, live, compaction.Shape(3, 1))
  small = gather.rows(values, axis=-3)
  np.testing.assert_array_equal(small[:, :, 0], values[:, [0, 2, 2], [1, 0, 3]])
  np.testing.assert_array_equal(gather.chunks(values, axis=1)[:, :, 0], values[:, [0, 2, 2], 0])
  back = compaction.scatter_rows(values[0], row_map, -small[0])
  np.testing.assert_array_equal(back, jnp.where(live[..., None], -values[0], values[0]))


def test_no_row_leaves_its_device():
  """Checks that eight devices exchange only a flag that says whether the rows fit."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  first, smaller = compaction.shapes(2, 4, 1)

  def move(live, rows):
    row_map = compaction.start(8, first)
    fits = compaction.fits(row_map, live, smaller)
    row_map, gather = compaction.regroup(row_map, live, smaller)
    small = gather.rows(rows) * 2
    return fits, small, compaction.scatter_rows(rows, row_map, small)

  live = jax.device_put(jnp.arange(64).reshape(16, 4) % 2 == 0, layout)
  rows = jax.device_put(jnp.arange(64 * 3).reshape(16, 4, 3), layout)
  compiled = jax.jit(move).lower(live, rows).compile()
  text = compiled.as_text()
  assert "all-reduce" in text
  for exchange in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert exchange not in text, exchange
  fits, small, back = compiled(live, rows)
  assert bool(fits)
  assert small.sharding.is_equivalent_to(layout, 3)
  np.testing.assert_array_equal(back, jnp.where(live[..., None], 2 * rows, rows))
