"""Tests the choice of problems by pass rate: by hand, by other code, and after interruptions."""

import json
from fractions import Fraction

import jax
import numpy as np
import pytest

from grpo_jax import evaluate, pass_rates
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.pass_rates import Rates, Selection, histogram, measure, rates_of, row_of, write
from grpo_jax.tasks import make_task
from grpo_jax.tasks.base import Example


def selection(keep="0.2:0.8", samples=5, out="kept.jsonl", split=None):
  return Selection.parse(keep, samples, out, split)


@pytest.mark.parametrize(
  ("keep", "samples", "expected"),
  [
    ("0.2:0.8", 5, [1, 2, 3, 4]),  # both ends, exactly: 1/5 and 4/5
    ("0.2:0.8", 8, [2, 3, 4, 5, 6]),
    ("1/8:0.5", 8, [1, 2, 3, 4]),
    ("0:0", 3, [0]),
    ("1:1", 3, [3]),
    ("0:1", 2, [0, 1, 2]),
    ("0.3333333:0.3333334", 3, [1]),
  ],
)
def test_ranges_by_hand(keep, samples, expected):
  chosen = selection(keep, samples)
  assert [right for right in range(samples + 1) if chosen.holds(right)] == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"keep": "0.2"}, "--keep is '0.2': write LOW:HIGH, such as 0.2:0.8"),
    ({"keep": "a:b"}, "--keep is 'a:b': write LOW:HIGH"),
    ({"keep": "0.1:0.2:0.3"}, "write LOW:HIGH"),
    ({"keep": "1/0:1"}, "write LOW:HIGH"),
    ({"keep": "nan:1"}, "write LOW:HIGH"),
    ({"keep": "0.8:0.2"}, "0 <= LOW <= HIGH <= 1"),
    ({"keep": "20:80"}, "0 <= LOW <= HIGH <= 1"),
    ({"keep": "0.26:0.3", "samples": 4}, "a multiple of 1/4, and none of them lies in this range"),
    ({"samples": 0}, "--samples is 0: a pass rate needs at least 1 completion"),
    ({"out": None}, "--keep needs --out FILE.jsonl"),
    ({"out": "kept.csv"}, "name it so that it ends in .jsonl"),
  ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    selection(**arguments)


def test_a_file_of_another_program_is_not_overwritten(tmp_path):
  data = tmp_path / "data.jsonl"
  data.write_text("{}")
  with pytest.raises(ValueError, match="another program has written it"):
    selection(out=str(data))
  rates_of(data).write_text("")
  assert selection(out=str(data)).path == data


def test_counts_survive_any_end(tmp_path):
  path, about = tmp_path / "counts", {"seed": 0}
  rates = Rates(path, about, 4)
  rates.add([0, 4], 1)
  rates.add([2], 0)
  whole = path.read_bytes()
  for end in range(len(whole) + 1):
    path.write_bytes(whole[:end])
    again = Rates(path, about, 4)
    lines = whole[:end].count(b"\n")
    assert (again.right, again.missing) == [([], 0), ([], 0), ([0, 4], 1), ([0, 4, 2], 1)][lines]
    again.add([3], 0)
    assert Rates(path, about, 4).right == [*again.right]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"first": 1, "right": [1], "missing": 0}', "begins at problem 1 and not at 0"),
    ('{"first": 0, "right": [5], "missing": 0}', "counts more than 4"),
    ('{"first": 0, "right": [true], "missing": 0}', "counts more than 4"),
    ('{"first": 0, "right": [1', "is damaged"),
    ("[]", "is damaged"),
  ],
)
def test_damaged_counts_are_refused(tmp_path, line, message):
  Rates(tmp_path / "counts", {}, 4)
  with (tmp_path / "counts").open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=message):
    Rates(tmp_path / "counts", {}, 4)


def test_counts_of_other_completions_are_refused(tmp_path):
  Rates(tmp_path / "counts", {"seed": 0, "task": {"name": "a"}}, 4)
  with pytest.raises(ValueError, match=r"other completions \(task.name: 'a' -> 'b'\): remove it"):
    Rates(tmp_path / "counts", {"seed": 0, "task": {"name": "b"}}, 4)


