"""Tests rollouts that are sampled ahead of the updates: their parameters, resuming, two meshes."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest

from grpo_jax import ahead
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import STALENESS
from grpo_jax.models.decoder import LANES
from grpo_jax.rollout import generate
from grpo_jax.run import checkpoint
from grpo_jax.tasks.rewards.scoring import RewardError
from tests.helpers.runs import train_on

TINY = "experiments/tiny.py"
SMALL = (
  "seed=3",
  "steps=4",
  "checkpoint.every=1",
  "checkpoint.keep=9",
  "eval.every=2",
  "eval.batch_prompts=8",
  "task.settings.eval_size=3",
  "rollout.prompts_per_step=8",
  "rollout.group_size=4",
  "rollout.completion_length=5",
  "rewards.workers=0",
  "log.samples=0",
  "algorithm.anchor=sampler",
  "optimizer.learning_rate=1e-2",
)


def options(*changes):
  return [f"--config.{change}" for change in (*SMALL, *changes)]


def same(a, b):
  """Tells whether two runs agree: bits of the state, rows of metrics, completions."""
  np.testing.assert_equal(a[1], b[1])
  return a[0] == b[0] and a[2] == b[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("ahead")


@pytest.fixture(scope="module")
def whole(folder):
  """Uninterrupted runs by `rollout.ahead`."""
  return {k: train_on(1, folder / str(k), options(f"rollout.ahead={k}")) for k in (0, 1, 2)}


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_rollout_has_the_parameters_of_k_steps_before(whole, folder, k, monkeypatch):
  """Samples each rollout anew with the checkpoint that it should be from."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  run = build(load(TINY, options(f"rollout.ahead={k}")))
  for step in range(4):
    state = run.initial_state()
    if step > k:
      with checkpoint.Checkpoints(folder / str(k), keep=9, read_only=True) as checkpoints:
        state = checkpoints.restore(step - k, state)
    examples, params = run.examples(step)(0), run.to_sampling_params(state.params)
    texts = generate(run.sampler, params, examples, run.key(step), group_size=4).texts
    saved = json.loads(f"[{','.join(whole[k][2][-4:][step].splitlines())}]")
    assert [row["completion"] for row in saved] == [text for group in texts for text in group]
  ages = [row[STALENESS[0]] for row in whole[k][1] if "loss" in row] if k else [0] * 4
  assert ages == [min(step, k) for step in range(4)]


def test_staleness_shows_in_the_ratios_and_the_effective_sample_size(whole):
  rows = [row for row in whole[2][1] if "loss" in row]
  shares = [row[STALENESS[1]] for row in rows]
  assert shares[0] == pytest.approx(1.0, abs=1e-5)
  assert all(0 < share < 0.9 for share in shares[1:])
  assert rows[0]["ratio/max"] == pytest.approx(1.0, abs=1e-4)
  assert all(row["ratio/max"] > 1.2 for row in rows[1:])
  assert not any(set(STALENESS) & set(row) for row in whole[0][1])


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_or_made_longer_is_bit_for_bit_the_whole_one(whole, folder, k):
  killed, longer = folder / f"killed {k}", folder / f"longer {k}"
  shutil.copytree(folder / str(k), killed)
  for steps in (2, 3, 4):
    shutil.rmtree(killed / "checkpoints" / str(steps))
  train_on(1, longer, options(f"rollout.ahead={k}", "steps=2"))
  for workdir in (killed, longer):
    assert same(train_on(1, workdir, options(f"rollout.ahead={k}")), whole[k])


# --- devices that only sample ---------------------------------------------------------------------

APART = ("mesh.rollout_devices=4", "rollout.ahead=1", "rollout.prompts_per_step=16")
LAYOUTS = {
  "data": ("mesh.data=4",),
  "fsdp and tensor": ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"),
}


