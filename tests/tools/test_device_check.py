"""Tests the device check: a dry run of all of it, and that no part stops another."""

import json
import os
import sys

import pytest

from tests.helpers.processes import xla_flags
from tools import device_check as tool

EXTRA_ROW = '{"what": "half", "value": 0.5}'


def results(out):
  return json.loads((out / "device.json").read_text())


@pytest.mark.slow
def test_a_dry_run_measures_everything(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XLA_FLAGS", xla_flags())
  assert tool.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
  parts = results(tmp_path)["parts"]
  assert set(parts) == {"install", *(part.name for part in tool.PARTS)}
  assert {part["result"] for part in parts.values()} == {"ok"}
  [machine] = parts["machine"]["rows"]
  assert machine["platform"] == "cpu"
  assert machine["jax"]
  errors = {(row["dtype"], row["precision"]): row for row in parts["precision"]["rows"]}
  assert len(errors) == 6
  assert errors["float32", "highest"]["largest error, nats"] < 1e-5
  assert {row["outcome"] for row in parts["tests"]["rows"]} == {"skipped"}
  benchmarks = parts["benchmarks"]["rows"]
  assert [row.get("way") for row in benchmarks[:2]] == ["head_logprobs", "plain logits"]
  assert benchmarks[2]["of_bound"] > 0
  assert [row["what"] for row in parts["forecast"]["rows"]] == ["forecast", "measured"]
  assert parts["demo"]["rows"][0]["steps"] == 2
  text = (tmp_path / "device.md").read_text()
  assert text.startswith("# A dry run of the device check\n")
  assert "| float32 | highest |" in text


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
  (tmp_path / "good.py").write_text("print('text'); print('{no json'); print('" + EXTRA_ROW + "')")
  (tmp_path / "bad.py").write_text("print('" + EXTRA_ROW + "'); raise SystemExit(7)")
  (tmp_path / "slow.py").write_text(
    "import subprocess, sys, time\n"
    f"print('{EXTRA_ROW}', flush=True)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "time.sleep(60)\n"
  )

  def part(name, seconds=30.0):
    commands = (str(tmp_path / f"{name}.py"),)
    return tool.Part(name, seconds, f"About {name}.", commands, commands)

  monkeypatch.setattr(tool, "PARTS", (part("bad"), part("slow", 1.5), part("good")))
  monkeypatch.setattr(tool, "accelerator", lambda: "cuda")
  monkeypatch.setattr(tool, "sees", lambda python, extra: True)
  out = tmp_path / "out"
  assert tool.main(["--out", str(out)]) == 1
  parts = results(out)["parts"]
  assert [parts[name]["result"] for name in ("bad", "slow", "good")] == [
    "failed with exit code 7, see bad.log", "stopped after 2 s", "ok",
  ]  # fmt: skip
  # What they printed before is kept.
  row = [json.loads(EXTRA_ROW)]
  assert [parts[name]["rows"] for name in ("bad", "slow", "good")] == [row] * 3
  assert parts["slow"]["seconds"] < 20


def test_no_part_begins_when_the_time_is_over(tmp_path, monkeypatch):
  (tmp_path / "part.py").write_text("import time; time.sleep(30)")
  commands = (str(tmp_path / "part.py"),)
  parts = [tool.Part(name, 30.0, "", commands, commands) for name in ("first", "second")]
  monkeypatch.setattr(tool, "PARTS", tuple(parts))
  monkeypatch.setattr(tool, "accelerator", lambda: "tpu")
  monkeypatch.setattr(tool, "sees", lambda python, extra: True)
  assert tool.main(["--out", str(tmp_path / "out"), "--seconds", "1"]) == 1
  for part in results(tmp_path / "out")["parts"].values():
    assert part["seconds"] < 10


def test_a_machine_without_an_accelerator_is_told_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tool, "accelerator", lambda: "")
  assert tool.main(["--out", str(tmp_path)]) == 2
  assert "there is no GPU and no TPU here; --dry-run" in capsys.readouterr().err


def test_an_environment_is_made_where_this_one_does_not_see_the_devices(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(tool, "sees", lambda python, extra: False)
  monkeypatch.setattr(tool, "run", lambda command, *rest: ran.append(command) or 0)
  report = tool.Report(tmp_path, False)
  python = tool.install(sys.executable, report, tmp_path, "cuda", False)
  assert python == str(tmp_path / "venv" / "bin" / "python")
  assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path / "venv")]
  assert any(word.endswith("[all,test,cuda]") for word in ran[1])
  # Without it, the parts are tried all the same.
  monkeypatch.setattr(tool, "run", lambda command, *rest: 1)
  assert tool.install(sys.executable, report, tmp_path, "cuda", False) == python
  assert report.results["parts"]["install"]["result"] == "failed with exit code 1"


def test_the_parts_take_ten_minutes_at_most():
  assert tool.INSTALL + sum(part.seconds for part in tool.PARTS) <= tool.TOTAL


@pytest.mark.parametrize(
  ("extra", "platforms"), [("cuda", "cuda,cpu"), ("tpu", "tpu,cpu"), ("", "cpu")]
)
def test_the_platform_is_named(extra, platforms):
  assert tool.environment_of(extra)["JAX_PLATFORMS"] == platforms
  assert tool.environment_of(extra)["PATH"] == os.environ["PATH"]


def test_outcomes_of_tests_become_rows():
  text = "tests/a/test_b.py::test_c[x-1] PASSED    [ 50%]\ntests/a/test_b.py::test_d FAILED\nmore\n"
  assert tool.rows_of(text) == [
    {"test": "test_b.py::test_c[x-1]", "outcome": "passed"},
    {"test": "test_b.py::test_d", "outcome": "failed"},
  ]