def test_rows_by_hand():
  turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
  example = Example(turns, {"answer": np.int64(4)}, "2 + 2")
  assert row_of(example, Fraction(3, 4), "Be brief.") == {
    "prompt": turns[1:], "answer": 4, "key": "2 + 2", "pass_rate": 0.75,
  }  # fmt: skip
  assert row_of(example, Fraction(1), "Else.")["prompt"] == turns
  named = Example("p", {"prompt": "of the data", "key": 7}, "k")
  assert row_of(named, Fraction(0)) == {"prompt": "p", "key": 7, "pass_rate": 0.0}
  row = Example("p", {"b": 1}, "k", {"question": "p", "a": {"b": 1}, "pass_rate": 0.5})
  assert row_of(row, Fraction(1)) == {"question": "p", "a": {"b": 1}, "pass_rate": 1.0}


def test_nothing_is_written_where_nothing_is_left(tmp_path):
  chosen = selection("0.9:1", out=str(tmp_path / "kept.jsonl"))
  with pytest.raises(ValueError, match=r"none of the 2 problems has a pass rate from 0.9 to 1"):
    write(chosen, [0, 4], [Example("a", {}, "a")] * 2)
  assert not chosen.path.exists()


def test_a_histogram_by_hand():
  lines = histogram(selection("0.5:1", 2), [0, 1, 1, 1, 1, 1, 1, 1]).splitlines()
  assert lines == [
    "  0/2       1  ######",  # a seventh of 40
    "* 1/2       7  " + 40 * "#",
    "* 2/2       0",
  ]


def test_measuring_begins_where_the_counts_end(tmp_path):
  rates, lines = Rates(tmp_path / "counts", {}, 2), []

  def answers(first):
    for i in range(first, 4):
      right = np.array([[i % 2, 1.0]])
      yield evaluate.Answers(right, None, None, None, votes=[], missing=i, samples=[])

  rates.add([0], 0)
  measure(answers, rates, 4, lines.append)
  assert (rates.right, rates.missing) == ([0, 2, 1, 2], 6)
  assert lines[0] == "continuing after 1 of 4 problems"
  measure(lambda first: 1 / 0, rates, 4)  # there is nothing left to do


# --- the command ----------------------------------------------------------------------------------

REWARD = """
def right(prompts, completions, level, **columns):
  return [float(ord(text[0]) % 4 >= n) if text else 0.0 for text, n in zip(completions, level)]
"""


