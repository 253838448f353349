"""Tests how graders read correct answers, and that tables of answers are checked at the start."""

import datetime
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from grpo_jax.tasks import Task, make_task, score, score_in_process
from grpo_jax.tasks.rewards.golds import READERS, AnswerError, is_missing, read
from grpo_jax.tasks.rewards.graders import GRADERS
from grpo_jax.tasks.rewards.loading import ExactlyOne
from grpo_jax.tasks.rewards.worker_process import _with_announcements
from tests.helpers.examples import grade

NAN, INF = float("nan"), float("inf")
# (answer, the graders that read it)
KINDS = [
  (18, "exact numeric math"),
  (5.0, "exact numeric math"),
  (Decimal("2.00"), "exact numeric math"),
  (Fraction(1, 2), "exact numeric math"),
  (np.int64(3), "exact numeric math"),
  (np.float32(2.5), "exact numeric math"),
  ("18 eggs", "exact numeric math"),
  ("1,234", "exact numeric math"),
  ("½", "exact numeric math"),
  (True, "exact math"),
  (datetime.date(2024, 5, 1), "exact math"),
  ("four", "exact math"),
  ("(1, 5)", "exact math"),
  ("3 or 4", "exact math"),
  ("x" * 501, "exact"),
  ("long " * 200 + "\\boxed{7}", "exact numeric math"),
  (10**100, "exact math"),
  (INF, ""),
  (-INF, ""),
  (np.float64("inf"), ""),
  (Decimal("Infinity"), ""),
  ("", ""),
  (" \n", ""),
  ([1], ""),
  ({"value": 1}, ""),
  ((1, 2), ""),
  (b"18", ""),
  (np.array([1]), ""),
  (1j, ""),
]


@pytest.mark.parametrize(("gold", "graders"), KINDS, ids=[repr(gold)[:20] for gold, _ in KINDS])
def test_the_graders_that_read_an_answer(gold, graders):
  for name in READERS:
    if name in graders.split():
      read(name, gold)
      assert GRADERS[name](completions=["none"], answer=[gold]) == [0.0]
    else:
      with pytest.raises(AnswerError, match=f"{name}.* cannot read the correct answer"):
        GRADERS[name](completions=["none"], answer=[gold])


@pytest.mark.parametrize("name", sorted(READERS))
def test_missing_answers_do_not_apply(name):
  missing = [None, NAN, np.float32("nan"), Decimal("NaN"), Decimal("sNaN")]
  assert all(map(is_missing, missing))
  assert GRADERS[name](completions=["<answer>nan</answer>"] * 5, answer=missing) == [None] * 5
  assert ExactlyOne(GRADERS[name])(completions=["x"] * 5, answer=missing) == [0.0] * 5


def test_exact_reads_numbers_and_truth_as_text():
  cases = [("5", 5.0, 1), ("5.0", 5.0, 1), ("5", Decimal("5.00"), 1), ("5.5", Decimal("5.50"), 1),
           ("5.0", 5, 0), ("50", 5.0, 0), ("6", 5.5, 0), ("true", True, 1), ("1", True, 0),
           ("0.1", 0.1, 1), ("100000000000000000000", 1e20, 1), ("cafe\u0301", "caf\u00e9", 1),
           (".", ".", 1), ("", ".", 0), ("2024-05-01", datetime.date(2024, 5, 1), 1)]  # fmt: skip
  for text, gold, verdict in cases:
    marked = f"<answer>{text}</answer>" if text else ""
    assert GRADERS["exact"](completions=[marked], answer=[gold]) == [verdict], (text, gold)


def write(path, *answers, column="answer"):
  lines = [json.dumps({"prompt": f"p{i}", column: answer}) for i, answer in enumerate(answers)]
  path.write_text("\n".join(lines))
  return str(path)


@pytest.mark.parametrize(
  ("bad", "grader", "message"),
  [
    ("twelve", "numeric", "'twelve' .str.: it must be .* 'exact' or 'math' reads this one"),
    (True, "numeric", "True .bool.: it must be a finite number"),
    (INF, "math", "inf .float.: .* Write it so, or use a reward function of your own"),
    ([1, 2], "exact", r"\[1, 2\] .list.: it must be text"),
    ("", "exact", "'' .str.: it must be text that is not empty"),
    ("y" * 501, "math", "it has 501 characters.*'exact' reads this one"),
  ],
)
def test_an_answer_that_the_grader_cannot_read_is_an_error_at_the_start(
  tmp_path, bad, grader, message
):
  path = write(tmp_path / "a.jsonl", 1, None, NAN, bad, column="gold")
  with pytest.raises(ValueError, match=f"a.jsonl, line 4, column 'gold': .*{message}"):
    make_task("jsonl", path=path, reward=grader, rename={"gold": "answer"}, eval_fraction=0.75)


