"""Rows moved together: against a plain statement of what may lie where, on random patterns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.sampling import compaction


def needed(live, width):
  """Chunks that the rows of one block [P, G] take."""
  return sum(-(-int(row.sum()) // width) for row in live)


def test_shapes_halve_the_rows_whatever_their_number():
  for prompts, group in ((4, 8), (1, 1), (3, 5), (50, 1), (1, 16)):
    rows = [one.chunks * one.width for one in compaction.shapes(prompts, group, 30)]
    assert rows[0] == prompts * group
    assert rows[-1] == 1
    for before, after in itertools.pairwise(rows):
      assert before / 2 <= after <= before / 2 + max(group // 4, 1)
      assert after < before
  assert len(compaction.shapes(4, 8, 0)) == 1


def test_living_rows_keep_their_numbers_and_share_chunks_with_their_prompt_alone():
  prompts, group, blocks = 4, 6, 3
  rng = np.random.default_rng(blocks)
  for share in (0.2, 0.5):
    first, *smaller = compaction.shapes(prompts, group, 9)
    places = compaction.start(blocks, first)
    number = np.arange(prompts * group).reshape(prompts, group)
    alive = rng.random((blocks, prompts, group)) < share
    of_prompt = np.broadcast_to(np.arange(prompts), (blocks, prompts)).reshape(-1)
    rows = np.broadcast_to(number, alive.shape).reshape(blocks * prompts, group)
    live, width = alive.reshape(rows.shape), group
    for shape in smaller:
      room = all(needed(block, shape.width) <= shape.chunks for block in alive)
      assert bool(compaction.fits(places, jnp.asarray(live), shape)) == room
      if not room:
        continue
      places, moved = compaction.regroup(places, jnp.asarray(live), shape)
      rows = np.asarray(moved.rows(jnp.asarray(rows)))
      of_prompt = np.asarray(moved.chunks(jnp.asarray(of_prompt)))
      live, width = np.asarray(moved.taken), shape.width
      assert rows.shape == live.shape == (blocks * shape.chunks, width)
      for b in range(blocks):
        part = slice(b * shape.chunks, (b + 1) * shape.chunks)
        assert sorted(rows[part][live[part]]) == sorted(number[alive[b]])
        assert (rows[part] // group == of_prompt[part, None])[live[part]].all()
      home = np.asarray(places.home).reshape(live.shape)
      np.testing.assert_array_equal(home[live], rows[live])
      # Some of the rows end before the next shape.
      alive &= rng.random(alive.shape) < 0.7
      block = np.repeat(np.arange(blocks), shape.chunks)[:, None]
      live = live & alive.reshape(blocks, -1)[block, rows]


def test_rows_come_back_where_they_were():
  """Arrays with a leading axis too, as a stacked cache has one."""
  live = jnp.asarray([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
  places = compaction.start(1, compaction.Shape(3, 4))
  values = jnp.arange(2 * 12 * 5).reshape(2, 3, 4, 5)
  places, moved = compaction.regroup(places, live, compaction.Shape(3, 1))
  small = moved.rows(values, axis=-3)
  np.testing.assert_array_equal(small[:, :, 0], values[:, [0, 2, 2], [1, 0, 3]])
  np.testing.assert_array_equal(moved.chunks(values, axis=1)[:, :, 0], values[:, [0, 2, 2], 0])
  back = compaction.put_home(values[0], places, -small[0])
  np.testing.assert_array_equal(back, jnp.where(live[..., None], -values[0], values[0]))


def test_no_row_leaves_its_device():
  """The compiled move of a batch cut over eight devices exchanges nothing but the decision."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  first, smaller = compaction.shapes(2, 4, 1)

  def move(live, rows):
    places = compaction.start(8, first)
    fits = compaction.fits(places, live, smaller)
    places, moved = compaction.regroup(places, live, smaller)
    small = moved.rows(rows) * 2
    return fits, small, compaction.put_home(rows, places, small)

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
