"""Lengths of completions as a column on request, and the parts of `score` used elsewhere."""

import functools
import math

import numpy as np
import pytest

from grpo_jax.tasks.rewards.scoring import (
  RewardError,
  check_batch,
  check_signature,
  score,
  weighted_sum,
)

TEXTS = [["a", "bb"], ["ccc", "dd"]]


def wants_lengths(completions, completion_lengths, **columns):
  return [n + 10 * len(text) for n, text in zip(completion_lengths, completions)]


def takes_all(**columns):
  return [len(columns)] * len(columns["completions"])


def takes_what_there_is(prompts, completions, answer):
  return [1.0] * len(completions)


async def later(completion_lengths=None, **columns):
  return completion_lengths


def test_lengths_reach_the_functions_that_name_them():
  functions = {
    "wants": wants_lengths,
    "all": takes_all,
    "named": takes_what_there_is,
    "later": later,
    "partial": functools.partial(wants_lengths),
  }
  rewards = {name: (function, 1.0) for name, function in functions.items()}
  lengths = np.array([[5, 6], [7, 8]])
  _, per_name = score(rewards, ["p", "q"], TEXTS, {"answer": [0, 0]}, lengths)
  np.testing.assert_array_equal(per_name["wants"], [[15, 26], [37, 28]])
  np.testing.assert_array_equal(per_name["partial"], per_name["wants"])
  np.testing.assert_array_equal(per_name["later"], lengths)
  assert (per_name["all"] == 3).all()  # prompts, completions, answer


def test_without_lengths_only_a_default_helps():
  with pytest.raises(RewardError, match="asks for completion_lengths, which is not given"):
    score({"wants": (wants_lengths, 1.0)}, ["p", "q"], TEXTS, {})
  with pytest.raises(RewardError, match="returned NoneType"):
    score({"later": (later, 1.0)}, ["p", "q"], TEXTS, {})


def test_a_function_that_fails_on_lengths_is_shown_with_its_completion():
  def half(completion_lengths, **columns):
    return [6 / (n - 8) for n in completion_lengths]

  with pytest.raises(RewardError, match=r"ZeroDivisionError[^$]*'dd'"):
    score({"half": (half, 1.0)}, ["p", "q"], TEXTS, {}, [[5, 6], [7, 8]])


@pytest.mark.parametrize("lengths", [[[1, 2]], [[1, 2], [3]], [[1], [2]]])
def test_lengths_have_to_fit(lengths):
  with pytest.raises(ValueError, match="one number of tokens for each completion"):
    score({"all": (takes_all, 1.0)}, ["p", "q"], TEXTS, {}, lengths)


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_lengths"])
def test_columns_have_names_of_their_own(name):
  with pytest.raises(ValueError, match=f"a column may not be called '{name}'"):
    check_batch(["p", "q"], TEXTS, {name: [1, 2]})


def test_check_signature_before_there_are_lengths():
  assert check_signature("f", wants_lengths, ["completions", "answer"]) == ["completion_lengths"]
  assert check_signature("f", takes_all, ["completions"]) == []
  with pytest.raises(RewardError, match=r"'f' .* asks for answer, prompts, which is not given"):
    check_signature("f", lambda answer, prompts, **columns: [], ["completions"])
  with pytest.raises(RewardError, match=r"does not take hint: end its parameters with \*\*columns"):
    check_signature("f", takes_what_there_is, ["prompts", "completions", "answer", "hint"])


def test_weighted_sum_leaves_out_what_does_not_apply():
  nan = math.nan
  per_name = {"a": np.array([[1.0, nan, nan]]), "b": np.array([[3.0, 3.0, nan]])}
  np.testing.assert_array_equal(weighted_sum(per_name, {"a": 2.0, "b": -1.0}), [[-1, -3, nan]])
  np.testing.assert_array_equal(weighted_sum(per_name, {"a": 2.0, "b": 0.0}), [[2, nan, nan]])
