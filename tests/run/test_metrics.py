"""Tests what the metrics files hold after a kill and a resume, and what older files read as."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.run import metrics as metrics_module
from grpo_jax.run.metrics import MetricsWriter, OneStepLate, at, read_metrics

NAN = math.nan


def test_one_step_late_writes_a_step_when_the_next_one_arrives(monkeypatch):
  rows, transfers = [], []
  get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(len(tree)) or get(tree))
  late = OneStepLate(lambda step, metrics: rows.append((step, metrics)))
  late.push(4, {"loss": jnp.float32(0.5), "n": jnp.int32(3), "host": 1.5})
  assert rows == []
  assert transfers == []
  late.push(5, {"loss": jnp.bfloat16(0.25)})
  assert rows == [(4, {"loss": 0.5, "n": 3, "host": 1.5})]
  assert transfers == [3]  # one transfer per step, not one per metric
  assert all(type(value) in (float, int) for value in rows[0][1].values())
  late.flush()
  late.flush()
  assert rows[1:] == [(5, {"loss": 0.25})]


def test_one_step_late_works_under_a_transfer_guard():
  rows = []
  with jax.transfer_guard("disallow"):
    late = OneStepLate(lambda step, metrics: rows.append(metrics))
    late.push(0, {"loss": jax.device_put(np.float32(0.5))})
    late.flush()
  assert rows == [{"loss": 0.5}]


def test_one_step_late_names_a_metric_that_is_not_a_number():
  late = OneStepLate(lambda step, metrics: None)
  late.push(0, {"kl": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"metric 'kl' has shape \(3,\)"):
    late.flush()


def test_metrics_are_written_as_json_lines_at_once(tmp_path):
  workdir = tmp_path / "new" / "run"
  writer = MetricsWriter(workdir, total_steps=3)
  writer.write(0, {"reward": 0.5, "kl": NAN, "accuracy": np.float32(0.25), "num_tokens": 7})
  assert (workdir / "metrics.jsonl").read_text().splitlines() == [
    '{"step": 0, "accuracy": 0.25, "kl": null, "num_tokens": 7, "reward": 0.5}'
  ]
  writer.write(1, {"reward": math.inf, "eval/accuracy": None})
  writer.close()
  writer.close()
  assert read_metrics(workdir)[1] == {"step": 1, "eval/accuracy": None, "reward": None}


@pytest.mark.parametrize("value", ["0.5", np.zeros(2), [1.0]])
def test_a_metric_must_be_a_number(tmp_path, value):
  with MetricsWriter(tmp_path, 1) as writer, pytest.raises(ValueError, match="metric 'kl' is"):
    writer.write(0, {"kl": value})
  with MetricsWriter(tmp_path, 1) as writer, pytest.raises(ValueError, match="not named 'step'"):
    writer.write(0, {"step": 1.0})


def run(workdir, steps, total=8, resume_step=None):
  with MetricsWriter(workdir, total, resume_step, show=False) as writer:
    for step in steps:
      writer.write(step, {"reward": step / 10})
      writer.write_samples(step, [{"prompt": "p", "completion": "c", "reward": step}])


def test_a_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
  run(tmp_path / "whole", range(8))
  run(tmp_path / "parts", range(6))
  path = tmp_path / "parts" / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + b'{"step": 6, "rew')  # killed while writing
  run(tmp_path / "parts", range(4, 8), resume_step=4)
  assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  names = [p.name for p in sorted((tmp_path / "parts" / "samples").iterdir())]
  assert names == [f"step_{step:06d}.jsonl" for step in range(8)]
  assert not list((tmp_path / "parts").glob(".*"))


def test_resuming_removes_samples_of_steps_that_will_run_again(tmp_path):
  run(tmp_path, range(6))
  MetricsWriter(tmp_path, 8, resume_step=4).close()
  assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [
    f"step_{step:06d}.jsonl" for step in range(4)
  ]
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_last_line_without_a_newline_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "reward": 0.1}\n{"step": 1, "reward": 0.2}')
  run(tmp_path, [2], resume_step=2)
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_run_that_starts_over_starts_its_file_over(tmp_path):
  run(tmp_path, range(3))
  run(tmp_path, range(2))
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_kill_while_rewriting_keeps_the_old_file(tmp_path, monkeypatch):
  run(tmp_path, range(6))
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def kill(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics_module.os, "replace", kill)
  with pytest.raises(KeyboardInterrupt):
    MetricsWriter(tmp_path, 8, resume_step=2)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a line of metrics"):
    read_metrics(tmp_path)


def test_samples_are_json_lines_even_with_numpy_values_and_nan(tmp_path):
  with MetricsWriter(tmp_path, 1) as writer:
    path = writer.write_samples(12, [{"reward": np.float32(NAN), "ids": np.arange(2), "ok": True}])
  assert path == tmp_path / "samples" / "step_000012.jsonl"
  assert json.loads(path.read_text()) == {"reward": None, "ids": [0, 1], "ok": True}


def test_metrics_of_earlier_versions_are_read_under_their_new_names(tmp_path):
  """Reading renames; the lines of the file stay as they were written."""
  old = '{"step": 0, "dynamic_sampling/refills": 2, "reward": 0.5}\n'
  (tmp_path / "metrics.jsonl").write_text(old)
  with MetricsWriter(tmp_path, 2, resume_step=1, show=False) as writer:
    writer.write(1, {"dynamic_sampling/resamples": 3})
  assert read_metrics(tmp_path) == [
    {"step": 0, "dynamic_sampling/resamples": 2, "reward": 0.5},
    {"step": 1, "dynamic_sampling/resamples": 3},
  ]
  assert at(tmp_path, 0, "dynamic_sampling/") == {"dynamic_sampling/resamples": 2}
  assert (tmp_path / "metrics.jsonl").read_text().startswith(old)


def test_metrics_are_found_by_step_and_by_name(tmp_path):
  with MetricsWriter(tmp_path, 3, show=False) as writer:
    writer.write(0, {"eval/accuracy": 0.25, "eval/missing": NAN})
    writer.write(0, {"reward": 0.5, "num_tokens": 10})
    writer.write(1, {"reward": NAN, "num_tokens": 20})
  found = at(tmp_path, 0, "eval/")
  assert found.keys() == {"eval/accuracy", "eval/missing"}
  assert found["eval/accuracy"] == 0.25
  assert math.isnan(found["eval/missing"])
  assert at(tmp_path, 1, "eval/") == {}
