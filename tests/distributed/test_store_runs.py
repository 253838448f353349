"""Tests runs of several hosts whose work directory is on a store, and that share no folder.

Each process has a stage of its own. Whole runs take minutes and are slow tests.
"""

import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from grpo_jax.run import checkpoint, mirror, skipped
from grpo_jax.run.stores import open_store
from tests.helpers import preferences
from tests.helpers.host_runs import SMALL, rows_of, samples_of, state_of, train
from tests.helpers.processes import finish, free_port, run, start
from tests.helpers.stores import served

SAVES = """
import sys
from functools import partial
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import TrainState
from grpo_jax.run import checkpoint, mirror

def state_after(step, mesh):
  def array(values, *spec):
    return jax.make_array_from_callback(
      values.shape, NamedSharding(mesh, P(*spec)), lambda index: values[index]
    )
  params = {  # over all devices, over those of a host, on all of them, and a scalar
    "both": array(np.arange(32.0).reshape(8, 4) + step, ("data", "fsdp")),
    "fsdp": array(np.arange(8.0) - step, "fsdp"),
    "everywhere": array(np.arange(6.0).reshape(3, 2) * step),
  }
  return TrainState(array(np.int32(step)), params, {"count": array(np.int32(7 * step))})

with hosts.session(heartbeat=10), mirror.opened(sys.argv[1]) as place:
  mesh = meshes.make_mesh((2, 2, 1))
  publish = partial(place.mirror.publish, keep=2)
  with checkpoint.Checkpoints(place.folder, 1, publish=publish) as checkpoints:
    start, state = checkpoints.resume(state_after(0, mesh), lambda line: print("log", line))
    for a, b in zip(*map(jax.tree.leaves, (state, state_after(start, mesh))), strict=True):
      assert a.sharding == b.sharding
      for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
        np.testing.assert_array_equal(x.data, y.data)
    if start:
      np.testing.assert_array_equal(checkpoints.pending["tokens"], np.arange(3) + start)
    for step in (start + 1, start + 2):
      checkpoints.save(step, state_after(step, mesh), {"tokens": np.arange(3) + step})
  print("saved", start + 2)
"""


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def store(request):
  with pytest.MonkeyPatch.context() as patch, served(request.param, patch) as store:
    yield store


def together(program, count, folder, devices=4, **variables):
  """Runs processes that share no folder; returns (exit code, output) of each."""
  port = free_port()
  return finish(
    [
      start(
        program, i, count, port, devices=devices // count,
        **{mirror.STAGES: str(folder / f"stage{i}")}, **variables,
      )
      for i in range(count)
    ]
  )  # fmt: skip


def whole_steps(store, address):
  """Returns the steps of the checkpoints that count, each of them checked."""
  names = store.contents(address)
  found = (re.fullmatch(rf"checkpoints/(\d+)/{checkpoint.DIGESTS}", name) for name in names)
  steps = sorted(int(match.group(1)) for match in found if match)
  for step in steps:
    listed = {n for n in names if n.startswith(f"checkpoints/{step}/")}
    with mirror.fetched(address, checkpoints=True, step=step) as folder:
      copy = folder / "checkpoints" / str(step)
      assert not checkpoint.find_damage(copy)
      assert len([path for path in copy.rglob("*") if path.is_file()]) == len(listed)
  return steps


def test_two_hosts_without_a_shared_folder_restore_what_they_saved(store, tmp_path):
  address = store.new()
  for begin in (0, 2):
    for code, output in together(["-c", SAVES, str(address)], 2, tmp_path / str(begin)):
      assert code == 0, output
      assert f"saved {begin + 2}" in output
    assert whole_steps(store, address) == [begin + 1, begin + 2]
  assert not [name for name in store.contents(address) if name.startswith((".", "lock"))]


