"""Tests what run.json says of the sessions of a run: how they started and why they ended."""

import datetime
import json
import platform
import signal
import sys

import jax
import numpy as np
import pytest

from grpo_jax.run import record
from grpo_jax.run.signals import Stopped


def sessions(workdir):
  return json.loads((workdir / "run.json").read_text())["sessions"]


def test_each_session_is_added_with_its_start_and_end(tmp_path):
  for number in range(2):
    with record.session(tmp_path, "1.2.3", tmp_path):
      now = sessions(tmp_path)
      assert len(now) == number + 1
      assert (now[-1]["end"], now[-1]["reason"]) == (None, None)
  first, second = sessions(tmp_path)
  assert first["reason"] == second["reason"] == "finished"
  start, end = (datetime.datetime.fromisoformat(second[name]) for name in ("start", "end"))
  assert start <= end
  assert start.utcoffset() == datetime.timedelta(0)
  versions = second["versions"]
  assert versions["grpo_jax"] == "1.2.3"
  assert versions["python"] == platform.python_version()
  assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
  assert second["command"] == sys.orig_argv
  assert second["peak_memory"]["host"] > 2**24
  assert second["git"] is None  # a temporary folder is in no repository


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (Stopped("stopped", signal.SIGTERM), {"reason": "signal", "signal": "SIGTERM"}),
    (KeyboardInterrupt(), {"reason": "signal", "signal": "SIGINT"}),
    (ValueError("a\nb"), {"reason": "error", "error": "ValueError", "message": "ValueError: a"}),
  ],
)
def test_the_reason_is_the_exception_that_ended_it(tmp_path, error, expected):
  with pytest.raises(type(error)), record.session(tmp_path, "1"):
    raise error
  (session,) = sessions(tmp_path)
  assert {name: session.get(name) for name in expected} == expected
  assert session["end"]


def test_a_reason_that_is_set_stays(tmp_path):
  with record.session(tmp_path, "1") as session:
    session["reason"] = "stopped"
  assert sessions(tmp_path)[0]["reason"] == "stopped"


def test_a_session_without_an_end_was_killed(tmp_path):
  (tmp_path / "run.json").write_text('{"sessions": [{"start": "x", "end": null, "reason": null}]}')
  with record.session(tmp_path, "1"):
    pass
  assert [session["reason"] for session in sessions(tmp_path)] == ["killed", "finished"]


@pytest.mark.parametrize("text", ["", "[]", '{"sessions": 3}', '{"sessions": [1]}', "[" * 100_000])
def test_a_damaged_record_is_put_aside(tmp_path, text, capsys):
  (tmp_path / "run.json").write_text(text)
  with record.session(tmp_path, "1"):
    pass
  assert len(sessions(tmp_path)) == 1
  assert (tmp_path / "run.json.damaged").read_text() == text
  assert "run.json is damaged" in capsys.readouterr().err
