"""Tests how reward functions are called, what they may return, and the errors they cause."""

import asyncio
import functools
import json
import math

import numpy as np
import pytest

from grpo_jax.tasks.base import Task
from grpo_jax.tasks.rewards import scoring
from grpo_jax.tasks.rewards.loading import ExactlyOne
from grpo_jax.tasks.rewards.scorer import score_in_process
from grpo_jax.tasks.rewards.scoring import (
  RewardError,
  check_batch,
  check_signature,
  score,
  show_completion,
  weighted_sum,
)

TEXTS = [["a", "bb"], ["ccc", "dd"]]


def length(prompts, completions, **columns):
  return [len(text) for text in completions]


def right(prompts, completions, answer, **columns):
  return [None if a is None else text == a for text, a in zip(completions, answer)]


def picky(completions, **columns):
  return [1 / len(text) for text in completions]


async def async_picky(completions, **columns):
  await asyncio.sleep(0)
  return [1 / len(text) for text in completions]


# --- what a function gets and returns -------------------------------------------------------------


def test_score_is_the_weighted_sum_of_the_rewards_that_apply():
  rewards = {"length": (length, 0.5), "right": (right, 2.0)}
  total, per_name = score(
    rewards, ["p", "q"], [["a", "bb", ""], ["a", "b", "ccc"]], {"answer": ["bb", None]}
  )
  np.testing.assert_array_equal(per_name["length"], [[1, 2, 0], [1, 1, 3]])
  np.testing.assert_array_equal(per_name["right"], [[0, 1, 0], [math.nan] * 3])
  np.testing.assert_array_equal(total, [[0.5, 3.0, 0.0], [0.5, 0.5, 1.5]])
  assert total.dtype == np.float64


def test_functions_get_one_value_per_completion_prompt_by_prompt():
  arguments = {}

  def record(**columns):
    arguments.update(columns)
    return [0.0] * len(columns["completions"])

  score({"record": (record, 1.0)}, ["p", "q"], [["a", "b"], ["c", "d"]], {"n": [1, 2]})
  assert arguments == {
    "prompts": ["p", "p", "q", "q"],
    "completions": ["a", "b", "c", "d"],
    "n": [1, 1, 2, 2],
  }


def test_total_is_nan_where_no_weighted_reward_applies():
  def never(completions, **columns):
    return [None, float("nan")]

  total, _ = score({"never": (never, 1.0)}, ["p"], [["a", "b"]], {})
  assert np.isnan(total).all()
  rewards = {"never": (never, 1.0), "unweighted": (length, 0.0)}
  total, per_name = score(rewards, ["p"], [["a", "b"]], {})
  assert np.isnan(total).all()
  np.testing.assert_array_equal(per_name["unweighted"], [[1, 1]])


def test_rewards_may_be_real_numbers_of_any_type():
  def mixed(completions, **columns):
    return (True, 2, np.float32(0.5), np.bool_(False), np.int64(3), np.array(4.0))

  total, _ = score({"mixed": (mixed, 1.0)}, ["p"], [["x"] * 6], {})
  np.testing.assert_array_equal(total, [[1, 2, 0.5, 0, 3, 4]])
  total, _ = score({"array": (lambda **columns: np.arange(6.0), 1.0)}, ["p"], [["x"] * 6], {})
  np.testing.assert_array_equal(total, [[0, 1, 2, 3, 4, 5]])


def test_async_functions_run_concurrently_and_inside_a_running_loop():
  running, most = 0, 0

  async def judge(completions, **columns):
    nonlocal running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.01)
    running -= 1
    return [len(text) for text in completions]

  rewards = {"one": (judge, 1.0), "two": (judge, 10.0), "plain": (length, 100.0)}
  total, _ = score(rewards, ["p"], [["a", "bb"]], {})
  np.testing.assert_array_equal(total, [[111, 222]])
  assert most == 2

  async def notebook():
    return score(rewards, ["p"], [["a", "bb"]], {})[0]

  np.testing.assert_array_equal(asyncio.run(notebook()), [[111, 222]])


def test_no_completions_give_an_empty_result():
  total, per_name = score({"f": (length, 1.0)}, [], [], {})
  assert total.shape == per_name["f"].shape == (0, 0)


def test_weighted_sum_leaves_out_rewards_that_do_not_apply():
  nan = math.nan
  per_name = {"a": np.array([[1.0, nan, nan]]), "b": np.array([[3.0, 3.0, nan]])}
  np.testing.assert_array_equal(weighted_sum(per_name, {"a": 2.0, "b": -1.0}), [[-1, -3, nan]])
  np.testing.assert_array_equal(weighted_sum(per_name, {"a": 2.0, "b": 0.0}), [[2, nan, nan]])


# --- lengths, for the functions that name them ----------------------------------------------------


def needs_lengths(completions, completion_lengths, **columns):
  return [n + 10 * len(text) for n, text in zip(completion_lengths, completions)]


