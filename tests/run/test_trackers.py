"""Tests trackers with the real packages, offline, and that none of them can stop a run."""

import json
import sqlite3
import sys

import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.run import trackers
from grpo_jax.run.metrics import MetricsWriter
from grpo_jax.run.trackers import Guarded, Session, as_table

TINY = "experiments/tiny.py"
QUICK = [
  f"--config.{line}" for line in (
    "rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.completion_length=3",
    "rewards.workers=0", "log.samples_every=1", "task.settings.eval_size=2",
  )
]  # fmt: skip
SAMPLES = [
  {
    "prompt": "1+1=",
    "completion": "<b>2</b>",
    "reward": 1.0,
    "rewards": {"exact": 1.0},
    "key": "a",
  },
  {"prompt": [{"role": "user", "content": "hi"}], "completion": "\u202ex", "reward": None},
]


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """Keeps both packages on this machine, and in a folder of the test."""
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  for name in [n for n in sys.modules if n.split(".")[0] == "trackio"]:
    monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported


class Recorder:
  """A tracker that keeps what it is told, and fails where it should."""

  def __init__(self, session, fails=""):
    self.session, self.fails, self.calls = session, fails, []
    self.call("open")

  def call(self, name, *arguments):
    self.calls.append((name, *arguments))
    if name == self.fails:
      raise RuntimeError("the server said no")

  def write(self, step, metrics):
    self.call("write", step, dict(metrics))

  def write_samples(self, step, samples):
    self.call("samples", step, len(samples))

  def close(self):
    self.call("close")


@pytest.fixture
def recorder(monkeypatch):
  """Puts recording trackers in the place of TensorBoard; returns those that were opened."""
  opened = []

  def use(fails=""):
    def make(session):
      opened.append(Recorder(session, "" if fails == "open" else fails))
      if fails == "open":
        raise RuntimeError("the server said no")
      return opened[-1]

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", make)
    return opened

  return use


def test_a_tracker_gets_metrics_samples_and_what_the_run_is(tmp_path, recorder):
  opened = recorder()
  train.run(load(TINY, [*QUICK, "--config.steps=2"]), tmp_path / "run")
  [tracker] = opened
  names = [call[0] for call in tracker.calls]
  assert names.count("close") == 1
  assert names[-1] == "close"
  assert [call[1:] for call in tracker.calls if call[0] == "samples"] == [(0, 16), (1, 16)]
  written = [call[2] for call in tracker.calls if call[0] == "write"]
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  recorded = [
    {name: v for name, v in json.loads(line).items() if name != "step" and v is not None}
    for line in lines
  ]
  assert written == recorded
  about = tracker.session.about
  assert about["config"]["steps"] == 2
  assert about["session"]["versions"]["jax"]
  assert "git" in about["session"]
  json.dumps(about)


@pytest.mark.parametrize("fails", ["open", "write", "samples", "close"])
def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(tmp_path, recorder, fails, capsys):
  opened = recorder(fails)
  with MetricsWriter(tmp_path, 3, show=False) as writer:
    for step in range(3):
      writer.write(step, {"reward": 0.5})
      writer.track_samples(step, SAMPLES)
  err = capsys.readouterr().err
  assert err.count("warning: log.trackers: tensorboard failed and is left out from here on: ") == 1
  assert "RuntimeError: the server said no" in err
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
  [tracker] = opened
  assert [call[0] for call in tracker.calls].count(fails) == 1


def test_the_id_of_a_run_stays_and_a_damaged_file_is_replaced(tmp_path):
  session = Session(tmp_path, 0)
  first = session.id("wandb")
  assert Session(tmp_path, 5).id("wandb") == first != session.id("trackio")
  assert session.id("wandb") == first
  (tmp_path / trackers.IDS).write_text('{"wandb": ')
  assert session.id("wandb") != first


def test_rows_of_a_table():
  columns, rows = as_table(SAMPLES)
  assert columns == ["prompt", "completion", "reward", "rewards"]
  assert rows[0] == ["1+1=", "<b>2</b>", 1.0, '{"exact": 1.0}']
  assert rows[1] == ['[{"role": "user", "content": "hi"}]', "\u202ex", None, None]
  assert len(as_table(SAMPLES * 500)[1]) == trackers.MOST


def test_unknown_missing_and_doubled_trackers_are_config_errors(monkeypatch):
  for option, message in (
    ("('mlflow',)", "log.trackers: unknown tracker 'mlflow'; known: tensorboard, wandb, trackio"),
    ("('wandb','wandb')", "log.trackers names 'wandb' twice"),
  ):
    with pytest.raises(ConfigError, match=message):
      build(load(TINY, [f"--config.log.trackers={option}"]))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r"log.trackers=wandb needs wandb: pip install 'gr"):
    trackers.check(["wandb"])


# --- the real packages ----------------------------------------------------------------------------


def test_wandb_offline_and_resumed(tmp_path, offline):
  for start in (0, 2):
    tracker = Guarded("wandb", Session(tmp_path, start, {"config": {"seed": 7}}))
    for step in range(start, start + 2):
      tracker.write(step, {"reward": 0.25 * step})
      tracker.write_samples(step, SAMPLES)
    tracker.close()
  folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
  run_id = json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
  assert folders
  assert all(run_id in folder.name for folder in folders)
  files = [file.read_bytes() for folder in folders for file in folder.glob("run-*.wandb")]
  assert any(b"reward" in data for data in files)
  tables = [file.read_text() for file in tmp_path.rglob("*.table.json")]
  assert any("<b>2</b>" in text for text in tables)


def test_trackio_keeps_metrics_and_config_and_goes_on(tmp_path, offline):
  (tmp_path / "run").mkdir()
  for start in (0, 2):
    tracker = Guarded("trackio", Session(tmp_path / "run", start, {"config": {"seed": 7}}))
    for step in range(start, start + 2):
      tracker.write(step, {"reward": 0.25 * step})
      tracker.write_samples(step, SAMPLES)
    tracker.close()
  [database] = (tmp_path / "trackio").glob("*.db")
  with sqlite3.connect(database) as connection:
    rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
  run_id = json.loads((tmp_path / "run" / trackers.IDS).read_text())["trackio"]
  assert {name for name, *_ in rows} == {f"run-{run_id[:6]}"}
  rewards = {step: json.loads(m)["reward"] for _, step, m in rows if "reward" in json.loads(m)}
  assert rewards == {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75}
  assert any(b"<b>2</b>" in m for *_, m in rows)