@pytest.fixture
def task(tmp_path):
  """Fields of a task whose rows have columns of their own names; level 4 cannot be solved."""
  (tmp_path / "reward.py").write_text(REWARD)
  rows = [{"q": f"{n:02}", "about": {"level": n % 5}, "id": n} for n in range(22)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {
    "path": f"{tmp_path}/rows.jsonl", "reward": f"{tmp_path}/reward.py:right", "prompt": "q",
    "rename": {"about.level": "level", "about": "rest"}, "key": "id", "eval_fraction": 0.1,
  }  # fmt: skip


def flags(task, *more):
  settings = [f"--config.task.settings.{name}={value}" for name, value in task.items()]
  return [
    "--config.task.name=table", *settings, "--config.eval.batch_prompts=8",
    "--config.rewards.workers=0", "--config.rollout.completion_length=2", *more,
  ]  # fmt: skip


def command(*arguments):
  return evaluate.main(["--config", "experiments/tiny.py", "--samples", "6", *arguments])


def expected_rows(task, low, high):
  """By the sampler itself, on all problems at once, and a verdict written here."""
  run = build(load("experiments/tiny.py", flags(task)))
  problems = list(run.task.splits["train"])
  params = run.to_sampling_params(run.initial_state().params)
  prompts = [problem.prompt for problem in problems]
  out = run.sampler(params, [*prompts, *prompts[: -len(prompts) % 8]], jax.random.key(0), group=6)
  rows = []
  for problem, texts in zip(problems, out.texts):
    right = sum(bool(t) and ord(t[0]) % 4 >= problem.columns["level"] for t in texts)
    n = int(problem.prompt)
    if low * 6 <= right <= high * 6:
      rows.append({"q": f"{n:02}", "about": {"level": n % 5}, "id": n, "pass_rate": right / 6})
  return rows


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_keeps_rows_that_the_task_reads_again(tmp_path, task, capsys):
  out = tmp_path / "new" / "kept.jsonl"
  arguments = ("--keep", "1/6:5/6", "--out", str(out), *flags(task))
  assert command(*arguments) == 0
  shown = capsys.readouterr()
  rows = read(out)
  assert rows == expected_rows(task, Fraction(1, 6), Fraction(5, 6))
  assert 4 < len(rows) < 16
  assert f"kept {len(rows)} of 20 problems, in {out}" in shown.out
  again = make_task("table", **{**task, "path": str(out), "eval_fraction": 0.0})
  assert [example.key for example in again.splits["train"]] == [str(row["id"]) for row in rows]
  assert again.splits["train"][0].columns["pass_rate"] == rows[0]["pass_rate"]


def test_another_range_takes_no_completions(tmp_path, task, capsys, monkeypatch):
  out = tmp_path / "kept.jsonl"
  assert command("--keep", "0:1", "--out", str(out), *flags(task), "--json") == 0
  assert json.loads(capsys.readouterr().out) == {"problems": 20, "kept": 20, "missing": 0}
  rates = {row["q"]: row["pass_rate"] for row in read(out)}
  monkeypatch.setattr(evaluate, "generate", None)
  assert command("--keep", "0:0", "--out", str(out), *flags(task)) == 0
  assert {row["q"] for row in read(out)} == {q for q, rate in rates.items() if rate == 0}
  assert command("--keep", "0:1", "--out", str(out), *flags(task, "--config.seed=1")) == 2
  assert "pass rates of other completions (seed: 0 -> 1" in capsys.readouterr().err
  with open(task["path"], "a") as file:
    file.write("\n")
  assert command("--keep", "0:1", "--out", str(out), *flags(task)) == 2
  assert "rows.jsonl" in capsys.readouterr().err


def test_an_interrupted_command_gives_the_same_files(tmp_path, task, capsys, monkeypatch):
  whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
  arguments = ("--keep", "0.1:0.9", *flags(task))
  assert command("--out", str(whole), *arguments) == 0
  add = Rates.add

  def stop(self, right, missing):
    add(self, right, missing)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pass_rates.Rates, "add", stop)
    assert command("--out", str(parts), *arguments) == 130
  assert not parts.exists()
  assert "the same command continues" in capsys.readouterr().out
  with rates_of(parts).open("ab") as file:
    file.write(rates_of(whole).read_bytes().splitlines()[2][:9])  # killed while it wrote a line
  assert command("--out", str(parts), *arguments) == 0
  assert "continuing after 8 of 20 problems" in capsys.readouterr().err
  assert parts.read_bytes() == whole.read_bytes()
  assert rates_of(parts).read_bytes() == rates_of(whole).read_bytes()


def test_generated_problems_become_a_table(tmp_path):
  out = tmp_path / "letters.jsonl"
  arguments = ("--keep", "0:1", "--out", str(out), "--split", "eval", "--config.rewards.workers=0")
  assert command(*arguments, "--config.task.settings.eval_size=3") == 0
  letters = make_task("letters", eval_size=3)
  table = make_task(
    "table", path=str(out), reward="grpo_jax.tasks.letters:all_letters", key="key",
    eval_fraction=0.0,
  )  # fmt: skip
  expected = [(e.prompt, e.key) for e in letters.splits["eval"]]
  assert [(e.prompt, e.key) for e in table.splits["train"]] == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--keep", "0.8:0.2", "--out", "x.jsonl"), "0 <= LOW <= HIGH <= 1"),
    (("--keep", "0:1"), "--keep needs --out"),
    (("--split", "train"), "it goes with --keep"),
    (("--keep", "0:1", "--out", "x.jsonl", "--before"), "--before does not go with --keep"),
    (("--keep", "0:1", "--out", "x.jsonl", "--split", "test"), "unknown --split 'test'"),
    (
      ("--keep", "0:1", "--out", "x.jsonl", "--split", "eval",
       "--config.task.settings.eval_size=0"),
      "the split 'eval' is empty",
    ),
  ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(arguments, message, capsys):
  assert command(*arguments) == 2
  assert message in capsys.readouterr().err
