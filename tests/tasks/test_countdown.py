"""Tests that countdown problems have solutions, and that only correct expressions are accepted."""

import random
import time
import warnings
from fractions import Fraction

import pytest

from grpo_jax.tasks import make_task, score
from grpo_jax.tasks.countdown import answer, expression_value, reaches_target
from tests.helpers.examples import all_examples, grade


def small(**settings):
  return make_task("countdown", **{"train_size": 60, "eval_size": 40} | settings)


@pytest.mark.parametrize(
  ("text", "value", "numbers"),
  [
    ("1+2*3", 7, (1, 2, 3)),
    ("(1 + 2) * 3", 9, (1, 2, 3)),
    ("8 - 3 - 2", 3, (2, 3, 8)),
    ("1 / 3 * 3", 1, (1, 3, 3)),  # exact: 1/3 is not rounded
    ("7 / 2", Fraction(7, 2), (2, 7)),
    ("-3 + 10", 7, (3, 10)),
    ("  ( 44 ) ", 44, (44,)),
    ("6 × 4 ÷ 2 − 1", 11, (1, 2, 4, 6)),
    ("6 * 4 = 24", 24, (4, 6)),
    ("1 / 2 = 1/2", Fraction(1, 2), (1, 2)),
    ("0 * 5", 0, (0, 5)),
  ],
)
def test_expressions(text, value, numbers):
  assert expression_value(text) == (value, numbers)


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "()",
    "1 +",
    "1 2",
    "3(4)",
    "(1, 2)",
    "2 ** 3",
    "7 // 2",
    "7 % 2",
    "1.5",
    "1e3",
    "1_000",
    "0x10",
    "007",
    "1 / 0",
    "1 / (2 - 2)",
    "+5",
    "1; 2",
    "1\n+ 2",
    "x",
    "True",
    "abs(3)",
    "__import__('os')",
    "[1][0]",
    "1 if 1 else 2",
    "1 < 2",
    "6 * 4 = 25",
    "6 * 4 = 20 + 4",
    "24 = 6 * 4",
    "6 * 4 = 24 = 24",
    "٣ + 4",
    "1\0",
    "(" * 90 + "1",
    "#### 7",
  ],
)
def test_text_that_is_not_an_expression(text):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert expression_value(text) is None


@pytest.mark.parametrize(
  "text",
  [
    "9**9**9**9**9",
    "(" * 100_000 + "1" + ")" * 100_000,
    "-" * 1_000_000 + "1",
    "-" * 199 + "1",
    "(" * 99 + "1" + ")" * 99,
    "9" * 1_000_000,
    "9*" * 99 + "9",
    "1/9" * 60 + "7",
    "<answer>" * 100_000,
    "</answer>" * 100_000 + "<answer>" * 100_000,
  ],
)
def test_hostile_completions_take_little_time(text):
  start = time.perf_counter()
  for completion in (text, f"<answer>{text}</answer>"):
    assert reaches_target([completion], [[1, 2, 3]], [7]) == [0.0]
    answer(completion)
  assert time.perf_counter() - start < 0.5


def test_expressions_have_at_most_200_characters():
  assert expression_value("1" + "+1" * 99)[0] == 100  # 199 characters
  assert expression_value("1" + "+1" * 100) is None


def test_an_answer_must_reach_the_target_with_the_given_numbers():
  def verdict(text, numbers=(3, 4, 5), target=17, **rule):
    return reaches_target([f"<answer>{text}</answer>"], [numbers], [target], **rule)[0]

  assert verdict("3 * 4 + 5") == 1
  assert verdict("5 + 4 * 3") == 1
  assert verdict("3 * 4 + 6") == 0
  assert verdict("(3 + 4) * 5") == 0
  assert verdict("12 + 5") == 0  # 12 is not a given number
  assert verdict("17") == 0
  assert verdict("3 * 4 + 5 + 3 - 3") == 0  # 3 is used twice too often
  assert verdict("4 * 5", target=20) == 0  # 3 is not used
  assert verdict("4 * 5", target=20, exactly_once=False) == 1
  assert verdict("4 * 5 + 4 - 4", target=20, exactly_once=False) == 0
  assert verdict("4 + 4", (4, 4), 8) == 1  # a number given twice may be used twice
  assert verdict("4 + 4", (4, 5), 8, exactly_once=False) == 0
  assert verdict("5 / 3 * 4", (3, 4, 5), 7) == 0  # 6.67 is not rounded


@pytest.mark.parametrize(
  ("completion", "reward"),
  [
    ("<think>3 and 4</think><answer>3 * 4 + 5</answer>", 1),
    ("<answer>\n3 * 4 + 5\n</answer>", 1),
    ("<answer>3 + 4</answer> no: <answer>3 * 4 + 5</answer>.", 1),
    ("<answer>3 * 4 + 5</answer> no: <answer>3 + 4</answer>", 0),
    ("in <answer> tags: <answer>3 * 4 + 5</answer>", 1),
    ("<answer>3 * 4 + 5", 0),
    ("3 * 4 + 5</answer>", 0),
    ("3 * 4 + 5", 0),
    ("<answer></answer>", 0),
    ("<answer>3 * 4 + 5 is it</answer>", 0),
    ("", 0),
  ],
)
def test_the_last_pair_of_tags_counts(completion, reward):
  assert reaches_target([completion], [[3, 4, 5]], [17]) == [reward]


def test_the_format_reward_includes_the_tag_that_the_prompt_opens():
  texts = ["<think>a</think><answer>1</answer>", "a</think><answer>1</answer>", "1"]
  columns = {"numbers": [[1]], "target": [2], "solution": [""]}
  for format, values in (("chat", [1.0, 0.0, 0.0]), ("completion", [0.0, 1.0, 0.0])):
    _, per_name = score(small(format=format).rewards, ["p"], [texts], columns)
    assert per_name["format"].tolist() == [values]


