"""How rewards are called and what their mistakes look like; reasoning-gym problems, their split."""

import asyncio
import math

import numpy as np
import pytest

from grpo_jax.tasks import RewardError, make_task, score
from grpo_jax.tasks.base import unknown
from grpo_jax.tasks.reasoning_gym import extract_number

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TWO_DIGITS = ONE_DIGIT | {"min_digits": 2, "max_digits": 2}


def gym(**settings):
  settings = {"dataset": "chain_sum", "config": ONE_DIGIT, "train_size": 80} | settings
  return make_task("reasoning_gym", **({"eval_size": 70} | settings))


def keys(task, split):
  return [example.key for example in task.splits[split]]


# score


def length(prompts, completions, **columns):
  return [len(text) for text in completions]


def right(prompts, completions, answer, **columns):
  return [None if a is None else text == a for text, a in zip(completions, answer)]


def test_score_is_the_weighted_sum_of_what_applies():
  rewards = {"length": (length, 0.5), "right": (right, 2.0)}
  total, per_name = score(
    rewards, ["p", "q"], [["a", "bb", ""], ["a", "b", "ccc"]], {"answer": ["bb", None]}
  )
  np.testing.assert_array_equal(per_name["length"], [[1, 2, 0], [1, 1, 3]])
  np.testing.assert_array_equal(per_name["right"], [[0, 1, 0], [math.nan] * 3])
  np.testing.assert_array_equal(total, [[0.5, 3.0, 0.0], [0.5, 0.5, 1.5]])
  assert total.dtype == np.float64


def test_rewards_get_one_entry_per_completion_prompt_by_prompt():
  seen = {}

  def look(**columns):
    seen.update(columns)
    return [0.0] * len(columns["completions"])

  score({"look": (look, 1.0)}, ["p", "q"], [["a", "b"], ["c", "d"]], {"n": [1, 2]})
  assert seen == {
    "prompts": ["p", "p", "q", "q"],
    "completions": ["a", "b", "c", "d"],
    "n": [1, 1, 2, 2],
  }


def test_not_scored_is_nan_and_a_weight_of_zero_scores_nothing():
  def nothing(completions, **columns):
    return [None, float("nan")]

  total, _ = score({"none": (nothing, 1.0)}, ["p"], [["a", "b"]], {})
  assert np.isnan(total).all()
  total, per_name = score({"none": (nothing, 1.0), "watch": (length, 0.0)}, ["p"], [["a", "b"]], {})
  assert np.isnan(total).all()
  np.testing.assert_array_equal(per_name["watch"], [[1, 1]])


def test_numbers_of_any_real_kind():
  def kinds(completions, **columns):
    return (True, 2, np.float32(0.5), np.bool_(False), np.int64(3), np.array(4.0))

  total, _ = score({"kinds": (kinds, 1.0)}, ["p"], [["x"] * 6], {})
  np.testing.assert_array_equal(total, [[1, 2, 0.5, 0, 3, 4]])
  total, _ = score({"array": (lambda **columns: np.arange(6.0), 1.0)}, ["p"], [["x"] * 6], {})
  np.testing.assert_array_equal(total, [[0, 1, 2, 3, 4, 5]])


def test_async_rewards_run_together_and_inside_a_running_loop():
  waiting, most = 0, 0

  async def judge(completions, **columns):
    nonlocal waiting, most
    waiting += 1
    most = max(most, waiting)
    await asyncio.sleep(0.01)
    waiting -= 1
    return [len(text) for text in completions]

  rewards = {"one": (judge, 1.0), "two": (judge, 10.0), "plain": (length, 100.0)}
  total, _ = score(rewards, ["p"], [["a", "bb"]], {})
  np.testing.assert_array_equal(total, [[111, 222]])
  assert most == 2

  async def notebook():
    return score(rewards, ["p"], [["a", "bb"]], {})[0]

  np.testing.assert_array_equal(asyncio.run(notebook()), [[111, 222]])


