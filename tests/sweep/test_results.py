"""Tests means and standard errors over seeds, by hand."""

import json
import math

import pytest

from grpo_jax.sweep.results import Row, last_value, metrics_of, rows_of, table, to_json
from grpo_jax.sweep.states import FINISHED, UNFINISHED, State

RUNS = {
  "a0": {"optimizer.learning_rate": "1e-5", "seed": "0"},
  "a1": {"optimizer.learning_rate": "1e-5", "seed": "1"},
  "a2": {"optimizer.learning_rate": "1e-5", "seed": "2"},
  "b0": {"optimizer.learning_rate": "3e-5", "seed": "0"},
  "b1": {"optimizer.learning_rate": "3e-5", "seed": "1"},
}
STATES = dict.fromkeys(RUNS, State(FINISHED)) | {"b1": State(UNFINISHED, 3)}
VALUES = {"a0": 0.2, "a1": 0.4, "a2": 0.6, "b0": 0.5, "b1": 0.9}


def test_means_are_over_finished_seeds():
  a, b = rows_of(RUNS, STATES, VALUES)
  # The deviation of 0.2, 0.4, 0.6 is 0.2 (ddof=1).
  assert a.mean == pytest.approx(0.4)
  assert a.standard_error == pytest.approx(0.2 / math.sqrt(3))
  assert (b.mean, b.standard_error, b.runs, b.values) == (0.5, None, 2, {"0": 0.5})


def test_the_table_shows_what_is_counted():
  rows = rows_of(RUNS, STATES, VALUES)
  assert table(rows, "eval/accuracy").splitlines() == [
    "learning_rate  runs  eval/accuracy  by seed",
    "1e-5           3/3   0.400 ± 0.115  0: 0.2, 1: 0.4, 2: 0.6",
    "3e-5           1/2   0.5            0: 0.5",
  ]


@pytest.mark.parametrize(
  ("values", "text"),
  [
    ({}, "-"),
    ({"0": 0.5}, "0.5"),
    ({"0": 0.5, "1": 0.5}, "0.5 ± 0"),
    ({"0": 100.0, "1": 120.0}, "110 ± 10"),
    ({"0": 0.0001, "1": 0.0003}, "0.00020 ± 0.00010"),
  ],
)
def test_means_have_the_digits_of_their_errors(values, text):
  line = table([Row({}, 2, values)], "m").splitlines()[1]
  assert line[len("runs  ") :].split("  ")[0] == text


def test_without_seeds_every_run_is_a_row():
  runs = {"a": {"algorithm.name": "grpo"}, "b": {"algorithm.name": "dapo"}}
  states = dict.fromkeys(runs, State(FINISHED))
  rows = rows_of(runs, states, {"a": 0.1, "b": None})
  assert table(rows, "reward").splitlines() == [
    "name  runs  reward",
    "grpo  1/1   0.1",
    "dapo  0/1   -",
  ]


def test_the_last_number_of_a_metric_counts(tmp_path):
  lines = [{"step": 0, "m": 1.0}, {"step": 1, "m": 2.0}, {"step": 2, "m": None}, {"step": 3}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert last_value(tmp_path, "m") == 2.0
  assert last_value(tmp_path, "n") is None
  assert last_value(tmp_path / "none", "m") is None
  assert metrics_of([tmp_path, tmp_path / "none"]) == ["m", "step"]


def test_json_holds_runs_and_rows():
  rows = rows_of(RUNS, STATES, VALUES)
  tree = json.loads(json.dumps(to_json(RUNS, "m", STATES, VALUES, rows)))
  assert tree["runs"]["b1"] == {
    "settings": RUNS["b1"], "state": "unfinished", "steps": 3, "reason": "", "value": 0.9,
  }  # fmt: skip
  assert tree["rows"][1]["standard_error"] is None
  assert tree["rows"][0]["settings"] == {"optimizer.learning_rate": "1e-5"}
