"""Tests sequences that create their items on access."""

import pytest

from grpo_jax.tasks.indexed import Indexed, shuffled


def test_items_are_created_on_access_only():
  created = []

  def make(i):
    created.append(i)
    return 10 * i

  items = Indexed(make, [4, 2, 7, 5])
  assert (len(items), len(items[1:]), created) == (4, 3, [])
  assert (items[0], items[-1], created) == (40, 50, [4, 5])
  assert list(items[1:][:2]) == [20, 70]
  assert created == [4, 5, 2, 7]
  assert list(Indexed(items.__getitem__, [3, 0])) == [50, 40]  # a selection of a selection
  with pytest.raises(IndexError):
    items[4]


def test_shuffled_is_a_permutation_that_depends_on_the_seed():
  orders = [shuffled(50, seed) for seed in range(5)]
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert len(set(map(tuple, orders))) == 5
  assert shuffled(0, 3) == []
