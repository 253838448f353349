"""Whole runs of the tiny model: reward rises, a resume changes nothing, mistakes are explained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import export, train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.models.load import load as load_model
from grpo_jax.models.quantized import dequantized
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from tests.helpers import tiny_gguf
from tests.helpers.processes import xla_flags

TINY = "experiments/tiny.py"
FAST = [
  "--config.steps=8",
  "--config.checkpoint.every=4",
  "--config.task.settings.eval_size=3",
  "--config.eval.batch_prompts=8",
  "--config.eval.every=4",
  "--config.rollout.completion_length=5",
  "--config.log.samples=0",
]
TIMES = ("step_time", "tokens_per_second", "time/sampling", "time/rewards", "time/waiting")


def one_device(*arguments, module="grpo_jax.train", **popen):
  """A command of the package in a process of its own with a single CPU device."""
  environment = dict(os.environ, XLA_FLAGS=xla_flags(), JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.Popen(
    command,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **popen,
  )


def train_in_process(workdir, *overrides):
  process = one_device("--config", TINY, "--workdir", str(workdir), *FAST, *overrides)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  return output


def final_state(workdir, step):
  run = build(load(TINY, FAST))
  with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() == step
    return checkpoints.restore(step, run.initial_state())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(uninterrupted 8 steps, 4 steps and 4 more, the output of each process)."""
  folder = tmp_path_factory.mktemp("runs")
  whole, parts = folder / "whole", folder / "parts"
  outputs = [
    train_in_process(whole),
    train_in_process(parts, "--config.steps=4"),
    train_in_process(parts),
  ]
  return whole, parts, outputs


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(runs):
  whole, parts, _ = runs
  states = final_state(whole, 8), final_state(parts, 8)
  assert int(states[0].step) == 8
  for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
    np.testing.assert_array_equal(a, b)
  rows = [read_metrics(workdir) for workdir in (whole, parts)]
  assert len(rows[0]) == 11  # 8 steps, evaluations before, in the middle and after
  for a, b in zip(*rows, strict=True):
    assert {k: v for k, v in a.items() if k not in TIMES} == {
      k: v for k, v in b.items() if k not in TIMES
    }
  names = sorted(file.name for file in (whole / "samples").iterdir())
  assert len(names) == 11
  assert names == sorted(file.name for file in (parts / "samples").iterdir())
  for name in names:
    assert (whole / "samples" / name).read_text() == (parts / "samples" / name).read_text()


def test_what_a_run_leaves(runs):
  whole, _, (output, *_) = runs
  assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
  assert list((whole / "tensorboard").iterdir())
  assert json.loads((whole / "config.json").read_text())["steps"] == 8
  for word in ("parameters", "100 training problems, 3 held out", "8 prompts x 8 completions"):
    assert word in output
  assert "before             after" in output
  assert "after 8 steps" in output
  memory = json.loads((whole / "run.json").read_text())["sessions"][-1]["memory"]
  assert set(memory) == {"parameters", "optimizer"}
  assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)  # of Adam
  row = next(row for row in read_metrics(whole) if "loss" in row)
  for name in (
    "reward", "reward_std", "rewards/letters/mean", "frac_reward_zero_std", "entropy", "accuracy",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "grad_norm",
    "completions/mean_length", "completions/clipped_ratio", "learning_rate", "num_tokens",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "step_time",
  ):  # fmt: skip
    assert name in row, name
  assert row["sampling/sampling_logp_difference/max"] < 1e-4


def test_steps_draw_different_completions(runs):
  whole, *_ = runs
  seen = [(whole / "samples" / f"step_{step:06d}.jsonl").read_text() for step in range(3)]
  completions = [[json.loads(line)["completion"] for line in text.splitlines()] for text in seen]
  assert len({tuple(c) for c in completions}) == 3
  assert len(set(completions[0])) > 32  # of 64


@pytest.mark.slow
def test_reward_rises(tmp_path):
  """`train.run` on eight devices, data-parallel: from one letter in ten to mostly letters."""
  c = load(TINY, ["--config.steps=25", "--config.log.samples=0", "--config.eval.batch_prompts=8"])
  results = train.run(c, tmp_path)
  reward = [row["reward"] for row in read_metrics(tmp_path) if "reward" in row]
  assert len(reward) == 25
  assert np.mean(reward[:3]) < 0.25
  assert np.mean(reward[-3:]) > 0.8
  assert results["eval/n"] == 20