def count_columns(**columns):
  return [len(columns)] * len(columns["completions"])


def three_names(prompts, completions, answer):
  return [1.0] * len(completions)


async def optional_lengths(completion_lengths=None, **columns):
  return completion_lengths


def test_lengths_are_passed_to_the_functions_that_name_them():
  functions = {
    "needs": needs_lengths,
    "all": count_columns,
    "three": three_names,
    "optional": optional_lengths,
    "partial": functools.partial(needs_lengths),
  }
  rewards = {name: (function, 1.0) for name, function in functions.items()}
  lengths = np.array([[5, 6], [7, 8]])
  _, per_name = score(rewards, ["p", "q"], TEXTS, {"answer": [0, 0]}, lengths)
  np.testing.assert_array_equal(per_name["needs"], [[15, 26], [37, 28]])
  np.testing.assert_array_equal(per_name["partial"], per_name["needs"])
  np.testing.assert_array_equal(per_name["optional"], lengths)
  assert (per_name["all"] == 3).all()  # prompts, completions, answer


def test_a_function_that_requires_lengths_fails_without_them():
  with pytest.raises(RewardError, match="requires completion_lengths, which is not available"):
    score({"needs": (needs_lengths, 1.0)}, ["p", "q"], TEXTS, {})
  with pytest.raises(RewardError, match="returned NoneType"):
    score({"optional": (optional_lengths, 1.0)}, ["p", "q"], TEXTS, {})


def test_a_function_that_fails_on_lengths_is_shown_with_its_completion():
  def raises_at_8(completion_lengths, **columns):
    return [6 / (n - 8) for n in completion_lengths]

  with pytest.raises(RewardError, match=r"ZeroDivisionError[^$]*'dd'"):
    score({"f": (raises_at_8, 1.0)}, ["p", "q"], TEXTS, {}, [[5, 6], [7, 8]])


@pytest.mark.parametrize("lengths", [[[1, 2]], [[1, 2], [3]], [[1], [2]]])
def test_lengths_must_have_the_shape_of_the_completions(lengths):
  with pytest.raises(ValueError, match="one number of tokens for each completion"):
    score({"all": (count_columns, 1.0)}, ["p", "q"], TEXTS, {}, lengths)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([1.0], "returned 1 values for 2 completions"),
    ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
    ([0.0, "1.0"], "str '1.0' at position 1"),
    ([0.0, 1j], "complex 1j at position 1"),
    ([0.0, [1.0]], r"list \[1.0\] at position 1"),
    ([0.0, np.array([1.0])], "ndarray"),
    ([0.0, math.inf], "float inf at position 1"),
    ([0.0, 10**400], "int 1000"),
    (0.5, "returned float 0.5"),
    ("ab", "returned str 'ab'"),
    ({0: 1.0, 1: 1.0}, "returned dict"),
    (None, "returned NoneType"),
    ({1.0, 2.0}, "returned set"),
    ((x for x in (0.0, 1.0)), "returned generator"),
    ({"a": 1.0, "b": 2.0}.values(), "returned dict_values"),
    (b"ab", "returned bytes"),
    (np.zeros((2, 1)), r"returned an array of shape \(2, 1\)"),
    (np.zeros((1, 2)), r"returned an array of shape \(1, 2\)"),
    (np.float32(0.5), r"returned an array of shape \(\)"),
    (np.zeros(3), "returned 3 values for 2 completions"),
    ([[0.0, 1.0]], "returned 1 values for 2 completions"),
    ([0.0, 10**5000], "int that cannot be shown at position 1"),
    ([0.0, np.str_("1")], "str_ .* at position 1"),
  ],
)
@pytest.mark.parametrize("accuracy", [False, True])
def test_a_bad_result_names_the_function_and_shows_a_completion(values, message, accuracy):
  def mine(completions, **columns):
    return values

  scorer = score_in_process(Task("t", {}, {"mine": (mine, 1.0)}, ExactlyOne(mine)))
  with pytest.raises(RewardError, match=message) as caught:
    # An evaluation comes first, and calls the accuracy alone.
    scorer(["what?"], [["good", "bad"]], {}, rewards=not accuracy)
  assert "number" in str(caught.value)
  assert "reward function 'mine'" in str(caught.value)
  assert "test_scoring.py" in str(caught.value)
  assert "'what?'" in str(caught.value)
  if isinstance(values, list) and len(values) == 2:
    assert "'bad'" in str(caught.value)


