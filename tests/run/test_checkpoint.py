"""Tests that damaged checkpoints are found and skipped, and that nothing is lost over it."""

import dataclasses
import json
import os
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
  """Returns a state of two arrays and a scalar that differs from step to step."""
  params = {"w": jnp.arange(600.0).reshape(20, 30) + step, "b": jnp.full((4,), 0.5 * step)}
  opt_state = optax.adam(0.1).init(params)
  return TrainState(jnp.int32(step), params, jax.tree.map(lambda a: a + step, opt_state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Returns a work directory with checkpoints 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_after(step))
  return folder


@pytest.fixture
def run(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "run"))


def data_file(run, step):
  """Returns the file with the arrays of a checkpoint."""
  files = (run / "checkpoints" / str(step) / "default" / "ocdbt.process_0" / "d").iterdir()
  return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-7])


def resume(run, **options):
  """Returns (step, state, the lines that were logged)."""
  lines = []
  with checkpoint.Checkpoints(run, keep=3, **options) as checkpoints:
    return *checkpoints.resume(state_after(0), lines.append), lines


def equal(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def contents(run):
  return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_holds_the_digests_of_its_files_and_is_restored(run):
  before = contents(run)
  step, state, lines = resume(run)
  assert (step, lines) == (3, [])
  assert equal(state, state_after(3))
  assert contents(run) == before
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
    (flip_a_bit, " has other contents than were written"),
    (truncate, " bytes instead of "),
    (lambda path: path.unlink(), " is missing"),
  ],
)
def test_the_newest_checkpoint_without_damage_is_used(run, harm, message):
  name = data_file(run, 3).name
  harm(data_file(run, 3))
  flip_a_bit(data_file(run, 2))
  damaged = data_file(run, 2).read_bytes()
  step, state, lines = resume(run)
  assert step == 1
  assert equal(state, state_after(1))
  assert lines[0].startswith("checkpoint 3 is damaged: default/ocdbt.process_0/d/" + name)
  assert message in lines[0]
  assert lines[0].endswith(f"it is kept in {run / 'damaged'}")
  assert lines[1].startswith("checkpoint 2 is damaged: ")
  assert lines[2] == "continuing from checkpoint 1, the newest without damage"
  # The damaged ones are kept, and do not block saving these steps again.
  with checkpoint.Checkpoints(run, keep=3) as checkpoints:
    checkpoints.save(2, state_after(2))
  assert equal(resume(run)[1], state_after(2))
  assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "3"]
  flip_a_bit(data_file(run, 2))
  assert resume(run)[0] == 1
  assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "2-2", "3"]
  files = next((run / "damaged" / "2").rglob("ocdbt.process_0/d")).iterdir()
  assert damaged in [path.read_bytes() for path in files]


def test_damage_to_all_checkpoints_is_an_error_and_nothing_is_changed(run):
  for step in (1, 2, 3):
    flip_a_bit(data_file(run, step))
  before = contents(run)
  with pytest.raises(workdir.WorkdirError) as caught:
    resume(run)
  text = str(caught.value)
  assert f"every checkpoint in {run / 'checkpoints'} is damaged" in text
  assert "- 1: default/" in text
  assert "- 3: default/" in text
  assert "Put back a copy of one of them" in text
  assert contents(run) == before


def test_a_checkpoint_without_digests_is_used_if_it_can_be_read(run):
  (run / "checkpoints" / "3" / checkpoint.DIGESTS).unlink()
  assert checkpoint.find_damage(run / "checkpoints" / "3") is None
  assert resume(run)[0] == 3
  (run / "checkpoints" / "3" / "default" / "_METADATA").write_text("{")
  step, state, lines = resume(run)
  assert step == 2
  assert equal(state, state_after(2))
  assert f"it has no {checkpoint.DIGESTS} and cannot be read" in lines[0]


def test_damaged_digests_count_as_damage(run):
  truncate(run / "checkpoints" / "3" / checkpoint.DIGESTS)
  step, _, lines = resume(run)
  assert step == 2
  assert f"{checkpoint.DIGESTS} cannot be read" in lines[0]