@pytest.mark.slow
def test_a_teacher_passes_on_what_it_learned_without_rewards(tmp_path):
  """Another random model learns from the trained one what `letters` rewards, by the row opd."""
  short = ["--config.log.samples=0", "--config.eval.batch_prompts=8", "--config.steps=25"]
  train.run(load(TINY, short), tmp_path / "teacher")
  export.main(["--workdir", str(tmp_path / "teacher"), "--out", str(tmp_path / "model")])
  taught = ["--config.algorithm.name=opd", f"--config.teacher.source={tmp_path / 'model'}"]
  results = train.run(load(TINY, [*short, *taught, "--config.seed=1"]), tmp_path / "student")
  rows = [row for row in read_metrics(tmp_path / "student") if "loss" in row]
  assert np.mean([row["reward"] for row in rows[:3]]) < 0.25
  assert np.mean([row["reward"] for row in rows[-3:]]) > 0.8
  assert rows[-1]["teacher/kl"] < 0.3 * rows[0]["teacher/kl"]
  assert results["eval/n"] == 20


@pytest.mark.slow
def test_a_kl_term_holds_the_policy_at_the_reference(tmp_path):
  """With a very large beta the same run cannot leave the reference; kl is measured."""
  rows = {}
  for beta in (0.0, 50.0):
    c = load(TINY, [*FAST, "--config.steps=6", "--config.algorithm.name=grpo",
                    f"--config.algorithm.beta={beta}"])  # fmt: skip
    train.run(c, tmp_path / str(beta))
    rows[beta] = [row for row in read_metrics(tmp_path / str(beta)) if "loss" in row]
  assert "kl" not in rows[0.0][0]
  assert rows[50.0][0]["kl"] == pytest.approx(0.0, abs=1e-6)
  assert rows[50.0][-1]["entropy"] > rows[0.0][-1]["entropy"] + 0.02


OPTIONS = [
  *FAST,
  "--config.checkpoint.every=2",
  "--config.rollout.prompts_per_step=16",
  "--config.algorithm.name=grpo",
  "--config.algorithm.beta=0.05",
  "--config.algorithm.clip_high=0.28",
  "--config.algorithm.entropy_target=9.0",
  "--config.algorithm.entropy_delta=0.005",
  "--config.data.curriculum=learnability",
  "--config.teacher.source=random:tiny",
  "--config.algorithm.teacher_weight=0.2",
  "--config.algorithm.teacher_discount=0.9",
  "--config.algorithm.log_ratio_baseline=leave_one_out",
  "--config.train.epochs=2",
  "--config.train.mini_batches=2",
  "--config.reference.sync_every=2",
  "--config.reference.sync_share=0.5",
  "--config.rollout.max_resamples=1",
  "--config.rollout.mask_truncated=true",
  "--config.rollout.stop=('ab','z')",
  f"--config.rollout.stop_ids={tuple(range(192, 256))}",  # or hardly any would end in time
  "--config.lora.rank=4",
  "--config.lora.targets=q|v|gate",
  "--config.reward_model.source=tests/fixtures/tiny_llama_reward",
  "--config.reward_model.weight=0.5",
]


@pytest.mark.slow
def test_all_options_at_once_and_resumed(tmp_path):
  """Several updates a rollout, a reference that moves, resamples, adapters: and nothing is lost."""
  for workdir, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
    train.run(load(TINY, [*OPTIONS, f"--config.steps={steps}"]), tmp_path / workdir)
  states = []
  for workdir in ("whole", "parts"):
    like = build(load(TINY, OPTIONS)).initial_state()
    with checkpoint.Checkpoints(tmp_path / workdir, keep=2) as checkpoints:
      states.append(checkpoints.restore(4, like))
  for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
    np.testing.assert_array_equal(a, b)
  state = states[0]
  assert int(state.step) == 4 * 2 * 2  # updates
  names = set(state.params["layers"])
  assert names == {f"{name}_lora_{part}" for name in ("q", "v", "gate") for part in "ab"}
  moved = [np.abs(np.subtract(*pair)).max() for pair in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(state.reference), strict=True)]  # fmt: skip
  assert max(moved) > 0  # half of the way behind
  rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
  assert rows == [
    row | {name: rows[i][name] for name in TIMES}
    for i, row in enumerate(r for r in read_metrics(tmp_path / "parts") if "loss" in r)
  ]
  assert rows[0]["ratio/max"] > 1.0  # the second update leaves the old log-probs behind
  assert rows[1]["kl"] > rows[0]["kl"] > 0
  assert 0.1 < rows[0]["completions/clipped_ratio"] < 0.9
  assert rows[0]["teacher/kl"] > 0
  letters, learned = (rows[0][f"rewards/{name}/mean"] for name in ("letters", "reward_model"))
  np.testing.assert_allclose(rows[0]["reward"], letters + 0.5 * learned, rtol=1e-6)
  assert {"dynamic_sampling/kept", "dynamic_sampling/resamples", "rewards/missing"} <= set(rows[0])