@pytest.mark.parametrize(
  ("values", "says"),
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
  ],
)
def test_a_wrong_result_names_the_function_and_shows_a_completion(values, says):
  with pytest.raises(RewardError, match=says) as caught:
    score({"mine": (lambda **columns: values, 1.0)}, ["what?"], [["good", "bad"]], {})
  assert "reward function 'mine'" in str(caught.value)
  assert "test_tasks.py" in str(caught.value)
  assert "'what?'" in str(caught.value)
  if isinstance(values, list) and len(values) == 2:
    assert "'bad'" in str(caught.value)


def picky(completions, **columns):
  return [1 / len(text) for text in completions]


async def async_picky(completions, **columns):
  await asyncio.sleep(0)
  return [1 / len(text) for text in completions]


@pytest.mark.parametrize("function", [picky, async_picky])
def test_an_exception_shows_the_completion_that_raises_it(function):
  completions = [["aa", "bb", "cc"], ["dd", "ee", "ff"], ["gg", "", "hh"]]
  with pytest.raises(RewardError, match="raised ZeroDivisionError: division by zero") as caught:
    score({"picky": (function, 1.0)}, ["one", "two", "three"], completions, {})
  assert str(caught.value).endswith("  prompt:     'three'\n  completion: ''")
  assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_needs_the_whole_batch():
  def whole(completions, **columns):
    assert len(completions) < 4
    return [0.0] * len(completions)

  with pytest.raises(RewardError, match="no completion raises it alone") as caught:
    score({"whole": (whole, 1.0)}, ["p"], [["a", "b", "c", "d"]], {})
  assert "completion: 'a'" in str(caught.value)


def test_a_signature_that_does_not_fit():
  with pytest.raises(RewardError, match="asks for answer, which is not given"):
    score({"right": (right, 1.0)}, ["p"], [["a"]], {"anwser": ["a"]})
  with pytest.raises(RewardError, match=r"does not take extra, prompts: .*\*\*columns"):
    score({"f": (lambda completions: [0.0], 1.0)}, ["p"], [["a"]], {"extra": [1]})


def test_a_sync_failure_leaves_no_coroutine_behind(recwarn):
  with pytest.raises(RewardError):
    score({"a": (async_picky, 1.0), "b": (picky, 1.0)}, ["p"], [[""]], {})
  assert not [w for w in recwarn if "never awaited" in str(w.message)]


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (({}, ["p"], [["a"]], {}), "rewards is empty"),
    (({"f": (length, math.nan)}, ["p"], [["a"]], {}), "weight of reward 'f' is nan"),
    (({"f": (length, 1.0)}, ["p"], [["a"], ["b"]], {}), "1 prompts but 2 lists"),
    (({"f": (length, 1.0)}, ["p", "q"], [["a"], ["b", "c"]], {}), r"got \[1, 2\]"),
    (({"f": (length, 1.0)}, ["p"], [["a"]], {"n": [1, 2]}), "column 'n' has 2 values for 1"),
    (({"f": (length, 1.0)}, ["p"], [["a"]], {"prompts": [1]}), "may not be called 'prompts'"),
  ],
)
def test_arguments_that_do_not_fit(arguments, says):
  with pytest.raises(ValueError, match=says):
    score(*arguments)


def test_no_completions_is_an_empty_result():
  total, per_name = score({"f": (length, 1.0)}, [], [], {})
  assert total.shape == per_name["f"].shape == (0, 0)


# names


