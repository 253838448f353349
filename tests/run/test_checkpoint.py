"""Checkpoints that are damaged, and what is done about it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint, workdir


def state_after(step):
  """Some state that differs from step to step, of two arrays and a scalar."""
  params = {"w": jnp.arange(600.0).reshape(20, 30) + step, "b": jnp.full((4,), 0.5 * step)}
  opt_state = optax.adam(0.1).init(params)
  return TrainState(jnp.int32(step), params, jax.tree.map(lambda a: a + step, opt_state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work directory with checkpoints 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_after(step))
  return folder


@pytest.fixture
def run(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "run"))


def data_file(run, step):
  """The file with the arrays of a checkpoint."""
  files = (run / "checkpoints" / str(step) / "default" / "ocdbt.process_0" / "d").iterdir()
  return max(files, key=lambda path: path.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[:-7])


def resumed(run, **options):
  """(step, state, the lines told)."""
  lines = []
  with checkpoint.Checkpoints(run, keep=3, **options) as checkpoints:
    return *checkpoints.resume(state_after(0), lines.append), lines


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def everything(run):
  return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_has_the_digests_of_its_files_and_comes_back(run):
  before = everything(run)
  step, state, lines = resumed(run)
  assert (step, lines) == (3, [])
  assert same(state, state_after(3))
  assert everything(run) == before
  folder = run / "checkpoints" / "3"
  digests = json.loads((folder / checkpoint.DIGESTS).read_text())
  name = str(data_file(run, 3).relative_to(folder))
  assert digests[name][0] == data_file(run, 3).stat().st_size
  unlisted = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
  unlisted -= set(digests)
  assert unlisted == {checkpoint.DIGESTS, "_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (flip, " has other contents than were written"),
    (cut, " bytes instead of "),
    (lambda path: path.unlink(), " is missing"),
  ],
)
def test_the_previous_good_one_is_used_and_it_is_said(run, harm, message):
  name = data_file(run, 3).name
  harm(data_file(run, 3))
  flip(data_file(run, 2))
  damaged = data_file(run, 2).read_bytes()
  step, state, lines = resumed(run)
  assert step == 1
  assert same(state, state_after(1))
  assert lines[0].startswith("checkpoint 3 is damaged: default/ocdbt.process_0/d/" + name)
  assert message in lines[0]
  assert lines[0].endswith(f"it is kept in {run / 'damaged'}")
  assert lines[1].startswith("checkpoint 2 is damaged: ")
  assert lines[2] == "continuing from checkpoint 1, the newest that is whole"
  # They are not in the way of those steps, and are not deleted.
  with checkpoint.Checkpoints(run, keep=3) as checkpoints:
    checkpoints.save(2, state_after(2))
  assert same(resumed(run)[1], state_after(2))
  assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "3"]
  flip(data_file(run, 2))
  assert resumed(run)[0] == 1
  assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "2-2", "3"]
  kept = next((run / "damaged" / "2").rglob("ocdbt.process_0/d")).iterdir()
  assert damaged in [path.read_bytes() for path in kept]


def test_no_good_one_is_an_error_and_nothing_is_touched(run):
  for step in (1, 2, 3):
    flip(data_file(run, step))
  before = everything(run)
  with pytest.raises(workdir.WorkdirError) as caught:
    resumed(run)
  text = str(caught.value)
  assert f"every checkpoint in {run / 'checkpoints'} is damaged" in text
  assert "- 1: default/" in text
  assert "- 3: default/" in text
  assert "Put back a copy of one of them" in text
  assert everything(run) == before


def test_without_digests_a_checkpoint_counts_if_it_can_be_read(run):
  (run / "checkpoints" / "3" / checkpoint.DIGESTS).unlink()
  assert checkpoint.damage(run / "checkpoints" / "3") is None
  assert resumed(run)[0] == 3
  (run / "checkpoints" / "3" / "default" / "_METADATA").write_text("{")
  step, state, lines = resumed(run)
  assert step == 2
  assert same(state, state_after(2))
  assert f"it has no {checkpoint.DIGESTS} and cannot be read" in lines[0]


def test_damaged_digests_are_damage(run):
  cut(run / "checkpoints" / "3" / checkpoint.DIGESTS)
  step, _, lines = resumed(run)
  assert step == 2
  assert f"{checkpoint.DIGESTS} cannot be read" in lines[0]


def test_each_of_several_hosts_reads_its_share(run):
  folder = run / "checkpoints" / "3"
  flip(data_file(run, 3))
  found = [checkpoint.damage(folder, host, 3) for host in range(3)]
  assert sorted(map(len, found)) == [0, 0, 1]
  assert checkpoint.damage(folder) == [text for part in found for text in part]


def test_readers_change_nothing(run):
  flip(data_file(run, 3))
  (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # a run beside is writing it
  before = everything(run)
  step, _, lines = resumed(run, read_only=True)
  assert step == 2
  assert lines[0].endswith("it is left out")
  assert everything(run) == before
  assert (run / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
  assert resumed(run)[0] == 2
  assert not (run / "checkpoints" / "4.orbax-checkpoint-tmp").exists()


def test_none_at_all_is_a_start(tmp_path):
  step, state, lines = resumed(tmp_path)
  assert (step, lines) == (0, [])
  assert same(state, state_after(0))


def test_a_save_that_fails_is_explained(run):
  """Here, because a file stands where the folder of the checkpoints was."""
  checkpoints = checkpoint.Checkpoints(run, keep=3)
  (run / "checkpoints").rename(run / "elsewhere")
  (run / "checkpoints").write_text("")
  with pytest.raises(checkpoint.SaveError) as caught:
    checkpoints.save(4, state_after(4))
  assert "the checkpoint of step 4 could not be saved: " in str(caught.value)
  assert "MiB are free on the file system at " in str(caught.value)
