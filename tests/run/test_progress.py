"""Tests what a run prints: a line per step, or a bar in a terminal."""

import math
import sys

from grpo_jax.run import progress
from grpo_jax.run.metrics import MetricsWriter
from grpo_jax.run.progress import Progress


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
    "step    1/20  reward 0.500  accuracy 0.250  entropy 1.250  tokens/s 15"
  )
  assert lines[2:] == [r"    1.00 | 5 - 9 = -> ' -4\n'", "    none | Hi -> '[/b]'"]


def test_the_time_left_is_that_of_the_remaining_steps(capsys, monkeypatch):
  """Two of the eight steps took 30 s in this process, so the other four take 60 s."""
  times = iter([100.0, 130.0])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
  shown = Progress(total_steps=8, start_step=2)
  shown.update(3, {"reward": 1.0})
  assert capsys.readouterr().out == "step    4/8  reward 1.000  1m00s left\n"


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
