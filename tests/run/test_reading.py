"""Tests reading a checkpoint beside a run that saves and deletes: a real race, and each case."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint, holding, reading
from grpo_jax.run.workdir import WorkdirError

# Saves without a pause and keeps one checkpoint; its arrays hold the number of the step.
WRITER = """
import sys, time
import jax.numpy as jnp, optax
from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint
with checkpoint.Checkpoints(sys.argv[1], keep=1) as checkpoints:
  for step in range(1, 100_000):
    params = {name: jnp.full((40, 50), float(step)) for name in "abcdef"}
    checkpoints.save(step, TrainState(jnp.int32(step), params, optax.adam(0.1).init(params)))
"""


def params_of(step):
  return {name: jnp.full((4, 5), float(step)) for name in "ab"}


def save(workdir, steps, keep=9):
  with checkpoint.Checkpoints(workdir, keep=keep) as checkpoints:
    for step in steps:
      state = TrainState.create(params_of(step), optax.adam(0.1))
      checkpoints.save(step, state)


def all_equal(params, step):
  return all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(params))


def test_readers_beside_a_run_that_saves_and_deletes(tmp_path):
  writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
  try:
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("[0-9]*")):
      assert writer.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.05)
    steps, number = [], 0
    while len(steps) < 10 or len(set(steps)) < 6:
      assert time.monotonic() < deadline
      number += 1
      like = {name: jnp.zeros((40, 50)) for name in "abcdef"} if number % 2 else None
      step, params = reading.read_params(tmp_path, like=like)
      assert all_equal(params, step)
      steps.append(step)
    assert writer.poll() is None, "the writer has to run all the time"
    assert sorted(steps) == steps
  finally:
    writer.kill()
    writer.wait()


def test_a_checkpoint_that_is_read_is_not_deleted(tmp_path):
  save(tmp_path, [1], keep=1)
  folder = checkpoint.folder(tmp_path)

  def slow(path):
    save(tmp_path, [2, 3], keep=1)
    return sorted(p.name for p in folder.iterdir())

  assert reading.read_newest(tmp_path, slow) == (1, ["1", "3"])
  save(tmp_path, [4], keep=1)  # it goes with the next one
  assert [p.name for p in folder.iterdir()] == ["4"]
  assert not holding.held(folder / "4" / checkpoint.DIGESTS)


def test_a_checkpoint_that_vanishes_is_not_damage(tmp_path, monkeypatch, capsys):
  """The run had decided on the deletion before the reader came."""
  monkeypatch.setattr(holding.KeepNewest, "should_preserve", _newest_only)
  save(tmp_path, [1], keep=1)
  read = []

  def once_too_late(path):
    read.append(path.name)
    if len(read) == 1:
      save(tmp_path, [2], keep=1)
      raise KeyError("a file that is gone")
    return "value"

  assert reading.read_newest(tmp_path, once_too_late) == (2, "value")
  assert read == ["1", "2"]
  assert capsys.readouterr().err == ""


def _newest_only(self, checkpoints, *, context):
  return [i == len(checkpoints) - 1 for i in range(len(checkpoints))]


def test_the_newest_without_damage_is_read(tmp_path, capsys):
  save(tmp_path, [1, 2, 3])
  for step in (2, 3):
    flip_a_bit(checkpoint.folder(tmp_path) / str(step))
  step, params = reading.read_params(tmp_path)
  assert (step, all_equal(params, 1)) == (1, True)
  warnings = capsys.readouterr().err.splitlines()
  assert [line[:32] for line in warnings] == [
    f"warning: checkpoint {n} is damaged:"[:32] for n in (3, 2)
  ]
  with pytest.raises(WorkdirError, match=r"are damaged:\n  - 2: .*other contents"):
    reading.read_params(tmp_path, step=2)
  flip_a_bit(checkpoint.folder(tmp_path) / "1")
  with pytest.raises(WorkdirError, match=r"(?s)are damaged:\n  - 3: .*\n  - 1: "):
    reading.read_params(tmp_path)


def flip_a_bit(folder):
  files = [path for path in (folder / "default" / "ocdbt.process_0" / "d").iterdir()]
  file = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def test_an_error_of_the_reader_itself_is_raised(tmp_path):
  save(tmp_path, [1])

  def fails(path):
    raise ZeroDivisionError("mine")

  with pytest.raises(ZeroDivisionError, match="mine"):
    reading.read_newest(tmp_path, fails)


def test_what_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no checkpoints: not the work directory"):
    reading.read_params(tmp_path)
  save(tmp_path, [1, 4])
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .*there are: \[1, 4\]"):
    reading.read_params(tmp_path, step=2)
  assert all_equal(reading.read_params(tmp_path, step=1)[1], 1)
  for path in checkpoint.folder(tmp_path).iterdir():
    shutil.rmtree(path)
  (checkpoint.folder(tmp_path) / "5.orbax-checkpoint-tmp").mkdir()
  with pytest.raises(FileNotFoundError, match="there is no complete checkpoint in"):
    reading.read_params(tmp_path)


def test_a_reader_changes_nothing(tmp_path):
  save(tmp_path, [1])
  before = {p: p.read_bytes() for p in Path(tmp_path).rglob("*") if p.is_file()}
  reading.read_params(tmp_path)
  assert {p: p.read_bytes() for p in Path(tmp_path).rglob("*") if p.is_file()} == before
