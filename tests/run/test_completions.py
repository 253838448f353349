"""Tests what is found in the completions of a run: planted in samples, not in healthy ones."""

import json

import numpy as np
import pytest

from grpo_jax import doctor
from grpo_jax.run import completions
from grpo_jax.run.completions import examine, read_leniently
from tests.helpers.work_directories import make_run, write

PROMPTS, GROUP = 8, 4


def run_with(folder, make, steps=3):
  """Writes a run whose completions are `make(prompt, completion, rng)`; returns its folder."""
  make_run(folder, steps=steps, prompts=1, group=1)
  rng = np.random.default_rng(0)
  for step in range(steps):
    rows = [
      {"prompt": f"{p} + 1 =", "key": str(p), "answer": p + 1, "length": 5, **make(p, g, rng)}
      for p in range(PROMPTS)
      for g in range(GROUP)
    ]
    write(folder / f"samples/step_{step:06d}.jsonl", rows)
  return folder


def healthy(p, g, rng):
  right = bool(rng.integers(2))
  text = f"{p + 1}" if right else f"{p + 2} or {rng.integers(100, 999)}"
  return {
    "completion": text, "accuracy": float(right), "advantage": right - 0.5,
    "length": int(rng.integers(5, 100)), "ended": True,
  }  # fmt: skip


def strict(p, g, rng):
  """The reward wants the number alone, and the model writes a sentence."""
  row = healthy(p, g, rng)
  return row | {"completion": f"The answer is **{row['completion']}**.", "accuracy": 0.0}


def same(p, g, rng):
  return healthy(p, g, rng) | {"completion": "I do not know", "accuracy": 0.0}


def alone(p, g, rng):
  """Only the first prompt has both right and wrong completions."""
  return healthy(p, g, rng) | ({} if p == 0 else {"advantage": 0.0})


def cut(p, g, rng):
  """Right ones take 80 to 99 tokens, and a third is cut off at 100 before it is right."""
  row = healthy(p, g, rng)
  if g == 0:
    return row | {
      "length": 100,
      "ended": False,
      "accuracy": 0.0,
      "completion": f"so {rng.random()}",
    }
  return row | {"length": int(rng.integers(80, 100)), "accuracy": 1.0}


PLANTED = {"not_extracted": strict, "same_texts": same, "one_prompt": alone, "long_and_right": cut}


def names(folder):
  return [finding.name for finding in examine(folder)]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_illness_is_found_and_no_other(tmp_path, name):
  assert names(run_with(tmp_path / "run", PLANTED[name])) == [name]


def test_there_is_a_plant_for_each_check():
  assert [check.__name__ for check in completions.CHECKS] == list(PLANTED)


def test_healthy_completions_have_no_finding(tmp_path):
  assert names(run_with(tmp_path / "run", healthy)) == []


def test_a_solved_task_has_no_finding(tmp_path):
  """All say the same, all is right, and one group is left with a wrong one."""

  def make(p, g, rng):
    wrong = (p, g) == (0, 0)
    text = f"{p}" if wrong else f"{p + 1}"
    return {"completion": text, "accuracy": float(not wrong), "advantage": float(wrong)}

  assert names(run_with(tmp_path / "run", make)) == []


def test_samples_that_do_not_say_what_was_cut_off_have_no_finding(tmp_path):
  """Samples of older runs have no `ended`."""

  def make(p, g, rng):
    return {name: value for name, value in cut(p, g, rng).items() if name != "ended"}

  assert names(run_with(tmp_path / "run", make)) == []


def test_few_or_damaged_completions_are_no_finding(tmp_path):
  folder = make_run(tmp_path / "run", steps=1, prompts=1, group=2)
  assert names(folder) == []
  (folder / "samples/step_000000.jsonl").write_text('{"prompt": 1}\n[]\n{"completion"\nnull\n')
  assert names(folder) == []
  assert names(tmp_path / "none") == []


def test_the_finding_shows_a_completion(tmp_path):
  finding = examine(run_with(tmp_path / "run", strict))[0]
  assert "'The answer is **1**.' for 1" in finding.seen


@pytest.mark.parametrize(
  ("text", "answer", "expected"),
  [
    ("It is 1,234.", 1234, True),
    ("1234 and then 5", 1234, False),
    ("= -7.0", "-7", True),
    ("no number", 3, False),
    ("Answer: (B)", "answer b", True),
    ("first\nParis!", "paris", True),
    ("Paris\nor London", "Paris", False),
    ("", "x", False),
    ("x", "", False),
    ("x", None, False),
    ("nan", "nan", True),
    ("9" * 400, "9" * 400, True),
  ],
)
def test_a_lenient_reader(text, answer, expected):
  assert read_leniently(text, answer) is expected


def test_the_command_shows_them(tmp_path, capsys):
  folder = run_with(tmp_path / "run", strict)
  assert doctor.main([str(folder)]) == 0
  assert "not_extracted (likely)" in capsys.readouterr().out
  row = json.loads((folder / "samples/step_000002.jsonl").read_text().splitlines()[0])
  assert row["completion"].startswith("The answer is")
