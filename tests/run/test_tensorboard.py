"""Tests that TensorBoard event files hold the metrics, and hide what a resume runs again."""

import pytest
from tensorboardX.proto.event_pb2 import Event

from grpo_jax.run import tensorboard
from grpo_jax.run.tensorboard import TensorBoardWriter


def read_events(folder):
  """Returns the events of all files, in order. A record is length, checksum, event, checksum."""
  events = []
  for path in sorted(folder.iterdir()):
    content, start = path.read_bytes(), 0
    while start < len(content):
      size = int.from_bytes(content[start : start + 8], "little")
      events.append(Event.FromString(content[start + 12 : start + 12 + size]))
      start += size + 16
  return events


def write(folder, steps, start_step=0):
  writer = TensorBoardWriter(folder, start_step)
  for step in steps:
    writer.write(step, {"reward": step / 10, "kl": 2.0})
  writer.close()
  writer.close()


def test_events_hold_the_metrics_of_each_step(tmp_path):
  write(tmp_path / "new" / "folder", range(3))
  events = read_events(tmp_path / "new" / "folder")
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert scalars == [
    (step, name, pytest.approx(value))
    for step in range(3)
    for name, value in (("reward", step / 10), ("kl", 2.0))
  ]
  assert not [event for event in events if event.HasField("session_log")]


def test_a_resumed_run_hides_the_steps_that_it_runs_again(tmp_path):
  """The second file tells TensorBoard to forget step 2 and later ones of the first."""
  folder = tmp_path / "tensorboard"
  write(folder, range(4))
  write(folder, range(2, 5), start_step=2)
  assert len(list(folder.iterdir())) == 2  # written within a second, by the same process
  events = read_events(folder)
  assert [event.step for event in events if event.HasField("session_log")] == [2]
  steps = [event.step for event in events if event.summary.value]
  assert sorted(steps) == [0, 1, 2, 2, 3, 3, 4]


def test_events_reach_the_disk_within_the_flush_time(tmp_path, monkeypatch):
  monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 1000.0)
  writer = TensorBoardWriter(tmp_path, 0)
  writer.write(0, {"reward": 0.5})
  writer.write(1, {"reward": 0.5})  # buffered: the first write has just flushed
  assert [event.step for event in read_events(tmp_path) if event.summary.value] == [0]
  monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", -1.0)
  writer.write(2, {"reward": 0.5})
  assert [event.step for event in read_events(tmp_path) if event.summary.value] == [0, 1, 2]
  writer.close()