def test_an_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r"unknown task 'jsonnl'.*'jsonl'.*gsm8k, jsonl, letters"):
    make_task("jsonnl")
  with pytest.raises(ValueError, match=r"unknown setting of task .* 'train_sise'.*'train_size'"):
    gym(train_sise=3)
  with pytest.raises(ValueError, match="task 'jsonl' needs the setting 'path'"):
    make_task("jsonl", reward="a.py:f")
  with pytest.raises(ValueError, match=r"'chain_sun': did you mean 'chain_sum'.*\(105 are known\)"):
    gym(dataset="chain_sun")
  assert "Known (2): a, b" in str(unknown("thing", "zzz", ["b", "a"]))


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    ({"config": {"max_digit": 1}}, "'max_digits'"),
    ({"config": {"min_digits": 0}}, "min_digits must be positive"),
    ({"config": {"seed": 1}}, "sets 'seed': use train_size, eval_size and seed"),
    ({"format": "chatt"}, "did you mean 'chat'"),
    ({"reward": "exakt"}, "did you mean 'exact'"),
    ({"train_size": 0}, "train_size is 0"),
    ({"shots": -1}, "shots is -1"),
    ({"system": "be brief"}, "format='chat'"),
    ({"dataset": None}, "either dataset"),
    ({"mixture": [{"dataset": "products"}]}, "either dataset"),
    ({"dataset": None, "mixture": [{"dataset": "products"}]}, "each entry has its own config"),
    ({"dataset": None, "config": None, "mixture": [{"name": "products"}]}, "'name'"),
    ({"dataset": None, "config": None, "mixture": [{"weight": 1}]}, "no 'dataset'"),
    (
      {"dataset": None, "config": None, "mixture": [{"dataset": "products", "weight": 0}]},
      "weight of products is 0",
    ),
  ],
)
def test_wrong_settings_of_reasoning_gym(settings, says):
  with pytest.raises(ValueError, match=says):
    gym(**settings)


# reasoning-gym


def test_completion_prompts_are_solved_lines_and_an_open_one():
  task = gym()
  for example in task.splits["eval"]:
    *shots, asked = example.prompt.split("\n")
    assert len(shots) == 2
    for line in shots:
      left, right_side = line.split(" = ")
      assert eval(left) == int(right_side)
    left = asked.removesuffix(" =")
    assert example.key == (" + ".join(sorted(left.split(" + "))) if "+" in left else left)
    assert eval(example.key) == int(example.columns["answer"])
  assert task.stop == ("\n",)


def test_questions_without_arithmetic_are_asked_as_questions():
  task = gym(dataset="gsm_symbolic", config=None, train_size=3, eval_size=2, shots=1)
  example = task.splits["train"][0]
  shot, asked = example.prompt.split("\n\n")
  assert shot.startswith("Q: ")
  assert "\nA: " in shot
  assert asked == f"Q: {example.columns['question']}\nA:"
  assert example.key == " ".join(example.columns["question"].split())


def test_an_expression_that_is_the_answer_is_not_shown():
  task = gym(dataset="countdown", config=None, train_size=5, eval_size=5, shots=0)
  for example in task.splits["train"]:
    assert example.columns["entry"]["metadata"]["expression"] not in example.prompt


def test_chat_prompts():
  task = gym(format="chat", system="Be brief.", shots=1, train_size=1, eval_size=1)
  example = task.splits["eval"][0]
  assert [message["role"] for message in example.prompt] == ["system", "user", "assistant", "user"]
  assert example.prompt[0]["content"] == "Be brief."
  assert example.prompt[-1]["content"] == example.columns["question"]
  assert example.prompt[1]["content"] != example.columns["question"]
  assert task.stop == ()
  example = gym(format="chat").splits["eval"][0]
  assert example.prompt == [{"role": "user", "content": example.columns["question"]}]


def test_answers_of_several_lines_need_chat():
  with pytest.raises(ValueError, match="format='chat'"):
    gym(dataset="mini_sudoku", config=None, train_size=1, eval_size=1)
  task = gym(dataset="mini_sudoku", config=None, train_size=1, eval_size=1, format="chat")
  example = task.splits["train"][0]
  total, _ = score(
    task.rewards,
    [example.prompt],
    [[example.columns["answer"], "1 2"]],
    {name: [value] for name, value in example.columns.items()},
  )
  np.testing.assert_array_equal(total, [[1, 0]])