@pytest.mark.slow
def test_another_number_of_hosts_restores_what_the_hosts_saved(store, tmp_path):
  """Each with what is left on its machine; one checkpoint is damaged in between."""
  address = store.new()
  for begin, count in ((0, 2), (2, 1), (4, 2), (6, 4), (8, 2)):
    for code, output in together(["-c", SAVES, str(address)], count, tmp_path):
      assert code == 0, output
      assert f"saved {begin + 2}" in output
  assert whole_steps(store, address) == [9, 10]
  chunk = max(open_store(address).list("checkpoints/10/default/"), key=lambda entry: entry.size)
  content = bytearray(open_store(address).read(chunk.name))
  content[-1] ^= 1
  open_store(address).write(chunk.name, bytes(content))
  results = together(["-c", SAVES, str(address)], 2, tmp_path)
  assert [code for code, _ in results] == [0, 0], results
  assert "log checkpoint 10 is damaged: default/" in results[0][1]
  assert "saved 11" in results[0][1]
  assert whole_steps(store, address) == [10, 11]
  kept = [name for name in store.contents(address) if name.startswith("damaged/10/default/")]
  assert len(kept) > 8


MESH = [
  "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.task.settings.eval_size=5",
  "--config.rollout.ahead=1", "--config.algorithm.correction=none",
]  # fmt: skip

SKIPS = """
import dataclasses, sys
import jax
import jax.numpy as jnp
from grpo_jax import ahead, train
from grpo_jax.config import load
from grpo_jax.distributed import hosts
from grpo_jax.learning.updates import SkippedError

collect = ahead.collect

def poisoned(*args, **kwargs):
  rollout = collect(*args, **kwargs)
  old = rollout.batch.advantages
  advantages = jax.device_put(old.at[3, 1].set(jnp.inf), old.sharding)
  return dataclasses.replace(
    rollout, batch=dataclasses.replace(rollout.batch, advantages=advantages)
  )

ahead.collect = poisoned
with hosts.session(heartbeat=10):
  try:
    train.run(load("experiments/tiny.py", sys.argv[2:]), sys.argv[1])
  except SkippedError as error:
    print(error)
"""


def arrays_in(path):
  """Reads what orbax has saved as NumPy arrays."""
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.Checkpointer(handler) as reader:
    item = jax.tree.map(lambda _: 0, handler.metadata(path).tree)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    return reader.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=how))


@pytest.mark.slow
def test_a_skipped_update_of_two_hosts_is_whole_in_the_store(store, tmp_path):
  """It holds what two hosts write that share a folder."""
  if store.scheme == "s3":
    pytest.skip("the same as on gs")
  settings = [*SMALL[1:], *MESH[:3], "--config.train.max_skipped=2"]
  address = store.new()
  open_store(address).write("skipped/step_000000_update_0/batch/left_over", b"of a killed run")
  for target in (address, tmp_path / "shared"):
    for code, output in together(["-c", SKIPS, str(target), *settings], 2, tmp_path):
      assert code == 0, output
      assert "See why: python -m grpo_jax.replay DUMP, for " in output
  paths = skipped.complete(tmp_path / "shared")
  assert [path.name for path in paths] == ["step_000000_update_0", "step_000001_update_0"]
  with mirror.fetched(address) as copy:
    assert [path.name for path in skipped.complete(copy)] == [path.name for path in paths]
    assert not list(copy.rglob("left_over"))
    for part in ("step_000000_update_0/batch", "step_000000_update_0/state",
                 "step_000001_update_0/batch"):  # fmt: skip
      one, other = (arrays_in(root / "skipped" / part) for root in (copy, tmp_path / "shared"))
      assert jax.tree.structure(one) == jax.tree.structure(other)
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_hosts_write_a_reward_model_to_a_store(store, tmp_path):
  """The model of one host is within rounding of it; a part of one is written again."""
  if store.scheme == "s3":
    pytest.skip("the same as on gs")
  address = store.new()
  data = preferences.write(tmp_path / "pairs.jsonl", preferences.shorter_wins(40))
  program = [
    "-m", "grpo_jax.reward_model", "--model", "random:tiny", "--data", data, "--pairs-per-step=16",
    "--config.epochs=0.5", "--config.chat.date=2026-01-01", "--config.hosts.heartbeat=10",
  ]  # fmt: skip
  for _ in range(2):
    for code, output in together([*program, "--workdir", str(address)], 2, tmp_path, devices=2):
      assert code == 0, output
    first = store.contents(address)
    assert {"model/config.json", "model/model.safetensors", "metrics.jsonl"} <= set(first)
    open_store(address).remove("model/model.safetensors")
  [(code, output)] = run([*program, "--workdir", str(tmp_path / "one")], 1, devices=2)
  assert code == 0, output
  (tmp_path / "two.safetensors").write_bytes(first["model/model.safetensors"])
  one, two = (
    load_file(file)
    for file in (tmp_path / "one" / "model" / "model.safetensors", tmp_path / "two.safetensors")
  )
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_allclose(one[name], two[name], atol=1e-5)


