"""Tests building tasks by name."""

import pytest

from grpo_jax.tasks import make_task, reasoning_gym, score
from grpo_jax.tasks.rewards import scoring


def test_a_task_is_built_by_name_with_its_settings():
  task = make_task("letters", train_size=7)
  assert (task.name, len(task.splits["train"])) == ("letters", 7)
  assert score is scoring.score


def test_unknown_names_and_settings_are_errors_with_suggestions():
  with pytest.raises(
    ValueError, match=r"unknown task 'jsonnl'.*'jsonl'.*gsm8k, guess_number, jsonl"
  ):
    make_task("jsonnl")
  with pytest.raises(ValueError, match=r"unknown setting of task .* 'train_sise'.*'train_size'"):
    make_task("reasoning_gym", dataset="chain_sum", train_sise=3)
  with pytest.raises(ValueError, match="task 'jsonl' needs the setting 'path'"):
    make_task("jsonl", reward="a.py:f")


def test_settings_are_checked_before_the_task_is_built(monkeypatch):
  monkeypatch.setattr(reasoning_gym, "_draw_splits", None)  # calling it would fail
  with pytest.raises(ValueError, match="unknown setting"):
    make_task("reasoning_gym", dataset="chain_sum", sed=3)