def test_no_problem_is_in_both_splits_or_among_the_shots():
  for seed in range(3):
    # 155 problems exist: 100 differences, 55 sums (3 + 4 and 4 + 3 are one). 83 + 70 + 2 shots is
    # all of them.
    task = gym(seed=seed, train_size=83)
    train, held_out = keys(task, "train"), keys(task, "eval")
    shots = [line.split(" =")[0] for line in task.splits["eval"][0].prompt.split("\n")[:2]]
    shown = {" + ".join(sorted(shot.split(" + "))) for shot in shots}
    assert len(set(train)) == 83
    assert len(set(held_out)) == 70
    assert not set(train) & set(held_out)
    assert len(shown) == 2
    assert not shown & (set(train) | set(held_out))


def test_a_sum_in_the_other_order_is_the_same_problem():
  task = gym(keep=r"\d \+ \d", train_size=23, eval_size=30)  # all 55 sums of two digits
  asked = [
    {frozenset(example.prompt.split("\n")[-1].removesuffix(" =").split(" + ")) for example in split}
    for split in task.splits.values()
  ]
  assert sum(map(len, asked)) == 53
  assert not asked[0] & asked[1]


def test_keep_takes_the_problems_that_match_as_a_whole():
  task = gym(keep=r"[0-4] - \d", train_size=20, eval_size=10, shots=0)
  for example in (*task.splits["train"], *task.splits["eval"]):
    assert example.key[0] in "01234"
    assert example.key[1:4] == " - "
  with pytest.raises(ValueError, match=r"keep is '\(', which is not a regular expression"):
    gym(keep="(")


def test_the_split_holds_across_a_mixture_whose_parts_overlap():
  mixture = [
    {"dataset": "chain_sum", "weight": 1, "config": ONE_DIGIT},
    {"dataset": "chain_sum", "weight": 3, "config": ONE_DIGIT | {"max_digits": 2}},
  ]
  task = gym(dataset=None, config=None, mixture=mixture, train_size=200, eval_size=40)
  train, held_out = keys(task, "train"), keys(task, "eval")
  assert len(set(train)) == 200
  assert len(set(held_out)) == 40
  assert not set(train) & set(held_out)


def test_a_mixture_has_its_shares_evenly_spread():
  mixture = [
    {"dataset": "chain_sum", "weight": 3, "config": TWO_DIGITS},
    {"dataset": "products", "weight": 1, "config": {"min_digits": 2, "max_digits": 2}},
  ]
  task = gym(dataset=None, config=None, mixture=mixture, train_size=41, eval_size=40)
  names = [example.columns["dataset"] for example in task.splits["eval"]]
  assert names.count("chain_sum") == 30
  for start in range(0, 40, 8):
    assert names[start : start + 8].count("products") == 2
  assert len(task.splits["train"]) == 41
  assert task.name == "reasoning_gym:chain_sum+products"
  for example in task.splits["train"]:
    sign = "*" if example.columns["dataset"] == "products" else ("+", "-")
    assert all(any(s in line for s in sign) for line in example.prompt.split("\n"))


def test_too_few_problems_says_how_many_there_are():
  with pytest.raises(ValueError, match=r"only 155 distinct problems, and 172 are needed \(2 shots"):
    gym(train_size=100)
  with pytest.raises(ValueError, match="only 155 distinct problems"):
    gym(eval_size=3000, train_size=1)
  mixture = [
    {"dataset": "chain_sum", "config": TWO_DIGITS},
    {"dataset": "products", "config": {"min_digits": 1, "max_digits": 1}},
  ]
  with pytest.raises(ValueError, match="products with these settings has only 55 distinct"):
    gym(dataset=None, config=None, mixture=mixture, train_size=400, eval_size=20)


def test_the_same_settings_give_the_same_problems_and_another_seed_others():
  def drawn(**settings):
    return [example.prompt for split in gym(**settings).splits.values() for example in split]

  assert drawn() == drawn()
  assert drawn(config=TWO_DIGITS) != drawn(config=TWO_DIGITS, seed=1)


def test_a_larger_training_split_keeps_evaluation_and_its_own_beginning():
  small = gym(config=TWO_DIGITS, train_size=50)
  large = gym(config=TWO_DIGITS, train_size=500)
  assert small.splits["eval"] == large.splits["eval"]
  assert keys(small, "train") == keys(large, "train")[:50]