def test_every_problem_has_its_solution():
  task = small(train_size=300)
  sizes = set()
  for example in all_examples(task):
    numbers, target, solution = (example.columns[n] for n in ("numbers", "target", "solution"))
    assert eval(solution) == target  # by Python's own arithmetic
    assert sorted(
      int(n) for n in solution.translate(str.maketrans("+-*/()", "      ")).split()
    ) == (sorted(numbers))
    assert 10 <= target <= 99
    assert all(1 <= number <= 99 for number in numbers)
    sizes.add(len(numbers))
    texts = [f"<think>so</think><answer>{solution}</answer>", f"<answer>{solution} + 1</answer>"]
    assert grade(task, example, *texts) == ([1.1, 0.0], [1.0, 0.0])
  assert sizes == {3, 4}


def test_problems_satisfy_the_settings():
  task = small(
    counts=[2], smallest=2, largest=9, min_target=3, max_target=20, train_size=30, eval_size=10,
    use="at_most_once", format_weight=0,
  )  # fmt: skip
  for example in all_examples(task):
    assert len(example.columns["numbers"]) == 2
    assert all(2 <= number <= 9 for number in example.columns["numbers"])
    assert 3 <= example.columns["target"] <= 20
    assert "at most once" in example.prompt[1]["content"]
  assert list(task.rewards) == ["countdown"]
  example = task.splits["train"][0]
  columns = {name: [value] for name, value in example.columns.items()}
  columns["target"], columns["numbers"] = [5], [[5, 7]]
  assert score(task.rewards, [""], [["<answer>5</answer>"]], columns)[0].tolist() == [[1.0]]


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
  # Two numbers in 1..4 with targets 1 to 16 give 28 problems. All of them are drawn.
  task = small(
    counts=[2], smallest=1, largest=4, min_target=1, max_target=16, train_size=15, eval_size=13
  )
  problems = [
    (tuple(sorted(example.columns["numbers"])), example.columns["target"])
    for example in all_examples(task)
  ]
  assert len(set(problems)) == 28
  assert len({example.key for example in all_examples(task)}) == 28
  with pytest.raises(ValueError, match=r"only 28 distinct problems, and 15 eval \+ 500 train"):
    small(counts=[2], smallest=1, largest=4, min_target=1, max_target=16, train_size=500,
          eval_size=15)  # fmt: skip
  with pytest.raises(ValueError, match="only 0 distinct problems"):
    small(counts=[2], smallest=50, largest=60, min_target=20, max_target=20)


def test_small_problems_are_those_of_an_enumeration():
  """Enumerates two numbers from 1 to 3 with every positive integer that + * - / give."""
  reachable = set()
  for a in range(1, 4):
    for b in range(1, a + 1):
      results = {a + b, a * b, a - b} | ({a // b} if a % b == 0 else set())
      reachable |= {(b, a, result) for result in results if 1 <= result <= 9}
  task = small(counts=[2], smallest=1, largest=3, min_target=1, max_target=9, eval_size=3,
               train_size=len(reachable) - 3)  # fmt: skip
  drawn = {(*sorted(e.columns["numbers"]), e.columns["target"]) for e in all_examples(task)}
  assert drawn == reachable


def test_prompts():
  example = small().splits["eval"][0]
  system, user = example.prompt
  assert (system["role"], user["role"]) == ("system", "user")
  for number in (*example.columns["numbers"], example.columns["target"]):
    assert str(number) in user["content"]
  assert "every number exactly once" in user["content"]
  text = small(format="completion").splits["eval"][0].prompt
  assert user["content"] in text
  assert text.endswith("<think>")
  assert example.columns["solution"] not in text


def test_problems_depend_on_the_seed_and_a_larger_size_only_adds_some():
  assert all_examples(small()) == all_examples(small())
  assert all_examples(small()) != all_examples(small(seed=1))
  assert list(small(train_size=80).splits["train"][:60]) == list(small().splits["train"])
  assert list(small(train_size=80).splits["eval"]) == list(small().splits["eval"])


def test_equal_answers_have_equal_value_and_numbers():
  assert answer("<answer>3 * (4 + 5)</answer>") == answer("<answer>(5 + 4) × 3 = 27</answer>")
  assert answer("<answer>3 * 9</answer>") != answer("<answer>3 * (4 + 5)</answer>")
  assert answer("<answer>1 / 2</answer>") != answer("<answer>2 / 1</answer>")
  assert answer("<answer>what?</answer>") is answer("12") is None
  assert small().answer is answer


def test_random_expressions_agree_with_pythons_arithmetic():
  rng = random.Random(0)
  for _ in range(200):
    text = str(rng.randint(1, 99))
    for _ in range(rng.randint(1, 4)):
      side = f"{rng.choice('+-*')} {rng.randint(1, 99)}"
      text = rng.choice([f"{text} {side}", f"({text}) {side}"])
    assert expression_value(text)[0] == eval(text)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"format": "chatt"}, "unknown format 'chatt'"),
    ({"use": "once"}, "unknown use of the numbers 'once'.*at_most_once, exactly_once"),
    ({"counts": [1]}, r"counts is \[1\]"),
    ({"counts": []}, r"counts is \[\]"),
    ({"smallest": 0}, "smallest is 0"),
    ({"largest": 0}, "largest 0"),
    ({"min_target": 100}, "min_target is 100 and max_target 99"),
    ({"train_size": 0}, "train_size is 0"),
    ({"eval_size": -1}, "eval_size -1"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    small(**settings)