def test_the_accuracy_is_checked_too_and_functions_of_users_are_not(tmp_path):
  def mine(prompts, completions, answer, **columns):
    raise AssertionError("called at the start")

  path = write(tmp_path / "a.jsonl", 1, "two")
  make_task("jsonl", path=path, reward=mine)
  make_task("jsonl", path=path, reward=["exact", mine])
  with pytest.raises(ValueError, match="line 2, column 'answer': the grader 'numeric'"):
    make_task("jsonl", path=path, reward=mine, accuracy={"name": "numeric", "tolerance": 0.1})


def test_a_reward_that_is_the_accuracy_too_is_called_once():
  calls = []

  def reward(completions, **columns):
    calls.append(list(completions))
    return [{"right": 1.0, "half": 0.5, "other": None}[text] for text in completions]

  task = Task("t", {}, {"reward": (reward, 2.0)}, ExactlyOne(reward))
  scores = score_in_process(task)(["p"], [["right", "half", "other"]], {})
  assert scores.accuracy.tolist() == [[1, 0, 0]]
  np.testing.assert_array_equal(scores.total, [[2, 1, NAN]])
  assert calls == [["right", "half", "other"]]
  alone = score_in_process(task)(["p"], [["right", "half"]], {}, rewards=False)
  assert alone.accuracy.tolist() == [[1, 0]]
  announced = _with_announcements(task, calls.append)
  assert score_in_process(announced)(["p"], [["half"]], {}).accuracy.tolist() == [[0]]
  assert calls[2:] == ["reward function 'reward'", ["half"]]
  other = Task("t", {}, {"reward": (reward, 2.0)}, ExactlyOne(lambda **columns: reward(["right"])))
  assert score_in_process(other)(["p"], [["half"]], {}).accuracy.tolist() == [[1]]


def test_columns_of_parquet_files(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  def task(values, **settings):
    table = pyarrow.table({"prompt": ["p", "q"], "answer": pyarrow.array(values)})
    parquet.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    return make_task("parquet", path=path, eval_fraction=0, **settings)

  decimals = task([Decimal("2.00"), Decimal("4.00")], reward="numeric")
  assert grade(decimals, decimals.splits["train"][0], "2", "4") == ([1, 0], [1, 0])
  gaps = task([5.0, NAN], reward="exact")
  assert grade(gaps, gaps.splits["train"][0], "5", "4") == ([1, 0], [1, 0])
  with pytest.raises(ValueError, match=r"a.parquet, row 1, column 'answer': .*True .bool."):
    task([True, False], reward="numeric")


RESERVED = ["prompts", "completions", "completion_lengths", "completion_ids", "trainer_state",
            "log_extra", "log_metric"]  # fmt: skip


@pytest.mark.parametrize("name", RESERVED)
def test_a_column_with_the_name_of_an_argument_is_an_error_at_the_start(tmp_path, name):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"prompt": "p", name: 1, "answer": 1}))
  message = f"line 1: a column must not be called '{name}'.*rename={{'{name}': "
  with pytest.raises(ValueError, match=message):
    make_task("jsonl", path=str(path), reward="numeric", eval_fraction=0)
  task = make_task("jsonl", path=str(path), reward="numeric", eval_fraction=0, rename={name: "x"})
  assert task.splits["train"][0].columns == {"x": 1, "answer": 1}


@pytest.mark.parametrize("grader", ["exact", "numeric", "format"])
def test_every_other_name_of_a_column_works(grader):
  names = ["self", "cls", "args", "kwargs", "columns", "function", "name", "prompt", "text",
           "gold", "rewards", "task", "lengths", "weights", "", "a b", "class", "key"]  # fmt: skip
  columns = {**{key: [1] for key in names}, "answer": ["1"]}
  function = GRADERS[grader]
  values = score({grader: (function, 1.0)}, ["p"], [["1"]], columns)[1][grader]
  exactly = score({"accuracy": (ExactlyOne(function), 1.0)}, ["p"], [["1"]], columns)[0]
  assert values.tolist() == exactly.tolist() == [[float(grader != "format")]]


def test_the_answers_of_generated_tasks_are_right_by_their_own_scorers():
  tasks = [make_task("countdown", train_size=50, eval_size=10)]
  pytest.importorskip("reasoning_gym")
  for dataset in ("chain_sum", "decimal_chain_sum", "gcd", "fraction_simplification"):
    for style in ("completion", "chat"):
      settings = {"dataset": dataset, "format": style, "train_size": 8, "eval_size": 4}
      tasks.append(make_task("reasoning_gym", **settings))
  for task in tasks:
    for split in task.splits.values():
      for example in split:
        own = example.columns.get("solution")
        text = f"<answer>{own}</answer>" if own else example.columns["answer"]
        columns = {name: [value] for name, value in example.columns.items()}
        assert score_in_process(task)([example.prompt], [[text]], columns).accuracy == 1, text
