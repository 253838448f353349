"""Tests that a work directory written by version 0.1.0 continues, evaluates and exports.

`tests/data/run_0_1_0/run` holds steps 0 and 1 of a run of 4 steps by that version, on one device,
and `expected` what the same version wrote when it ran all 4. `experiment.py` is its experiment,
with the names that fields and values had then.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import export
from grpo_jax.models.load import load
from grpo_jax.run.metrics import read_metrics

DATA = Path("tests/data/run_0_1_0")
NEWER = {"rewards/raised", "time/sampling", "time/rewards"}  # 0.1.0 did not write these
TIMES = ("step_time", "tokens_per_second")
# Names of fields and values then, and the names of today.
RENAMED = {
  "rollout.max_refills": "rollout.max_resamples",
  'train.reduction = "ordered"': 'train.reduction = "deterministic"',
  "train.slots": "train.chunks",
  'model.attention = "blocks"': 'model.attention = "tiled"',
}


def with_new_names(experiment):
  """The text of the experiment with the names of today."""
  text = experiment.read_text()
  for old, new in RENAMED.items():
    assert text.count(old) == 1
    text = text.replace(old, new)
  return text


def run(module, *arguments):
  """The output of a command of the package, which must succeed, on a single CPU device."""
  environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
  completed = subprocess.run(
    [sys.executable, "-m", f"grpo_jax.{module}", *map(str, arguments)],
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  assert completed.returncode == 0, completed.stdout
  return completed.stdout


@pytest.fixture
def workdir(tmp_path):
  return Path(shutil.copytree(DATA / "run", tmp_path / "run"))


def samples_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_rows_agree(rows, expected):
  assert len(rows) == len(expected)
  for row, expected_row in zip(rows, expected):
    assert set(row) - NEWER == set(expected_row)
    for name in set(expected_row) - set(TIMES):
      if expected_row[name] is None:
        assert row[name] is None, name
      else:
        assert row[name] == pytest.approx(expected_row[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("names", ["old", pytest.param("today", marks=pytest.mark.slow)])
def test_a_run_continues_as_if_it_had_not_been_interrupted(workdir, tmp_path, names):
  experiment = DATA / "experiment.py"
  if names == "today":
    experiment = tmp_path / "experiment.py"
    experiment.write_text(with_new_names(DATA / "experiment.py"))
  output = run("train", "--config", experiment, "--workdir", workdir)
  for line in (
    "the field 'max_refills' is now called 'max_resamples'",
    "the field 'slots' is now called 'chunks'",
    "reduction='ordered' is now called reduction='deterministic'",
    "attention='blocks' is now called attention='tiled'",
  ):
    # The config.json of the work directory holds the old names in both cases.
    assert output.count(line) == 1
  rows = read_metrics(workdir)
  assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3]
  assert rows[:3] == read_metrics(DATA / "run")[:3]
  assert rows[1]["dynamic_sampling/resamples"] == 0  # written as `dynamic_sampling/refills`
  # The evaluation at the end of the first two steps stays; the run of four steps had none there.
  ended = [row for row in rows if row["step"] == 2 and "eval/n" in row]
  assert ended == [row for row in read_metrics(DATA / "run") if row["step"] == 2]
  assert_rows_agree([row for row in rows if row not in ended], read_metrics(DATA / "expected"))
  for path in (DATA / "expected" / "samples").iterdir():
    pairs = zip(samples_of(workdir / "samples" / path.name), samples_of(path), strict=True)
    for row, expected in pairs:
      assert {name: row[name] for name in expected} == expected, path.name
  config = json.loads((workdir / "config.json").read_text())
  assert (config["train"]["chunks"], config["rollout"]["max_resamples"]) == (4, 1)
  assert not {"slots", "max_refills"} & {*config["train"], *config["rollout"]}


@pytest.mark.slow
def test_a_run_is_evaluated_with_its_own_numbers(workdir, tmp_path):
  """Against the evaluation that the run itself made after step 2."""
  run("evaluate", "--workdir", workdir, "--samples", 0, "--out", tmp_path / "eval")
  [path] = (tmp_path / "eval").glob("*.json")
  metrics = json.loads(path.read_text())
  assert metrics["step"] == 2
  [expected] = [row for row in read_metrics(workdir) if row["step"] == 2]
  for name in set(expected) - {"step"}:
    assert metrics[name] == pytest.approx(expected[name]), name
  [samples] = (tmp_path / "eval").glob("*.jsonl")
  texts = [json.loads(line)["completion"] for line in samples.read_text().splitlines()]
  lines = (workdir / "samples" / "eval_000002.jsonl").read_text().splitlines()
  assert texts == [json.loads(line)["completion"] for line in lines]


def test_a_run_is_exported(workdir, tmp_path, capsys):
  """Rank 2 at alpha 16: every matrix of a layer moves by at most rank 2."""
  command = ["--workdir", str(workdir), "--out"]
  assert export.main([*command, str(tmp_path / "merged")]) == 0
  assert "after 2 steps, trained from random:tiny" in capsys.readouterr().out
  (config, base), (exported, merged) = load("random:tiny"), load(str(tmp_path / "merged"))
  assert exported == config
  for name in ("q", "k", "v", "o", "gate", "up", "down"):
    for moved in merged["layers"][name] - base["layers"][name]:
      assert np.linalg.matrix_rank(moved, tol=1e-5) == 2, name
  np.testing.assert_array_equal(merged["embed"], base["embed"])
  assert export.main([*command, str(tmp_path / "adapters"), "--adapter"]) == 0
  assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