@pytest.mark.parametrize("function", [picky, async_picky])
def test_an_exception_shows_the_completion_that_raises_it(function):
  completions = [["aa", "bb", "cc"], ["dd", "ee", "ff"], ["gg", "", "hh"]]
  with pytest.raises(RewardError, match="raised ZeroDivisionError: division by zero") as caught:
    score({"picky": (function, 1.0)}, ["one", "two", "three"], completions, {})
  assert str(caught.value).endswith("  prompt:     'three'\n  completion: ''")
  assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_shows_the_users_own_lines_once():
  """Frames of this package, of json and of asyncio are left out; those of the user are in order."""

  def parsed(text):
    return json.loads(text)["score"]

  def plain(completions, **columns):
    return [parsed(text) for text in completions]

  async def waits(completions, **columns):
    return [parsed(text) for text in completions]

  for function in (plain, waits, functools.partial(plain), ExactlyOne(plain)):
    with pytest.raises(RewardError) as caught:
      score({"mine": (function, 1.0)}, ["p"], [['{"score": 1}', "{"]], {})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("reward function 'mine' raised JSONDecodeError: ")
    files = [line for line in lines if line.startswith("  File ")]
    assert all("test_scoring.py" in line for line in files)
    assert files[-1].endswith("in parsed")
    assert sum('return json.loads(text)["score"]' in line for line in lines) == 1
    assert lines[-1] == "  completion: '{'"


def test_a_slow_function_that_raises_is_not_called_on_and_on(monkeypatch):
  monkeypatch.setattr(scoring, "BISECT_SECONDS", 0.0)
  calls = []

  def judge(completions, **columns):
    calls.append(completions)
    raise TimeoutError("no answer")

  with pytest.raises(RewardError, match="one of 8 completions raises it"):
    score({"judge": (judge, 1.0)}, ["p"], [list("abcdefgh")], {})
  assert len(calls) == 1


def test_an_exception_that_only_the_whole_batch_raises():
  def whole(completions, **columns):
    assert len(completions) < 4
    return [0.0] * len(completions)

  with pytest.raises(RewardError, match="no completion raises it alone") as caught:
    score({"whole": (whole, 1.0)}, ["p"], [["a", "b", "c", "d"]], {})
  assert "completion: 'a'" in str(caught.value)


def test_a_failing_function_leaves_no_coroutine_unawaited(recwarn):
  with pytest.raises(RewardError):
    score({"a": (async_picky, 1.0), "b": (picky, 1.0)}, ["p"], [[""]], {})
  assert not [w for w in recwarn if "never awaited" in str(w.message)]


def test_a_signature_that_does_not_fit_the_columns():
  with pytest.raises(RewardError, match="requires answer, which is not available"):
    score({"right": (right, 1.0)}, ["p"], [["a"]], {"anwser": ["a"]})
  with pytest.raises(RewardError, match=r"does not accept extra, prompts: .*\*\*columns"):
    score({"f": (lambda completions: [0.0], 1.0)}, ["p"], [["a"]], {"extra": [1]})


def test_signatures_can_be_checked_before_there_are_lengths():
  assert check_signature("f", needs_lengths, ["completions", "answer"]) == ["completion_lengths"]
  assert check_signature("f", count_columns, ["completions"]) == []
  with pytest.raises(RewardError, match=r"'f' .* requires answer, prompts, which is not available"):
    check_signature("f", lambda answer, prompts, **columns: [], ["completions"])
  with pytest.raises(RewardError, match=r"does not accept hint: end its parameters with \*\*colu"):
    check_signature("f", three_names, ["prompts", "completions", "answer", "hint"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (({}, ["p"], [["a"]], {}), "rewards is empty"),
    (({"f": (length, math.nan)}, ["p"], [["a"]], {}), "weight of reward 'f' is nan"),
    (({"f": (length, 1.0)}, ["p"], [["a"], ["b"]], {}), "1 prompts but 2 lists"),
    (({"f": (length, 1.0)}, ["p", "q"], [["a"], ["b", "c"]], {}), r"got \[1, 2\]"),
    (({"f": (length, 1.0)}, ["p"], [["a"]], {"n": [1, 2]}), "column 'n' has 2 values for 1"),
    (({"f": (length, 1.0)}, ["p"], [["a"]], {"prompts": [1]}), "must not be called 'prompts'"),
  ],
)
def test_inconsistent_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    score(*arguments)


@pytest.mark.parametrize("name", scoring.RESERVED)
def test_columns_must_not_have_the_names_of_other_arguments(name):
  with pytest.raises(ValueError, match=f"a column must not be called '{name}'"):
    check_batch(["p", "q"], TEXTS, {name: [1, 2]})


def test_long_texts_are_shown_without_their_middle():
  prompt, completion = show_completion("p" * 1000, "c" * 398).split("\n")
  assert prompt == f"  prompt:     '{'p' * 199} ... {'p' * 199}'"
  assert completion == f"  completion: '{'c' * 398}'"  # 400 characters with its quotes


@pytest.mark.parametrize("value", [3e38, -3e38, 1e16])
def test_rewards_that_float32_statistics_cannot_hold_are_refused(value):
  def extreme(prompts, completions, **columns):
    return [value] * len(completions)

  with pytest.raises(RewardError, match=r"extreme.*a finite number of at most 1e\+15"):
    score({"extreme": (extreme, 1.0)}, ["p"], [["a"]], {})