def rewrite(run, change):
  """Changes the digests of checkpoint 3, a dict of name -> [size, SHA-256]."""
  path = run / "checkpoints" / "3" / checkpoint.DIGESTS
  digests = json.loads(path.read_text())
  path.write_text(json.dumps(change(digests)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda digests: {}, f"is not listed in {checkpoint.DIGESTS}"),
    (lambda digests: dict(list(digests.items())[1:]), f"is not listed in {checkpoint.DIGESTS}"),
    (lambda digests: digests | {"/dev/zero": [0, "0"]}, "/dev/zero is missing"),
    (lambda digests: digests | {"../2/_METADATA": [0, "0"]}, "../2/_METADATA is missing"),
    (lambda digests: digests | {"x": [0, "0"]}, "x is missing"),
    (lambda digests: [], "cannot be read (ValueError: it must hold"),
    (lambda digests: None, "cannot be read"),
    *(
      (lambda digests, row=row: digests | {"x": row}, "cannot be read (ValueError: it must hold")
      for row in ([1], [1, "2", 3], ["1", "2"], [True, "2"], "12", {}, None)
    ),
  ],
)
def test_digests_must_list_the_files_of_the_checkpoint_and_no_others(run, change, message):
  flip_a_bit(data_file(run, 3))
  rewrite(run, change)
  assert any(message in text for text in checkpoint.find_damage(run / "checkpoints" / "3"))
  assert resume(run)[0] == 2


def link(path):
  path.rename(path.with_name("elsewhere"))
  path.symlink_to("elsewhere")


def pipe(path):
  path.unlink()
  os.mkfifo(path)


def device(path):
  path.unlink()
  path.symlink_to("/dev/zero")


@pytest.mark.parametrize("harm", [link, pipe, device])
@pytest.mark.parametrize("which", ["data", "digests"])
def test_only_regular_files_of_the_checkpoint_are_read(run, harm, which):
  folder = run / "checkpoints" / "3"
  path = data_file(run, 3) if which == "data" else folder / checkpoint.DIGESTS
  harm(path)
  assert f"{path.relative_to(folder)} is not a regular file" in checkpoint.find_damage(folder)
  assert resume(run)[0] == 2


def test_a_folder_that_is_a_link_is_not_read(run, tmp_path):
  folder = run / "checkpoints" / "3"
  (folder / "default" / "d2").symlink_to(tmp_path, target_is_directory=True)
  assert checkpoint.find_damage(folder) == ["default/d2 is not a regular file"]


def test_each_of_several_hosts_checks_its_share_of_the_files(run):
  folder = run / "checkpoints" / "3"
  flip_a_bit(data_file(run, 3))
  problems = [checkpoint.find_damage(folder, host, 3) for host in range(3)]
  assert sorted(map(len, problems)) == [0, 0, 1]
  assert checkpoint.find_damage(folder) == [text for part in problems for text in part]


def test_readers_change_nothing(run):
  flip_a_bit(data_file(run, 3))
  (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # another process is writing it
  before = contents(run)
  step, _, lines = resume(run, read_only=True)
  assert step == 2
  assert lines[0].endswith("it is skipped")
  assert contents(run) == before
  assert (run / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
  assert resume(run)[0] == 2
  assert not (run / "checkpoints" / "4.orbax-checkpoint-tmp").exists()


def test_a_run_without_checkpoints_starts_at_step_0(tmp_path):
  step, state, lines = resume(tmp_path)
  assert (step, lines) == (0, [])
  assert equal(state, state_after(0))


def test_a_save_that_fails_is_explained(run):
  """It fails because a file takes the place of the checkpoints' folder."""
  checkpoints = checkpoint.Checkpoints(run, keep=3)
  (run / "checkpoints").rename(run / "elsewhere")
  (run / "checkpoints").write_text("")
  with pytest.raises(checkpoint.SaveError) as caught:
    checkpoints.save(4, state_after(4))
  assert "the checkpoint of step 4 could not be saved: " in str(caught.value)
  assert "MiB are free on the file system at " in str(caught.value)


@pytest.mark.parametrize("place", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(run, place):
  state = state_after(9)
  bad = jax.tree.map(
    lambda a: a.at[(0,) * a.ndim].set(jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a,
    getattr(state, place),
  )
  before = contents(run)
  with checkpoint.Checkpoints(run, keep=2) as checkpoints:
    last = checkpoints.latest()
    with pytest.raises(checkpoint.NotFiniteError, match=rf"step 9 holds NaN.*{place}.*step {last}"):
      checkpoints.save(9, dataclasses.replace(state, **{place: bad}))
  assert contents(run) == before


def test_an_old_checkpoint_without_a_history_is_restored(tmp_path):
  """Versions before skipped updates did not save one."""
  params = {"w": jnp.arange(4.0)}
  state = TrainState.create(params, optax.adam(0.1))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, dataclasses.replace(state, history=None))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    restored = checkpoints.restore(1, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
    np.testing.assert_array_equal(a, b)
