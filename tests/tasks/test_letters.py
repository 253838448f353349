"""Tests the task of lower-case letters."""

import pytest

from grpo_jax.tasks import make_task, score


def test_the_reward_is_the_fraction_of_letters():
  task = make_task("letters")
  texts = [["ab", "a b", "aB3!", "ä", ""]]
  assert score(task.rewards, ["0:"], texts, {})[0].tolist() == [[1.0, 2 / 3, 0.25, 0.0, 0.0]]
  accuracy, _ = score({"accuracy": (task.accuracy, 1.0)}, ["0:"], texts, {})
  assert accuracy.tolist() == [[1, 0, 0, 0, 0]]


def test_the_answer_is_the_whole_completion():
  task = make_task("letters")
  assert [task.answer(text) for text in (" ab ", "", "a b")] == ["ab", None, "a b"]


def test_no_prompt_is_in_both_splits():
  task = make_task("letters", train_size=3, eval_size=2)
  prompts = {name: [example.prompt for example in split] for name, split in task.splits.items()}
  assert prompts == {"train": ["0:", "1:", "2:"], "eval": ["3:", "4:"]}


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"eval_size": -1}])
def test_sizes_out_of_range(sizes):
  with pytest.raises(ValueError, match="need at least 1 and 0"):
    make_task("letters", **sizes)
