"""Tests the errors for unknown names and settings, and the names that have moved elsewhere."""

import pytest

from grpo_jax.tasks import base
from grpo_jax.tasks.base import check_settings, unknown_name
from grpo_jax.tasks.rewards import scoring


def test_an_unknown_name_gives_close_matches_and_all_names():
  error = unknown_name("reward", "exat", ["score", "exact"])
  assert str(error) == "unknown reward 'exat': did you mean 'exact'? Known (2): exact, score"
  assert str(unknown_name("thing", "zzz", ["b", "a"])) == "unknown thing 'zzz'. Known (2): a, b"


def test_a_long_table_is_listed_only_without_a_close_match():
  names = [f"name_{i}" for i in range(41)]
  assert str(unknown_name("thing", "name_", names)).endswith("? (41 are known)")
  assert "name_17" in str(unknown_name("thing", "zzz", names))


def test_settings_are_those_of_the_function():
  def make(required, *, optional=1): ...

  check_settings("task 'x'", make, {"required": 1})
  check_settings("task 'x'", make, {"required": 1, "optional": 2})
  with pytest.raises(ValueError, match="unknown setting of task 'x' 'optionel': did you mean 'opt"):
    check_settings("task 'x'", make, {"required": 1, "optionel": 2})
  with pytest.raises(ValueError, match="task 'x' needs the setting 'required', which was not"):
    check_settings("task 'x'", make, {"optional": 2})


def test_moved_names_can_still_be_imported():
  from grpo_jax.tasks.base import RewardError, check_batch, check_signature, score, weighted_sum

  for item in (RewardError, check_batch, check_signature, score, weighted_sum):
    assert item is getattr(scoring, item.__name__)
  with pytest.raises(AttributeError, match="has no attribute 'scroe'"):
    base.scroe  # noqa: B018