def test_the_last_devices_of_each_host_sample():
  learners, samplers = meshes.split_devices(3)
  assert (learners, samplers) == (jax.devices()[:5], jax.devices()[5:])
  device = dataclasses.make_dataclass("Device", ["process_index", "id"])
  devices = [device(host, number) for number in range(4) for host in range(2)]
  learners, samplers = meshes.split_devices(2, devices)
  assert [(d.process_index, d.id) for d in samplers] == [(0, 3), (1, 3)]
  assert [(d.process_index, d.id) for d in learners] == [(h, i) for h in range(2) for i in range(3)]
  with pytest.raises(ValueError, match="it must be a multiple of the 2 hosts"):
    meshes.split_devices(3, devices)


@pytest.mark.parametrize(
  "layout", ["data", pytest.param("fsdp and tensor", marks=pytest.mark.slow)]
)
def test_four_devices_that_sample_for_four_that_learn_change_no_number(folder, layout):
  """Against the same four devices doing both."""
  together, apart = folder / f"together {layout}", folder / f"apart {layout}"
  expected = train_on(4, together, options(*LAYOUTS[layout], *APART, "mesh.rollout_devices=0"))
  actual = train_on(8, apart, options(*LAYOUTS[layout], *APART))
  assert actual[2] == expected[2]  # completions, to the letter
  for a, b in zip(actual[1], expected[1], strict=True):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_weights_and_batches_lie_on_their_own_devices(monkeypatch):
  run = build(load(TINY, options(*APART, "mesh.fsdp=2")))
  assert run.has_rollout_devices
  learners, samplers = set(jax.devices()[:4]), set(jax.devices()[4:])
  state = run.initial_state()
  params = run.to_sampling_params(state.params)
  assert {d for leaf in jax.tree.leaves(params) for d in leaf.devices()} == samplers
  batches = []
  with run.scorer() as scorer, ahead.Rollouts(run, scorer) as rollouts:
    batches.append(rollouts.take(0, state).batch)
  assert {d for leaf in jax.tree.leaves((state, batches)) for d in leaf.devices()} == learners
  assert batches[0].staleness.tolist() == [0.0] * 16


# --- everything that a rollout may be -------------------------------------------------------------

KINDS = {
  "curriculum, further draws and several updates": (
    "data.curriculum=learnability", "rollout.max_resamples=2", "rollout.mask_truncated=true",
    "rollout.stop=('a','z')", f"rollout.stop_ids={tuple(range(192, 256))}", "train.epochs=2",
    "algorithm.anchor=old", "algorithm.correction=token_truncate", "algorithm.correction_max=2.0",
  ),
  "episodes": (
    "task.name=guess_number", "rollout.completion_length=40", "episode.turns=3",
    "episode.turn_length=6", "rollout.temperature=0.5", "algorithm.advantage=turn_advantages",
  ),
}  # fmt: skip


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "kind",
  [
    pytest.param("curriculum, further draws and several updates", marks=pytest.mark.slow),
    "episodes",
  ],
)
def test_every_kind_of_rollout_goes_on_after_a_kill(tmp_path, kind, devices):
  """With two devices, one of them samples."""
  more = ["rollout.ahead=2", "eval.every=0", *KINDS[kind], f"mesh.rollout_devices={devices - 1}"]
  if kind == "episodes":
    more = [*more, "task.settings.games=0"]
  changes = [c for c in SMALL if not (kind == "episodes" and c.startswith("task.settings"))]
  arguments = [f"--config.{change}" for change in (*changes, *more)]
  whole = train_on(devices, tmp_path / "whole", arguments)
  shutil.copytree(tmp_path / "whole", tmp_path / "killed")
  for steps in (2, 3, 4):
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(steps))
  assert same(train_on(devices, tmp_path / "killed", arguments), whole)
  rows = [row for row in whole[1] if "loss" in row]
  if kind == "episodes":
    assert max(row["episode/turns"] for row in rows) > 1
  else:
    assert sum(row["dynamic_sampling/resamples"] for row in rows) > 0
    assert 0 < rows[-1]["curriculum/tried"] < 1


REWARD = """
import pathlib
def judged(prompts, completions, trainer_state, **columns):
  if trainer_state.global_step == 2 and not pathlib.Path(__file__).with_name("back").exists():
    raise TimeoutError("the judge is away")
  return [float(len(set(text))) for text in completions]
"""


