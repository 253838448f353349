"""Tests that skipped updates are written, limited, and read back as they were."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import TrainState
from grpo_jax.learning.updates import SkippedUpdate
from grpo_jax.run import skipped
from tests.helpers.learning import MODEL, bits, make_batch

METRICS = {"loss": float("nan"), "grad_norm": 2.0}
CONFIG = {"rollout": {"temperature": 0.7}}


@pytest.fixture(scope="module")
def state():
  params = MODEL.init(jax.random.key(0))
  return TrainState.create(params, optax.adam(0.1), reference=params)


@pytest.fixture
def recorder(tmp_path):
  lines = []
  mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
  result = skipped.Recorder(tmp_path, CONFIG, mesh, lines.append)
  result.lines = lines
  return result


def update(state, step, in_a_row, number=0, **changes):
  batch = make_batch(ref=True, temperature=0.7)
  return SkippedUpdate(
    step, number, in_a_row, state, dataclasses.replace(batch, **changes), METRICS
  )


def test_a_dump_is_read_back(state, recorder, tmp_path):
  recorder(update(state, 4, 1))
  (path,) = skipped.complete(tmp_path)
  assert path == skipped.folder(tmp_path, 4, 0)
  assert recorder.lines == [
    "step 4, update 0 skipped: loss nan, gradient norm 2; see why: "
    f"python -m grpo_jax.replay {path}"
  ]
  assert recorder.advice().endswith(f"DUMP, for {path}")
  dump = skipped.read(path)
  layout = meshes.batch_sharding(meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
  batch, expected = dump.batch(layout), make_batch(ref=True, temperature=0.7)
  assert batch.temperature == 0.7
  assert batch.old_logp is None
  assert bits(batch) == bits(expected)
  restored = dump.state(state)
  assert restored.reference is None
  assert bits(restored) == bits(dataclasses.replace(state, reference=None))


def test_a_dump_of_version_0_1_has_the_temperature_of_its_config(state, recorder, tmp_path):
  recorder(update(state, 4, 1))
  (path,) = skipped.complete(tmp_path)
  recorded = json.loads((path / skipped.RECORDED).read_text())
  assert recorded.pop("temperature") == 0.7
  (path / skipped.RECORDED).write_text(json.dumps(recorded))
  config = json.dumps({"rollout": {"temperature": 1.25}})
  (path / skipped.CONFIG).write_text(config)
  assert skipped.read(path).temperature == 1.25
  assert skipped.read(path).batch(None).temperature == 1.25


def test_the_state_is_written_once_until_it_changes(state, recorder, tmp_path):
  """An accepted update between two skipped ones starts their count again."""
  for step, in_a_row in ((1, 1), (2, 2), (4, 1)):
    recorder(update(state, step, in_a_row))
  dumps = skipped.complete(tmp_path)
  assert [(path / "state").is_dir() for path in dumps] == [True, False, True]
  assert [skipped.read(path).recorded["state_of"] for path in dumps] == [
    dumps[0].name, dumps[0].name, dumps[2].name,
  ]  # fmt: skip
  np.testing.assert_array_equal(skipped.read(dumps[1]).state(state).step, state.step)


def test_later_dumps_are_not_written(state, recorder, tmp_path):
  for number in range(skipped.LIMIT + 1):
    recorder(update(state, 3, number + 1, number))
  assert len(skipped.complete(tmp_path)) == skipped.LIMIT
  assert recorder.lines[-1].endswith(f"not written, {tmp_path / 'skipped'} holds 3 already")


def test_a_step_that_is_run_again_does_not_write_its_dump_again(state, recorder, tmp_path):
  """A process that died before its next checkpoint left it."""
  recorder(update(state, 3, 1))
  (path,) = skipped.complete(tmp_path)
  before = (path / skipped.RECORDED).stat().st_mtime_ns
  mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
  again = skipped.Recorder(tmp_path, CONFIG, mesh, recorder.lines.append)
  again(update(state, 3, 1))
  again(update(state, 4, 2))
  assert (path / skipped.RECORDED).stat().st_mtime_ns == before
  assert skipped.read(skipped.folder(tmp_path, 4, 0)).recorded["state_of"] == path.name


def test_incomplete_dumps_do_not_count(state, recorder, tmp_path):
  half = skipped.folder(tmp_path, 0, 0)
  half.mkdir(parents=True)
  assert skipped.complete(tmp_path) == []
  with pytest.raises(ValueError, match=r"holds no recorded.json"):
    skipped.read(half)
  recorder(update(state, 1, 1))
  recorder(update(state, 2, 2))
  first, second = skipped.complete(tmp_path)
  (first / "state").rename(first / "gone")
  with pytest.raises(ValueError, match=f"needs the state in the dump '{first.name}' beside it"):
    skipped.read(second)


def test_per_token_advantages_are_read_back(state, recorder, tmp_path):
  recorder(update(state, 1, 1, advantages=jnp.full((4, 3, 5), jnp.inf)))
  (path,) = skipped.complete(tmp_path)
  assert skipped.read(path).batch(None).advantages.shape == (4, 3, 5)
