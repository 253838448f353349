"""Tests how arrays are folded into shards; the loops over tiles are tested where they are used."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.tiles import check_head, fold_head, fold_rows, row_shards_of


def test_a_single_shard_has_no_axis():
  hidden, head = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(24.0).reshape(4, 6)
  rows, axes = row_shards_of(hidden, None, 1)
  assert rows is None
  assert fold_rows(hidden, rows, axes).shape == (6, 4)
  assert fold_head(head, 1).shape == (6, 4)
  _, axes = row_shards_of(hidden, None, 3)
  assert fold_rows(hidden, rows, axes).shape == (3, 2, 4)
  assert fold_head(head, 2).shape == (2, 3, 4)
  np.testing.assert_array_equal(fold_head(head, 2)[1], head.T[3:])


def test_rows_that_are_not_computed_are_zero():
  hidden = jnp.full((1, 3, 2), jnp.nan).at[0, 1].set(5.0)
  rows, axes = row_shards_of(hidden, np.array([[False, True, False]]), 1)
  assert fold_rows(hidden, rows, axes).tolist() == [[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"^vocab_shards must divide the vocabulary of 6, got 4"):
    check_head(jnp.zeros((3, 2)), jnp.zeros((2, 6)), 1.0, None, 4)
  with pytest.raises(ValueError, match=r"^row_shards must divide the 3 rows, got 2"):
    row_shards_of(jnp.zeros((3, 2)), None, 2)
