"""Splits whose examples are made when asked for."""

import pytest

from grpo_jax.tasks.indexed import Indexed, shuffled


def test_only_what_is_asked_for_is_made():
  made = []

  def make(i):
    made.append(i)
    return 10 * i

  items = Indexed(make, [4, 2, 7, 5])
  assert (len(items), len(items[1:]), made) == (4, 3, [])
  assert (items[0], items[-1], made) == (40, 50, [4, 5])
  assert list(items[1:][:2]) == [20, 70]
  assert made == [4, 5, 2, 7]
  assert list(Indexed(items.__getitem__, [3, 0])) == [50, 40]  # a selection of a selection
  with pytest.raises(IndexError):
    items[4]


def test_shuffled_depends_on_the_seed_and_has_every_index_once():
  orders = [shuffled(50, seed) for seed in range(5)]
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert len(set(map(tuple, orders))) == 5
  assert shuffled(0, 3) == []