def test_a_few_thousand_problems_are_distinct():
  assert len(set(keys(gym(config=TWO_DIGITS, train_size=4000), "train"))) == 4000


def graded(task, example, *completions):
  columns = {name: [value] for name, value in example.columns.items()}
  total, _ = score(task.rewards, [example.prompt], [list(completions)], columns)
  accuracy, _ = score(
    {"accuracy": (task.accuracy, 1.0)}, [example.prompt], [list(completions)], columns
  )
  return total[0].tolist(), accuracy[0].tolist()


def test_part_of_the_credit_only_where_asked_for():
  exact, partial = gym(), gym(reward="score")
  example = next(e for e in exact.splits["eval"] if e.columns["answer"] == "5")
  # The library gives len("5") / len("15") to "15", in which "5" is contained.
  assert graded(exact, example, " 5", "05", "15", "", "6") == ([1, 1, 0, 0, 0], [1, 1, 0, 0, 0])
  assert graded(partial, example, " 5", "05", "15", "", "6") == (
    [1, 1, 0.5, 0, 0],
    [1, 1, 0, 0, 0],
  )
  assert list(exact.rewards) == ["exact"]
  assert list(partial.rewards) == ["score"]


def test_a_chat_reply_is_searched_for_its_number():
  task = gym(format="chat")
  example = next(e for e in task.splits["eval"] if e.columns["answer"] == "5")
  replies = ("5", "The answer is 5.", "First 2, then 8 - 3 = 5", "5 or 6", "five", "**5**")
  assert graded(task, example, *replies)[1] == [1, 1, 1, 0, 0, 1]


def test_text_that_a_dataset_cannot_parse_is_a_wrong_answer():
  task = gym(dataset="prime_factorization", config=None, train_size=1, eval_size=1, shots=0)
  example = task.splits["train"][0]
  assert graded(task, example, example.columns["answer"], "no idea") == ([1, 0], [1, 0])


@pytest.mark.parametrize(
  ("reply", "number"),
  [
    ("-4", "-4"),
    ("9-4", "4"),
    ("5 − 9 = −4", "-4"),
    ("3 + 4 = 7, so it is 7.", "7"),
    ("about 1,234.50 dollars", "1,234.50"),
    ("12345", "12345"),
    ("7 = x", ""),
    ("none", ""),
  ],
)
def test_extract_number(reply, number):
  assert extract_number(reply) == number


@pytest.mark.parametrize(
  ("settings", "completion", "answer"),
  [
    ({}, " 05 ", "5"),
    ({}, "5 or 6", "5 or 6"),
    ({}, "", None),
    ({"format": "chat"}, "First 9 - 2 = 7, so it is **7**.", "7"),
    ({"format": "chat"}, "I do not know.", None),
    ({"dataset": "mini_sudoku", "config": None, "format": "chat"}, "1 2\n3 4", "1 2 3 4"),
  ],
)
def test_the_answer_that_a_completion_gives(settings, completion, answer):
  task = gym(**{"train_size": 1, "eval_size": 1} | settings)
  assert task.answer(completion) == answer


def test_answers_that_are_alike_are_graded_alike():
  task = gym(format="chat")
  example = next(e for e in task.splits["eval"] if e.columns["answer"] == "5")
  replies = ("5", "8 - 3 = 5", "05", "the 5th", "6", "8 - 2 = 6", "six", "-5")
  verdicts = {}
  for reply, right_or_not in zip(replies, graded(task, example, *replies)[1]):
    verdicts.setdefault(task.answer(reply), set()).add(right_or_not)
  assert verdicts == {"5": {1.0}, "6": {0.0}, None: {0.0}, "-5": {0.0}}


def test_letters_answer_with_all_they_say():
  task = make_task("letters")
  assert [task.answer(text) for text in (" ab ", "", "a b")] == ["ab", None, "a b"]
