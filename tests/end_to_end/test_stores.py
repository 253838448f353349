"""Tests runs whose work directory is on an object store: kills, faults, readers, bad input."""

import pytest

from tests.helpers.stores import served
from tools.store_faults import StoreFaults

STEPS = 4
SETTINGS = [
  f"--config.steps={STEPS}", "--config.checkpoint.every=2", "--config.eval.every=3",
  "--config.task.settings.eval_size=3",
  "--config.eval.batch_prompts=8", "--config.log.samples=0",
  "--config.rollout.completion_length=4",
]  # fmt: skip


@pytest.fixture(scope="module", params=["gs", "s3"])
def faults(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("stores") / request.param
  with pytest.MonkeyPatch.context() as patch, served(request.param, patch) as store:
    whole = tmp_path_factory.getbasetemp() / "whole_run_beside_stores"
    yield StoreFaults(folder, store, whole, SETTINGS, STEPS)


def test_a_killed_run_goes_on_from_a_fresh_machine_bit_for_bit(faults):
  lines = faults.killed(
    [
      "as a checkpoint is uploaded", "after metrics, before a checkpoint counts",
      "before a checkpoint counts", "as soon as a checkpoint counts",
    ]
  )  # fmt: skip
  assert [line[2].partition(" count")[0] for line in lines] == ["[]", "[]", "[]", "[2]"]


def test_two_runs_do_not_share_a_work_directory(faults):
  if faults.store.scheme == "s3":
    pytest.skip("the same as on gs, which takes ten seconds; make test-faults does both")
  assert "refused with exit code 2" in faults.two()


def test_a_store_that_goes_down_ends_the_run_and_the_same_command_continues(faults):
  if faults.store.scheme == "gs":
    pytest.skip("the same as on s3")
  assert "exit code 74" in faults.down()


def test_a_damaged_checkpoint_is_set_aside_in_the_store(faults):
  if faults.store.scheme == "s3":
    pytest.skip("the same as on gs")
  assert "continued from the one before" in faults.damaged()