def test_a_reward_that_raises_ends_the_run_and_is_asked_again(tmp_path):
  """The rollout is that of step 2; it is saved with the state before that step."""
  (tmp_path / "reward.py").write_text(REWARD)
  rows = [json.dumps({"prompt": f"{i}:"}) + "\n" for i in range(40)]
  (tmp_path / "rows.jsonl").write_text("".join(rows))
  changes = [c for c in SMALL if not c.startswith("task.")]
  changes += [
    "task.name=jsonl", f"task.settings.path={tmp_path}/rows.jsonl", "eval.every=0",
    f"task.settings.reward={tmp_path}/reward.py:judged", "rollout.ahead=2", "checkpoint.every=100",
  ]  # fmt: skip
  arguments = [f"--config.{change}" for change in changes]
  before = threading.active_count()
  with pytest.raises(RewardError, match="the judge is away"):
    train_on(1, tmp_path / "run", arguments)
  assert threading.active_count() <= before  # the threads of the run have ended
  assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
  (tmp_path / "back").touch()
  assert same(train_on(1, tmp_path / "run", arguments), train_on(1, tmp_path / "whole", arguments))


# --- the parts ------------------------------------------------------------------------------------


def test_rewards_are_called_while_the_run_goes_on(monkeypatch):
  """A scorer that waits until the next rollout was begun would wait for ever without a thread."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  run = build(load(TINY, options("rollout.ahead=1")))
  began, steps, threads = threading.Event(), [], set()
  with run.scorer() as scorer:

    def slow(*arguments, state, **options):
      steps.append(state.global_step)
      threads.add(threading.current_thread())
      if state.global_step == 1:
        assert began.wait(60)
      return scorer(*arguments, state=state, **options)

    state = run.initial_state()
    with ahead.Rollouts(run, slow) as rollouts:
      first = rollouts.take(0, state)
      began.set()
      second = rollouts.take(1, state)
    assert threading.current_thread() not in threads
  assert steps[:2] == [0, 1]
  assert [r.batch.staleness[0] for r in (first, second)] == [0, 1]
  assert first.metrics["time/waiting"] >= 0


def test_episodes_are_played_while_the_run_goes_on(monkeypatch):
  """Environments that wait until the first rollout was taken would wait for ever in its thread."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  changes = [c for c in SMALL if not c.startswith("task.settings")]
  changes += ["rollout.ahead=1", *KINDS["episodes"], "task.settings.games=0"]
  run = build(load(TINY, [f"--config.{change}" for change in changes]))
  taken, resets, make = threading.Event(), [], run.sampler.make_runner

  class Held:
    def __init__(self):
      self._runner = make()
      self.submit, self.answers, self.close = (
        self._runner.submit, self._runner.answers, self._runner.close,
      )  # fmt: skip

    def reset(self, *arguments):
      resets.append(threading.current_thread())
      if len(resets) == 2:
        assert taken.wait(60)
      return self._runner.reset(*arguments)

  run.sampler.make_runner = Held
  state = run.initial_state()
  with run.scorer() as scorer, ahead.Rollouts(run, scorer) as rollouts:
    first = rollouts.take(0, state)
    taken.set()
    second = rollouts.take(1, state)
  assert threading.current_thread() not in resets
  assert [r.batch.staleness[0] for r in (first, second)] == [0, 1]


def test_completions_survive_the_archive_bit_for_bit():
  from grpo_jax.sampling.sampler import Generated

  rng = np.random.default_rng(0)
  logp = rng.normal(size=(2, 3, 4)).astype(np.float32)
  mask = rng.random((2, 3, 4)) < 0.5
  texts = [["a\ud800", "", "\n"], ["x", "y", "z"]]
  out = Generated(
    prompts=np.arange(10, dtype=np.int32).reshape(2, 5), prompt_mask=np.ones((2, 5), bool),
    tokens=np.arange(24, dtype=np.int32).reshape(2, 3, 4), mask=mask, ended=mask.any(-1),
    logp=logp, entropy=-logp, texts=texts, temperature=0.7,
  )  # fmt: skip
  back = ahead.generated_from_arrays(ahead.generated_to_arrays(out))
  assert vars(back).keys() == vars(out).keys()
  for name, value in vars(out).items():
    np.testing.assert_array_equal(getattr(back, name), value)
    assert getattr(getattr(back, name), "dtype", None) == getattr(value, "dtype", None)