# --- whole runs -----------------------------------------------------------------------------------

LIKE = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]  # for the devices of this process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Returns the work directory of a run of two hosts that share a folder and meet no fault."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  for code, output in run(train(folder, *MESH), 2, devices=2):
    assert code == 0, output
  return folder


def killed(store, address, folder, index, pattern):
  """Starts two hosts and kills one of them at a write that then never reaches the store."""
  port, reached = free_port(), []
  stages = [{mirror.STAGES: str(folder / f"stage{i}")} for i in range(2)]
  processes = [
    start(train(address, *MESH), i, 2, port, devices=2, **stages[i]) for i in range(2)
  ]  # fmt: skip

  def plan(method, path, name):
    if not reached and method in ("PUT", "POST") and re.search(pattern, name):
      processes[index].kill()
      reached.append(name)
    return "cut" if reached and re.search(pattern, name) else None

  store.proxy.plan = plan
  results = finish(processes)
  store.proxy.plan = lambda *_: None
  assert reached, results
  assert results[1 - index][0] not in (0, 2), results  # it ends by itself
  return results


@pytest.mark.slow
def test_two_hosts_that_are_killed_while_they_save_go_on_bit_for_bit(store, whole, tmp_path):
  """Each start is one on fresh machines: the second host dies, then the first one."""
  address = store.new()
  killed(store, address, tmp_path / "a", 1, r"/checkpoints/2/\.host-")
  assert whole_steps(store, address) == []
  killed(store, address, tmp_path / "b", 0, r"/checkpoints/2/sha256\.json$")
  assert whole_steps(store, address) == []
  killed(store, address, tmp_path / "c", 1, r"/checkpoints/3/default/.*/1")
  assert whole_steps(store, address) == [2]
  for code, output in together(train(address, *MESH), 2, tmp_path / "d"):
    assert code == 0, output
  assert whole_steps(store, address) == [2, 3]
  names = set(store.contents(address))
  assert not [name for name in names if re.search(r"(^lock|^\.probe.*|/\.host.*)$", name)]
  assert {name for name in names if name.startswith("samples/")} == {
    f"samples/{name}" for name in samples_of(whole)
  }
  with mirror.fetched(address, checkpoints=True) as copy:
    assert rows_of(copy) == rows_of(whole)
    assert samples_of(copy) == samples_of(whole)
    states = [state_of(folder, LIKE, 3) for folder in (copy, whole)]
  for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_hosts(store, whole, tmp_path):
  """The numbers agree within rounding, as on another mesh."""
  address = store.new()
  for steps, count in ((1, 2), (2, 1), (3, 2)):
    program = train(address, *MESH, f"--config.steps={steps}")
    for code, output in together(program, count, tmp_path / f"{steps}"):
      assert code == 0, output
  with mirror.fetched(address, checkpoints=True) as copy:
    state, other = (state_of(folder, LIKE, 3) for folder in (copy, whole))
  for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, other)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