@pytest.mark.parametrize(
  "scheme", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "file"))]
)
def test_adapters_of_a_quantized_base(tmp_path, scheme):
  """Sampler and trainer read the same few bits; a resumed run is the same; the export is merged."""
  changes = [
    *(*FAST[2:], f"--config.lora.quantize={scheme}", "--config.lora.rank=4"),
    *("--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.algorithm.name=grpo"),
  ]
  if scheme == "file":
    tiny_gguf.write(tmp_path / "model.gguf")
    changes.append(f"--config.model.source={tmp_path / 'model.gguf'}")
  for workdir, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
    train.run(load(TINY, [*changes, f"--config.steps={steps}"]), tmp_path / workdir)
  run = build(load(TINY, changes))
  states = []
  for workdir in ("whole", "parts"):
    with checkpoint.Checkpoints(tmp_path / workdir, keep=2) as checkpoints:
      states.append(checkpoints.restore(2, run.initial_state()))
  for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
    np.testing.assert_array_equal(a, b)
  rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
  rounding = 1e-3 if scheme == "file" else 1e-4  # the weights of the file are large
  assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < rounding
  assert rows[0]["grad_norm"] > 0
  assert rows[1]["kl"] > 0
  arguments = ["--workdir", str(tmp_path / "whole"), "--out", str(tmp_path / "model")]
  assert export.main(arguments) == 0
  exported = load_model(str(tmp_path / "model"))[1]
  wide = dequantized(run.base_params)["layers"]
  trained = states[0].params["layers"]
  for name in ("q", "down"):
    a, b = (np.asarray(trained[f"{name}_lora_{part}"]) for part in "ab")
    expected = wide[name] + run.model.lora_scale * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(exported["layers"][name], expected, atol=1e-5)


def test_a_quantized_base_moves_once_to_devices_that_sample():
  changes = ["--config.lora.quantize=int8", "--config.lora.rank=2", "--config.rollout.ahead=1",
             "--config.mesh.rollout_devices=4", "--config.mesh.fsdp=2", "--config.mesh.data=2",
             "--config.algorithm.anchor=sampler"]  # fmt: skip
  run = build(load(TINY, changes))
  adapters = run.initial_state().params
  first, second = (run.to_sampling_params(tree) for tree in (adapters, adapters))
  samplers = set(jax.devices()[4:])
  for leaf in jax.tree.leaves(first):
    assert leaf.devices() == samplers
    assert leaf.sharding.is_fully_replicated
  held, again = (params["layers"]["q"].values for params in (first, second))
  assert held is again
  np.testing.assert_array_equal(held, run.base_params["layers"]["q"].values)


