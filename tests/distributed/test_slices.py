"""Runs on two simulated slices give the numbers of a single one."""

import numpy as np
import pytest

from grpo_jax.distributed import mesh as meshes
from tests.helpers.runs import train_on

SETTINGS = [
  "--config.steps=2", "--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.log.samples=0",
  "--config.rollout.group_size=4", "--config.rollout.completion_length=4",
  "--config.task.settings.eval_size=8", "--config.eval.batch_prompts=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def one_slice(tmp_path_factory):
  return train_on(8, tmp_path_factory.mktemp("one"), SETTINGS)


def test_two_slices_compute_what_one_does(one_slice, tmp_path):
  state, rows, samples = train_on(8, tmp_path, [*SETTINGS, "--config.mesh.slices=2"])
  assert samples == one_slice[2]
  assert rows == one_slice[1]
  assert state == one_slice[0]


def test_slices_whose_devices_alternate_compute_what_one_does(one_slice, tmp_path, monkeypatch):
  """Groups devices as where the devices know their slices, and their ids do not follow them."""
  given = []

  def in_slices(devices, slices):
    given.append(slices)
    return [*devices[::2], *devices[1::2]]

  monkeypatch.setattr(meshes, "in_slices", in_slices)
  _, rows, samples = train_on(8, tmp_path, [*SETTINGS, "--config.mesh.slices=2"])
  assert set(given) == {2}
  assert samples == one_slice[2]
  for a, b in zip(rows, one_slice[1], strict=True):
    assert set(a) == set(b)
    for name in a:
      values = [np.nan if row[name] is None else row[name] for row in (a, b)]
      np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6, err_msg=name)
