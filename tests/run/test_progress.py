"""Tests what a run prints: a line per step, or a bar in a terminal."""

import math
import sys

from grpo_jax.run.metrics import MetricsWriter
from grpo_jax.run.progress import Progress, choose_samples


def test_without_a_terminal_each_step_is_one_plain_line(capsys):
  shown = Progress(total_steps=20)
  shown.update(0, {"step": 0, "eval/accuracy": 0.475})
  shown.update(0, {"reward": 0.5, "entropy": 1.25, "accuracy": 0.25, "tokens_per_second": 1500.4})
  shown.print_samples(
    [
      {"prompt": "1 + 1 = 2\n5 - 9 =", "completion": " -4\n", "reward": 1.0},
      {"prompt": [{"role": "user", "content": "Hi"}], "completion": "[/b]", "reward": math.nan},
    ]
  )
  shown.close()
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "step 0: eval/accuracy 0.475"
  assert lines[1].startswith(
    "step    1/20  reward 0.500  accuracy 0.250  entropy 1.250  tokens/s 1500"
  )
  assert lines[2:] == [r"    1.00 | 5 - 9 = -> ' -4\n'", "    none | Hi -> '[/b]'"]


def test_the_time_left_does_not_count_the_first_step_which_compiles(capsys):
  """The usual step takes 15 s, so the three that are left take 45 s."""
  shown = Progress(total_steps=8, start_step=2)
  for step, seconds in ((2, 90.0), (3, 15.0), (4, 14.0), (5, 40.0)):
    shown.update(step, {"reward": 1.0, "step_time": seconds})
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "step    3/8  reward 1.000"
  assert lines[1] == "step    4/8  reward 1.000  1m00s left"
  assert lines[3] == "step    6/8  reward 1.000  0m30s left"


def rows(*groups):
  return [
    {"prompt": f"p{i}", "key": str(i), "completion": str(j), "reward": r}
    for i, group in enumerate(groups)
    for j, r in enumerate(group)
  ]


def test_a_right_and_a_wrong_completion_of_one_prompt_are_shown():
  samples = rows([0.0, 0.0, 0.0], [0.2, 1.0, 0.0], [1.0, 1.0, 0.0])
  chosen = choose_samples(samples, 2)
  assert [(s["prompt"], s["reward"]) for s in chosen] == [("p1", 1.0), ("p1", 0.0)]
  assert [s["reward"] for s in choose_samples(samples, 9)] == [1.0, 0.0, 0.2]
  assert choose_samples(samples, 1)[0]["reward"] == 1.0
  alike = rows([0.0, 0.0], [1.0, 1.0])
  assert [s["prompt"] for s in choose_samples(alike, 2)] == ["p0", "p0"]
  unscored = rows([math.nan, 1.0])
  assert [s["completion"] for s in choose_samples(unscored, 2)] == ["1", "0"]
  assert choose_samples([], 3) == choose_samples(samples, 0) == []
  assert len(choose_samples(rows([0.5]), 3)) == 1


def test_a_terminal_gets_a_bar_and_completions_without_markup(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "200")
  with MetricsWriter(tmp_path, 20, resume_step=3) as writer:
    writer.write(3, {"reward": 0.5})
    writer.print_samples([{"prompt": "p", "completion": "[/b] [red]x", "reward": 0.0}])
  output = capsys.readouterr().out
  assert "'[/b] [red]x'" in output
  assert "reward 0.500" in output
  assert "4/20" in output


def test_nothing_is_printed_with_show_off(tmp_path, capsys):
  with MetricsWriter(tmp_path, 8, show=False) as writer:
    writer.write(0, {"reward": 0.5})
    writer.print("text")
    writer.print_samples([{"prompt": "p", "completion": "c", "reward": 0.0}])
  assert capsys.readouterr().out == ""
