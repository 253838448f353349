"""Tests reasoning-gym tasks: their prompts, their splits, and how answers are graded."""

import pytest

from grpo_jax.tasks import make_task
from grpo_jax.tasks.reasoning_gym import extract_number
from tests.helpers.examples import grade, keys

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TWO_DIGITS = ONE_DIGIT | {"min_digits": 2, "max_digits": 2}


def gym(**settings):
  settings = {"dataset": "chain_sum", "config": ONE_DIGIT, "train_size": 80} | settings
  return make_task("reasoning_gym", **({"eval_size": 70} | settings))


def test_completion_prompts_are_solved_lines_and_an_unsolved_one():
  task = gym()
  for example in task.splits["eval"]:
    *shots, question = example.prompt.split("\n")
    assert len(shots) == 2
    for line in shots:
      expression, result = line.split(" = ")
      assert eval(expression) == int(result)
    expression = question.removesuffix(" =")
    canonical = " + ".join(sorted(expression.split(" + "))) if "+" in expression else expression
    assert example.key == canonical
    assert eval(example.key) == int(example.columns["answer"])
  assert task.stop == ("\n",)


def test_questions_without_arithmetic_are_asked_as_questions():
  task = gym(dataset="gsm_symbolic", config=None, train_size=3, eval_size=2, shots=1)
  example = task.splits["train"][0]
  shot, question = example.prompt.split("\n\n")
  assert shot.startswith("Q: ")
  assert "\nA: " in shot
  assert question == f"Q: {example.columns['question']}\nA:"
  assert example.key == " ".join(example.columns["question"].split())


def test_an_expression_that_is_the_answer_is_not_in_the_prompt():
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


def test_multi_line_answers_need_chat():
  with pytest.raises(ValueError, match="format='chat'"):
    gym(dataset="mini_sudoku", config=None, train_size=1, eval_size=1)
  task = gym(dataset="mini_sudoku", config=None, train_size=1, eval_size=1, format="chat")
  example = task.splits["train"][0]
  assert grade(task, example, example.columns["answer"], "1 2")[0] == [1, 0]


def test_splits_and_shots_are_disjoint():
  for seed in range(3):
    # 155 problems exist: 100 differences and 55 sums (3 + 4 and 4 + 3 are the same). 83 + 70 + 2
    # shots are all of them.
    task = gym(seed=seed, train_size=83)
    train, held_out = keys(task, "train"), keys(task, "eval")
    shots = [line.split(" =")[0] for line in task.splits["eval"][0].prompt.split("\n")[:2]]
    shot_keys = {" + ".join(sorted(shot.split(" + "))) for shot in shots}
    assert len(set(train)) == 83
    assert len(set(held_out)) == 70
    assert not set(train) & set(held_out)
    assert len(shot_keys) == 2
    assert not shot_keys & (set(train) | set(held_out))


def test_a_sum_in_reverse_order_is_the_same_problem():
  task = gym(keep=r"\d \+ \d", train_size=23, eval_size=30)  # 53 + 2 shots: all sums
  operands = [
    {frozenset(example.prompt.split("\n")[-1].removesuffix(" =").split(" + ")) for example in split}
    for split in task.splits.values()
  ]
  assert sum(map(len, operands)) == 53
  assert not operands[0] & operands[1]


def test_keep_selects_problems_that_match_as_a_whole():
  task = gym(keep=r"[0-4] - \d", train_size=20, eval_size=10, shots=0)
  for example in (*task.splits["train"], *task.splits["eval"]):
    assert example.key[0] in "01234"
    assert example.key[1:4] == " - "
  with pytest.raises(ValueError, match=r"keep is '\(', which is not a regular expression"):
    gym(keep="(")