def test_only_a_frozen_base_is_quantized(tmp_path):
  with pytest.raises(ConfigError, match=r"lora.quantize is 'int8', but lora.rank is 0"):
    train.run(load(TINY, ["--config.lora.quantize=int8"]), tmp_path)
  with pytest.raises(
    ConfigError, match=r"lora.quantize is 'file': no matrix of the layers is quan"
  ):
    train.run(load(TINY, ["--config.lora.quantize=file", "--config.lora.rank=2"]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_resume_bit_for_bit(tmp_path, name):
  changes = [f"--config.optimizer.name={name}", "--config.mesh.data=2", "--config.mesh.fsdp=4"]
  for workdir, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
    train.run(load(TINY, [*changes, f"--config.steps={steps}"]), tmp_path / workdir)
  like, states = build(load(TINY, changes)).initial_state(), []
  for workdir in ("whole", "parts"):
    with checkpoint.Checkpoints(tmp_path / workdir, keep=2) as checkpoints:
      states.append(checkpoints.restore(2, like))
  for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(states[0].params["embed"], like.params["embed"])


def test_a_reference_that_moves_needs_a_kl_term(tmp_path):
  c = load(TINY, ["--config.reference.sync_every=5", "--config.lora.rank=-1"])
  with pytest.raises(ConfigError) as caught:
    train.run(c, tmp_path)
  assert "reference.sync_every is 5, but algorithm.beta is 0" in str(caught.value)
  assert "lora.rank is -1, it must be at least 0" in str(caught.value)


def test_another_config_is_refused_with_the_fields_that_differ(runs):
  whole, *_ = runs
  c = load(TINY, [*FAST, "--config.seed=5", "--config.optimizer.learning_rate=0.1"])
  with pytest.raises(ConfigError) as caught:
    train.run(c, whole)
  text = str(caught.value)
  assert "seed: 0 -> 5" in text
  assert "optimizer.learning_rate: 0.003 -> 0.1" in text
  assert len(caught.value.problems) == 2


def test_mistakes_on_the_command_line_are_one_clear_error(tmp_path):
  process = one_device(
    "--config", TINY, "--workdir", str(tmp_path / "w"), "--config.rollout.groupsize=4",
    "--config.steps=x",
  )  # fmt: skip
  output, _ = process.communicate()
  assert process.returncode == 2
  assert "Traceback" not in output
  assert "2 problems" in output
  assert "did you mean 'group_size'" in output
  assert not (tmp_path / "w").exists()


def wait_for(path, process):
  deadline = time.monotonic() + 240
  while not path.exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_signals_save_and_exit_the_run_goes_on_and_a_second_one_is_refused(tmp_path):
  """SIGTERM, which is preemption, and Ctrl-C."""
  arguments = ("--config", TINY, "--workdir", str(tmp_path), *FAST, "--config.steps=100000")
  done = 0
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    process = one_device(*arguments)
    wait_for(tmp_path / "samples" / f"step_{done + 2:06d}.jsonl", process)
    if number == signal.SIGINT:
      config = (tmp_path / "config.json").stat().st_mtime_ns
      second = one_device(*arguments, "--config.steps=5")
      output, _ = second.communicate(timeout=120)
      assert second.returncode == 2
      assert output.startswith(f"error: {tmp_path} is in use by process {process.pid} on ")
      assert (tmp_path / "config.json").stat().st_mtime_ns == config
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "Traceback" not in output
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
      done = checkpoints.latest()
    assert f"stopped after step {done}, which is saved; the same command continues" in output
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == list(range(done))
    assert not checkpoint.find_damage(tmp_path / "checkpoints" / str(done))
    (tmp_path / "curve.png").unlink()  # it is drawn each time


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_run_is_the_same(runs, tmp_path):
  """Flips one bit in the newer of two checkpoints, of steps 4 and 8."""
  whole, *_ = runs
  parts = tmp_path / "parts"
  shutil.copytree(whole, parts)
  files = (parts / "checkpoints" / "8").rglob("*")
  victim = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 4
  victim.write_bytes(content)
  output = train_in_process(parts)
  assert "warning: checkpoint 8 is damaged: " in output
  assert f"{victim.name} has other contents than were written" in output
  assert f"it is kept in {parts / 'damaged'}" in output
  assert "continuing from checkpoint 4" in output
  assert (parts / "damaged" / "8" / victim.relative_to(parts / "checkpoints" / "8")).is_file()
  for a, b in zip(
    *(jax.tree.leaves(final_state(workdir, 8)) for workdir in (whole, parts)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  rows = [
    [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(workdir)]
    for workdir in (whole, parts)
  ]
  assert rows[0] == rows[1]


def test_evaluate_command_reads_a_run(runs):
  whole, *_ = runs
  process = one_device(
    "--workdir", str(whole), "--samples", "2", "--json", module="grpo_jax.evaluate"
  )
  output, _ = process.communicate()
  assert process.returncode == 0, output
  numbers = json.loads(output.splitlines()[-1])
  recorded = next(
    row for row in reversed(read_metrics(whole)) if "eval/accuracy" in row and row["step"] == 8
  )
  assert numbers["eval/accuracy"] == recorded["eval/accuracy"]
  assert {"eval/pass@1", "eval/pass@2", "eval/pass@2_se"} <= set(numbers)
  process = one_device("--workdir", str(whole / "samples"), module="grpo_jax.evaluate")
  output, _ = process.communicate()
  assert process.returncode == 2
  assert "not a work directory" in output


# Scores by the number of the step, and raises at step 5 unless a file says that the judge is back.
JUDGE = """
import pathlib

def judge(prompts, completions, trainer_state, log_extra, log_metric, **columns):
  log_extra("seen_at", [trainer_state.global_step] * len(completions))
  log_metric("judge/progress", trainer_state.global_step / trainer_state.max_steps)
  here = pathlib.Path(__file__).parent
  if trainer_state.global_step == 5 and not (here / "back").exists():
    raise TimeoutError("the judge did not answer")
  return [sum(c.islower() for c in text) / 5 for text in completions]
"""


def test_a_reward_that_raises_saves_first_and_the_same_command_continues(tmp_path, capsys):
  (tmp_path / "judge.py").write_text(JUDGE)
  rows = [json.dumps({"prompt": f"{n}:"}) for n in range(12)]
  (tmp_path / "rows.jsonl").write_text("\n".join(rows))
  (tmp_path / "exp.py").write_text(
    "from experiments import tiny\n"
    "def get_config():\n"
    "  c = tiny.get_config()\n"
    "  c.task.name = 'jsonl'\n"
    "  with c.unlocked():\n"
    f"    c.task.settings.update(path={str(tmp_path / 'rows.jsonl')!r},\n"
    f"      reward={str(tmp_path / 'judge.py') + ':judge'!r}, eval_fraction=0.0)\n"
    "  return c\n"
  )

  def command(workdir, *overrides):
    code = train.main(
      ["--config", str(tmp_path / "exp.py"), "--workdir", str(tmp_path / workdir),
       "--config.steps=8", "--config.checkpoint.every=100", "--config.rollout.completion_length=5",
       "--config.log.samples=1", *overrides]
    )  # fmt: skip
    return code, capsys.readouterr()

  code, shown = command("run")
  assert code == 3
  assert "error: reward function 'judge' raised TimeoutError: the judge did not answer" in shown.err
  assert 'judge.py", line 9, in judge' in shown.err
  assert "the state after 5 steps is saved; the same command continues" in shown.out
  assert "Traceback" not in shown.out + shown.err
  with checkpoint.Checkpoints(tmp_path / "run", keep=2) as checkpoints:
    assert checkpoints.latest() == 5

  code, _ = command("skip", "--config.rewards.on_error=skip")
  assert code == 0
  rows = {row["step"]: row for row in read_metrics(tmp_path / "skip") if "loss" in row}
  assert [rows[step]["rewards/raised"] for step in (4, 5, 6)] == [0, 64, 0]
  assert (rows[5]["reward"], rows[5]["frac_unscored"]) == (None, 1.0)
  assert rows[6]["judge/progress"] == 6 / 8
  lines = (tmp_path / "skip" / "samples" / "step_000005.jsonl").read_text().splitlines()
  assert json.loads(lines[0])["rewards"] == {"judge": None}
  lines = (tmp_path / "skip" / "samples" / "step_000006.jsonl").read_text().splitlines()
  assert json.loads(lines[0])["seen_at"] == 6

  (tmp_path / "back").touch()
  assert command("run")[0] == 0
  assert command("whole")[0] == 0
  last = [tmp_path / name / "samples" / "step_000007.jsonl" for name in ("run", "whole")]
  assert last[0].read_text() == last[1].read_text()
  sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
  assert [session["reason"] for session in sessions] == ["error", "finished"]
  assert sessions[0]["error"] == "RewardError"
  assert sessions[0]["data"] == sessions[1]["data"]
  assert sessions[0]["data"]["train"]["problems"] > 0
  assert [host["process"] for host in sessions[1]["hosts"]] == [0]
  log = (tmp_path / "run" / "console.log").read_text()
  assert log.count("each step  8 prompts x 8 completions") == 2
  assert "raised TimeoutError" in log
  assert log.rstrip().endswith("checkpoints/")


def test_the_loop_fits_on_a_screen():
  """The loop is meant to be read, pasted into a notebook and changed."""
  lines = Path(train.__file__).read_text().splitlines()
  start = next(i for i, line in enumerate(lines) if line.strip().startswith("for step in range"))
  end = next(i for i, line in enumerate(lines) if line.strip() == "out.draw_curve()")
  assert end - start <= 25
