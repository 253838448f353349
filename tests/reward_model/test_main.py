"""Tests the command: its flags, what it prints, its exit codes."""

import json

import pytest

from grpo_jax.reward_model import __main__ as command
from grpo_jax.reward_model import training
from grpo_jax.reward_model.training import Settings
from grpo_jax.run.checkpoint import NotFiniteError, SaveError
from grpo_jax.run.signals import Signals
from grpo_jax.run.workdir import WorkdirError
from tests.helpers import preferences

FAST = ["--pairs-per-step", "16", "--config.compilation_cache=off"]


@pytest.fixture
def data(tmp_path):
  return preferences.write(tmp_path / "pairs.jsonl", preferences.shorter_wins(40))


def test_flags_become_settings():
  arguments, overrides = command.parse(
    ["--model", "m", "--data", "a", "b", "--workdir", "w", "--center", "0.1", "--drop",
     "--eval-path", "c", "--split", "test", "--config.seed=3"]
  )  # fmt: skip
  assert command.settings_of(arguments) == Settings(
    "m", ["a", "b"], center=0.1, drop=True, source={"eval_path": ["c"], "split": "test"}
  )
  assert overrides == ["--config.seed=3"]


@pytest.mark.slow
def test_a_run_says_what_it_does_and_where_the_model_is(data, tmp_path, capsys):
  workdir = tmp_path / "run"
  arguments = ["--model", "random:tiny", "--data", data, "--workdir", str(workdir), *FAST]
  assert command.main([*arguments, "--config.epochs=0.5"]) == 0
  shown = capsys.readouterr().out
  for text in (
    "reward model from random:tiny: 2 steps of 16 pairs, from step 0",
    "36 pairs to train on, 4 held out",
    "held out, after 2 steps (n = 4 pairs)",
    f"in {workdir}: model/ (a Hugging Face folder)",
  ):
    assert text in shown
  assert "36 pairs to train on" in (workdir / "console.log").read_text()
  assert (workdir / "model" / "config.json").is_file()
  assert json.loads((workdir / "run.json").read_text())
  assert command.main([*arguments, "--config.epochs=0.5"]) == 0  # finished already
  assert command.main([*arguments, "--config.epochs=1"]) == 2
  assert "put back config.epochs: 0.5 -> 1.0" in capsys.readouterr().err


def test_pairs_that_are_left_out_are_counted(data, tmp_path, capsys):
  with open(data, "a", encoding="utf-8") as file:
    file.write(json.dumps({"prompt": "x", "chosen": "y", "rejected": "y"}) + "\n")
  arguments = ["--model", "random:tiny", "--data", data, "--workdir", str(tmp_path / "run"), *FAST]
  assert command.main(arguments) == 2
  error = capsys.readouterr().err
  assert "pairs.jsonl, line 41: 'chosen' and 'rejected' are the same" in error
  assert "leave out such pairs: --drop" in error
  assert not (tmp_path / "run").exists()
  assert command.main([*arguments, "--drop", "--config.epochs=0.1"]) == 0
  assert "warning: 1 pairs are left out; the first: " in capsys.readouterr().out


def test_a_signal_and_a_bad_path_have_their_exit_codes(data, tmp_path, capsys, monkeypatch):
  arguments = ["--model", "random:tiny", "--data", data, *FAST]
  assert command.main([*arguments, "--workdir", data]) == 2
  assert "is a file; use another --workdir" in capsys.readouterr().err
  monkeypatch.setattr(Signals, "of_any_host", lambda self, step: 15)
  assert command.main([*arguments, "--workdir", str(tmp_path / "run")]) == 143
  assert "stopped after step 1, which is saved; the same command" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (training.SkippedError("2 updates in a row were skipped"), 3),
    (NotFiniteError("the state holds NaN"), 3),
    (SaveError("the checkpoint of step 1 could not be saved"), 74),
    (WorkdirError("it is in use"), 2),
    (KeyboardInterrupt(), 130),
  ],
)
def test_what_ends_a_run_has_an_exit_code(data, tmp_path, monkeypatch, capsys, error, code):
  def fail(*_):
    raise error

  monkeypatch.setattr(training, "train", fail)
  arguments = ["--model", "random:tiny", "--data", data, "--workdir", str(tmp_path / "run"), *FAST]
  assert command.main(arguments) == code
  assert (str(error) or "stopped; the same command continues") in "".join(capsys.readouterr())