# --- a budget of cache memory ---------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_budget_of_the_cache_changes_no_completion(whole, folder, width):
  """Room for 5 of the 32 completions of a step, or of the 16 of each device."""
  row = build_row_bytes(load(TINY, options()))
  budget = f"rollout.cache_gib={5.5 * row / 2**30}"
  actual = train_on(width, folder / f"budget {width}", options(budget))
  assert completions_of(actual) == completions_of(whole[0])
  rows = [row for row in actual[1] if "loss" in row]
  assert all(0.5 < row["sampling/live"] <= 1 for row in rows)
  assert "sampling/live" not in whole[0][1][1]


def completions_of(result):
  return [json.loads(line)["completion"] for text in result[2] for line in text.splitlines()]


def build_row_bytes(c):
  """Bytes of one completion by hand: keys and values of 2 layers, and a copy of the prompt."""
  run = build(c)
  shape = run.model.config
  length = -(-(c.rollout.completion_length - 1) // LANES) * LANES
  return (
    2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * (length + run.sampler.prompt_length)
  )


# --- bad input ------------------------------------------------------------------------------------

REFUSED = {
  ("rollout.cache_gib=1e-5",): (
    "rollout.cache_gib is 1e-05, which holds 1 of the 4 completions of a prompt: it must be at "
  ),
  ("rollout.cache_gib=1.0", "train.reduction=deterministic", "model.remat=none"): (
    "rollout.cache_gib is 1, it must be 0 with train.reduction='deterministic'"
  ),
  ("rollout.ahead=-1",): "rollout.ahead is -1, it must be at least 0 steps",
  ("rollout.ahead=1", "algorithm.anchor=old"): (
    "rollout.ahead is 1, but algorithm 'dr_grpo' takes rollouts to be from the policy it updates: "
    "set algorithm.correction='token_truncate' with algorithm.correction_max=2.0; or "
  ),
  ("mesh.rollout_devices=8", "rollout.ahead=1"): (
    "mesh.rollout_devices is 8 of 8 device(s), which leaves none to learn: it must be at most 7"
  ),
  ("mesh.rollout_devices=4",): "but rollout.ahead is 0: sampling and learning would wait",
  ("mesh.rollout_devices=5", "mesh.data=3", "rollout.ahead=1", "rollout.prompts_per_step=12"): (
    "split the prompts 5 ways, but rollout.prompts_per_step is 12: make it a multiple of 5"
  ),
  ("mesh.rollout_devices=3", "mesh.data=-1", "mesh.tensor=5", "rollout.ahead=1"): (
    "mesh.rollout_devices is 3, it must be a multiple of mesh.tensor=5"
  ),
}


@pytest.mark.parametrize("changes", REFUSED)
def test_settings_that_do_not_go_together_are_refused_before_anything_compiles(changes):
  with pytest.raises(ConfigError) as caught:
    build(load(TINY, options(*changes)))
  assert REFUSED[changes] in str(caught.value)


@pytest.mark.parametrize(
  "changes",
  [
    ("algorithm.anchor=old", "algorithm.correction=none"),
    ("algorithm.anchor=old", "algorithm.correction=token_truncate", "algorithm.correction_max=2.0"),
    ("algorithm.anchor=old", "algorithm.correction=off_policy_mask", "algorithm.off_policy_max=.5"),
    ("algorithm.name=dppo",),
  ],
)
def test_rows_that_make_up_for_it_or_leave_it_out_by_name_are_accepted(changes):
  build(load(TINY, options("rollout.ahead=1", *changes)))
