"""Tests loading reward functions by name, and combining several of them with weights."""

import inspect
import math
import pickle

import pytest

from grpo_jax.tasks.rewards.graders import GRADERS
from grpo_jax.tasks.rewards.loading import (
  ExactlyOne,
  accuracy_of,
  files_of,
  load_function,
  weighted,
)


def length(prompts, completions, **columns):
  return [len(text) for text in completions]


def half(completions, **columns):
  return [0.5] * len(completions)


def needs_answer(completions, answer, **columns):
  return [1.0, 0.5, True]


def test_functions_are_loaded_by_name(tmp_path):
  (tmp_path / "good.py").write_text("def reward(**columns): ...\nlimit = 3\n")
  (tmp_path / "bad.py").write_text("import no_such_module_at_all\n")
  assert load_function(f"{tmp_path}/good.py:reward").__name__ == "reward"
  assert load_function("math:sqrt") is math.sqrt
  assert load_function(length) is length
  assert load_function("numeric") is GRADERS["numeric"]
  with pytest.raises(ValueError, match="did you mean 'reward'"):
    load_function(f"{tmp_path}/good.py:rewrad")
  with pytest.raises(ValueError, match="is of type int, not a function"):
    load_function(f"{tmp_path}/good.py:limit")
  with pytest.raises(ValueError, match="raised ModuleNotFoundError: No module named 'no_such"):
    load_function(f"{tmp_path}/bad.py:reward")
  with pytest.raises(ValueError, match="loading no_such_module raised"):
    load_function("no_such_module:reward")
  with pytest.raises(FileNotFoundError, match=r"no such file: .*missing.py"):
    load_function(f"{tmp_path}/missing.py:reward")
  with pytest.raises(ValueError, match=r"unknown grader 'numerik'.*'numeric'.*file.py:function"):
    load_function("numerik")
  with pytest.raises(ValueError, match=r"'file.py:' does not name a function"):
    load_function("file.py:")


def test_a_built_in_reward_with_settings():
  rewards = weighted(["numeric", {"name": "length", "target": 20}], [1, 0.5])
  assert list(rewards) == ["numeric", "length"]
  assert rewards["length"][0](completions=[""], completion_lengths=[15]) == [-0.25]
  with pytest.raises(ValueError, match=r"needs a 'name' too, got \{'target': 20\}"):
    weighted({"target": 20})
  with pytest.raises(ValueError, match="length"):
    weighted({"name": "length", "taget": 20})
  with pytest.raises(ValueError, match="length"):
    weighted("length")  # its setting is required


def test_accuracy_is_the_first_reward_or_the_named_one():
  rewards = weighted([half, "numeric", "exact"])
  texts, gold = ["<answer>2.0</answer>", "<answer>2</answer>", "<answer>3</answer>"], ["2"] * 3
  for accuracy, verdicts in (("numeric", [1, 1, 0]), ("exact", [0, 1, 0]), (None, [0, 0, 0])):
    function, _ = accuracy_of(rewards, accuracy)
    assert function(prompts=[""] * 3, completions=texts, answer=gold) == verdicts
  votes = {str(name): accuracy_of(rewards, name)[1] for name in ("numeric", "exact", half, None)}
  assert votes["numeric"](texts[0]) == votes["numeric"](texts[1]) != votes["numeric"](texts[2])
  assert votes["exact"](texts[0]) != votes["exact"](texts[1])
  assert votes[str(half)] is votes["None"] is None
  assert accuracy_of(weighted("numeric"))[1] is votes["numeric"]


def test_weights_are_1_by_default_and_names_are_distinct():
  assert weighted(length) == {"length": (length, 1.0)}
  assert weighted(["numeric", length], [1, 0.5]) == {
    "numeric": (GRADERS["numeric"], 1.0),
    "length": (length, 0.5),
  }
  with pytest.raises(ValueError, match="1 weights for 2 rewards"):
    weighted([length, "numeric"], [1])
  with pytest.raises(ValueError, match="two rewards have the same name"):
    weighted([length, length])
  with pytest.raises(ValueError, match="reward is empty"):
    weighted([])


def test_exactly_one_has_the_signature_of_its_function():
  accuracy = pickle.loads(pickle.dumps(ExactlyOne(needs_answer)))
  assert list(inspect.signature(accuracy).parameters) == ["completions", "answer", "columns"]
  assert accuracy(prompts=[""] * 3, completions=[""] * 3, answer=[1] * 3) == [1.0, 0.0, 1.0]


def test_the_files_of_rewards_are_listed_once():
  assert files_of([length, "a.py:f", "math:sqrt", half, "numeric", "a.py:g", None]) == (
    __file__,
    "a.py",
  )
  assert files_of("dir/b.py:f") == ("dir/b.py",)
  assert files_of({"mine": "a.py:f", "built in": "exact"}) == ("a.py",)
  assert files_of(None) == files_of(math.sqrt) == ()


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("x = 1\ndef f(:\n", r"SyntaxError: .*\n  File \".*mine\.py\", line 2\n    def f\(:"),
    ("x = 1\nraise KeyError('x')\n", r"KeyError: 'x'\n  File \".*mine\.py\", line 2, in <module>"),
    ("import sys\nsys.exit(3)\n", r"SystemExit: 3\n  File \".*mine\.py\", line 2, in <module>"),
  ],
)
def test_a_file_that_cannot_be_loaded_shows_its_line(tmp_path, source, words):
  (tmp_path / "mine.py").write_text(source)
  with pytest.raises(ValueError, match=words):
    load_function(f"{tmp_path}/mine.py:f")


def test_messages_are_for_functions_of_the_user_and_keep_their_names():
  def brief(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]

  rewards = weighted([brief, "exact", {"name": "format"}], completions="messages")
  assert list(rewards) == ["brief", "exact", "format"]
  texts = {"completions": ["a", "bb"]}
  assert rewards["brief"][0](**texts) == [1.0, 2.0]
  assert rewards["exact"][0](**texts, answer=["a", "a"]) == [1.0, 0.0]
  accuracy, answer = accuracy_of(rewards, None, "messages")
  assert (accuracy(**texts), answer) == ([1.0, 0.0], None)
  names = list(inspect.signature(rewards["brief"][0]).parameters)
  assert (names[0], names[-1]) == ("completions", "columns")
  assert {"completion_ids", "trainer_state", "log_extra", "log_metric"} < set(names)