def test_splits_of_a_mixture_with_overlapping_datasets_are_disjoint():
  mixture = [
    {"dataset": "chain_sum", "weight": 1, "config": ONE_DIGIT},
    {"dataset": "chain_sum", "weight": 3, "config": ONE_DIGIT | {"max_digits": 2}},
  ]
  task = gym(dataset=None, config=None, mixture=mixture, train_size=200, eval_size=40)
  train, held_out = keys(task, "train"), keys(task, "eval")
  assert len(set(train)) == 200
  assert len(set(held_out)) == 40
  assert not set(train) & set(held_out)


def test_a_mixture_interleaves_its_datasets_in_exact_shares():
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


def test_too_few_problems_are_an_error_with_their_number():
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


def test_problems_depend_on_the_seed_only():
  def prompts(**settings):
    return [example.prompt for split in gym(**settings).splits.values() for example in split]

  assert prompts() == prompts()
  assert prompts(config=TWO_DIGITS) != prompts(config=TWO_DIGITS, seed=1)


def test_a_larger_training_split_only_adds_problems():
  small = gym(config=TWO_DIGITS, train_size=50)
  large = gym(config=TWO_DIGITS, train_size=500)
  assert small.splits["eval"] == large.splits["eval"]
  assert keys(small, "train") == keys(large, "train")[:50]


def test_thousands_of_problems_are_distinct():
  assert len(set(keys(gym(config=TWO_DIGITS, train_size=4000), "train"))) == 4000


def test_partial_credit_is_given_on_request_only():
  exact, partial = gym(), gym(reward="score")
  example = next(e for e in exact.splits["eval"] if e.columns["answer"] == "5")
  # The library gives len("5") / len("15") to "15", in which "5" is contained.
  assert grade(exact, example, " 5", "05", "15", "", "6") == ([1, 1, 0, 0, 0], [1, 1, 0, 0, 0])
  assert grade(partial, example, " 5", "05", "15", "", "6") == (
    [1, 1, 0.5, 0, 0],
    [1, 1, 0, 0, 0],
  )
  assert list(exact.rewards) == ["exact"]
  assert list(partial.rewards) == ["score"]


def test_a_chat_reply_is_graded_by_its_number():
  task = gym(format="chat")
  example = next(e for e in task.splits["eval"] if e.columns["answer"] == "5")
  replies = ("5", "The answer is 5.", "First 2, then 8 - 3 = 5", "5 or 6", "five", "**5**")
  assert grade(task, example, *replies)[1] == [1, 1, 1, 0, 0, 1]


def test_unparsable_text_is_a_wrong_answer():
  task = gym(dataset="prime_factorization", config=None, train_size=1, eval_size=1, shots=0)
  example = task.splits["train"][0]
  assert grade(task, example, example.columns["answer"], "no idea") == ([1, 0], [1, 0])


@pytest.mark.parametrize(
  ("reply", "number"),
  [
    ("-4", "-4"),
    ("9-4", ""),
    ("9 - 4 = 5", "5"),
    ("10³", ""),
    ("5!", ""),
    ("log(5)", ""),
    ("\\boxed{x = -4}", "-4"),
    ("５", "5"),
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
def test_the_answer_of_a_completion(settings, completion, answer):
  task = gym(**{"train_size": 1, "eval_size": 1} | settings)
  assert task.answer(completion) == answer


def test_completions_with_equal_answers_are_graded_alike():
  task = gym(format="chat")
  example = next(e for e in task.splits["eval"] if e.columns["answer"] == "5")
  replies = ("5", "8 - 3 = 5", "05", "the 5th", "6", "8 - 2 = 6", "six", "-5")
  verdicts = {}
  for reply, correct in zip(replies, grade(task, example, *replies)[1]):
    verdicts.setdefault(task.answer(reply), set()).add(correct)
  assert verdicts == {"5": {1.0}, "6": {0.0}, None: {0.0}, "-5": {0.0}}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"dataset": "chain_sun"}, r"'chain_sun': did you mean 'chain_sum'.*\(105 are known\)"),
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
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    gym(**settings)
