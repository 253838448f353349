"""Tests what the report reads of a run: whole, killed, damaged, or none at all."""

import json

import pytest

from grpo_jax.config import default_config
from grpo_jax.core.diagnosis import Finding
from grpo_jax.report import data
from grpo_jax.run.health import CHECKS, CURVES
from grpo_jax.run.metrics import read_samples
from tests.helpers.work_directories import make_run


def test_a_run_is_read(tmp_path):
  run = data.RunData(make_run(tmp_path / "run", steps=10), "run")
  summary = run.summary()
  assert summary["steps"] == 10
  assert summary["config"]["rollout.group_size"] == 8
  assert summary["metrics"]["num_tokens"] == [list(range(10)), [100 * (i + 1) for i in range(10)]]
  assert summary["metrics"]["eval/n"] == [[0, 5, 10], [8, 8, 8]]
  assert "loss" not in summary["metrics"]  # null at each step
  assert summary["problems"] == []
  files = [(file.kind, file.step) for file in data.sample_files(run.folder)]
  assert files[:3] == [("eval", 0), ("step", 0), ("step", 1)]
  assert files[-1] == ("eval", 10)
  json.dumps(summary, allow_nan=False)


def test_the_record_of_the_last_session(tmp_path):
  folder = make_run(tmp_path / "run", steps=1)
  session = {"start": "2026-01-01", "reason": "finished", "memory": {"optimizer": 7}}
  sessions = [{}, session | {"peak_memory": {"host": 9}, "git": None, "versions": {"jax": "1"}}]
  (folder / "run.json").write_text(json.dumps({"sessions": sessions}))
  found = data.RunData(folder, "run").summary()["provenance"]
  assert (found["memory/optimizer"], found["memory_host"]) == (7, 9)
  assert (found["sessions"], found["reason"], found["jax"]) == (2, "finished", "1")
  assert found["commit"] is None


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is not a folder: give the work directory of a run"):
    data.named([str(tmp_path / "none")])
  with pytest.raises(ValueError, match=r"holds neither config\.json nor metrics\.jsonl"):
    data.named([str(tmp_path)])
  run = str(make_run(tmp_path / "run"))
  with pytest.raises(ValueError, match="is given twice"):
    data.named([run, str(tmp_path / "other" / ".." / "run")])


def test_names_are_as_long_as_they_have_to_be(tmp_path):
  folders = [make_run(tmp_path / name) for name in ("a/run", "b/run", "b/other")]
  assert [run.name for run in data.named(list(map(str, folders)))] == ["a/run", "b/run", "b/other"]
  assert [run.name for run in data.named(list(map(str, folders[1:])))] == ["run", "other"]


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
  folder = make_run(tmp_path / "run", steps=10)
  text = (folder / "metrics.jsonl").read_text()
  (folder / "metrics.jsonl").write_text(text[: len(text) // 2])
  samples = folder / "samples/step_000003.jsonl"
  samples.write_text(samples.read_text()[:-40])
  run = data.RunData(folder, "run")
  assert 0 < len(run.summary()["metrics"]["reward"][0]) < 10
  assert run.problems == []
  rows, damaged = read_samples(samples)
  assert (len(rows), damaged) == (15, 1)


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("config.json", "{", "config.json"),
    ("metrics.jsonl", "no metrics\n{}\n", "metrics.jsonl, line 1: not a line of metrics"),
    ("metrics.jsonl", '{"step": 0}\n[]\n{"step": 1}\n', "line 2"),
  ],
)
def test_a_damaged_file_is_a_problem_that_is_shown(tmp_path, name, text, message):
  folder = make_run(tmp_path / "run")
  (folder / name).write_text(text)
  summary = data.RunData(folder, "run").summary()
  assert any(message in problem for problem in summary["problems"])
  json.dumps(summary, allow_nan=False)


def test_a_run_without_config_or_without_metrics(tmp_path):
  folder = make_run(tmp_path / "run")
  (folder / "config.json").unlink()
  summary = data.RunData(folder, "run").summary()
  assert summary["config"] == {}
  assert len(summary["metrics"]["reward"][0]) == 20
  other = make_run(tmp_path / "other")
  (other / "metrics.jsonl").unlink()
  assert data.RunData(other, "other").summary()["metrics"] == {}


def test_findings_say_since_when_they_hold():
  """The reward of this run never rises, which is a finding from 15 steps on."""
  rows = [{"step": i, "reward": 0.1 + 0.1 * (i % 2), "accuracy": 0.0} for i in range(80)]
  found = {f["name"]: f for f in data.findings(rows, default_config())}
  assert found["flat_reward"]["confidence"] == "sure"
  assert found["flat_reward"]["metric"] == "reward"
  assert 14 <= found["flat_reward"]["since"] <= 16


def test_a_finding_begins_where_it_has_held_from_on(monkeypatch):
  """It is seen in rows 10 to 19 and from 30 on: it holds since 30."""
  finding = Finding("flat_reward", "seen", "reason", "advice", "sure")

  def examine(rows, config):
    return [finding] if 10 < len(rows) <= 20 or len(rows) > 30 else []

  monkeypatch.setattr(data, "examine", examine)
  found = data.findings([{"step": i, "reward": 0.0} for i in range(40)], object())
  assert [f["since"] for f in found] == [30]


def test_every_finding_has_a_curve():
  assert set(CURVES) == set(CHECKS)


def test_rows_that_are_no_completions_are_counted(tmp_path):
  path = tmp_path / "step_000000.jsonl"
  path.write_text('{"prompt": "a", "completion": "b"}\n[1]\n{"completion": "c"}\nnull\n\n"x"\n')
  assert read_samples(path) == ([{"prompt": "a", "completion": "b"}], 4)
  assert read_samples(tmp_path / "none.jsonl") == ([], 1)


def test_completions_of_a_prompt_are_one_group():
  rows = [
    {"prompt": p, "key": k, "completion": c, "columns": {"big": 1}, "answer": 3}
    for p, k, c in (("1+2=", "a", "3"), ("1+2=", "b", "4"), ("1+2=", "a", "5"))
  ]
  found = data.groups(rows)
  assert len({group.pop("id") for group in found}) == 2
  assert found == [
    {"prompt": "1+2=", "key": k, "answer": 3, "completions": [{"completion": c} for c in texts]}
    for k, texts in (("a", "35"), ("b", "4"))
  ]


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [
    ("  1 + 1 =\n", "1 + 1 ="),
    ("x" * 300, "…" + "x" * 160),
    ([{"role": "user", "content": "hello"}], "hello"),
    ([], ""),
    ([{"role": "user", "content": None}], "None"),
  ],
)
def test_label(prompt, expected):
  assert data.label(prompt) == expected
