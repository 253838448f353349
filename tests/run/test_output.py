"""Tests what a run writes, when it writes it, and that only the first host does."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest

from grpo_jax.distributed import hosts
from grpo_jax.evaluate import Evaluation
from grpo_jax.learning.step import TrainState
from grpo_jax.run import output
from grpo_jax.run.metrics import read_metrics
from grpo_jax.run.output import Output
from grpo_jax.run.signals import Stopped
from grpo_jax.run.workdir import WorkdirError

SAMPLES = [{"prompt": f"{n // 3}:", "completion": "c", "reward": 1.0} for n in range(5)]


def state_after(step):
  state = TrainState.create({"w": jnp.full(3, float(step))}, optax.sgd(0.1))
  return TrainState(jnp.int32(step), state.params, state.opt_state, history=state.history)


def run_steps(out, steps):
  for step in steps:
    out.start_step()
    out.write_step(step, {"loss": jnp.float32(step)}, SAMPLES, num_tokens=10)


def test_metrics_are_written_a_step_late_with_time_and_tokens(tmp_path, monkeypatch):
  times = iter([0.0, 0.0, 100.0, 104.0, 200.0, 205.0])
  monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(times)))
  with Output(tmp_path, steps=8, samples_every=0) as out:
    assert out.resume(state_after(0))[0] == 0
    run_steps(out, [0])
    assert read_metrics(tmp_path) == []
    run_steps(out, [1])
    row = {"step": 0, "loss": 0.0, "step_time": 4.0, "tokens_per_second": 2.5, "num_tokens": 10.0}
    assert read_metrics(tmp_path) == [row]
    out.write_evaluation(2, Evaluation({"eval/accuracy": 0.5}, SAMPLES))
  rows = read_metrics(tmp_path)
  assert [row["step"] for row in rows] == [0, 1, 2]
  assert rows[1]["num_tokens"] == 20
  names = sorted(path.name for path in (tmp_path / "samples").iterdir())
  assert names == ["eval_000002.jsonl", "step_000000.jsonl", "step_000001.jsonl"]


def test_a_resumed_run_continues_counting_tokens(tmp_path):
  with Output(tmp_path, steps=8) as out:
    out.resume(state_after(0))
    run_steps(out, range(2))
    out.save(2, state_after(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]  # before the checkpoint
    run_steps(out, range(2, 4))
  with Output(tmp_path, steps=8) as out:
    start, state = out.resume(state_after(0))
    assert (start, float(state.params["w"][0])) == (2, 2.0)
    assert not (tmp_path / "samples" / "step_000002.jsonl").exists()
    run_steps(out, [2])
    out.save(3, state_after(3))
    out.check()
  rows = read_metrics(tmp_path)
  assert [(row["step"], row["num_tokens"]) for row in rows] == [(0, 10), (1, 20), (2, 30)]


def test_a_work_directory_with_more_steps_than_the_run_is_refused(tmp_path):
  with Output(tmp_path, steps=8) as out:
    out.resume(state_after(0))
    run_steps(out, range(4))
    out.save(4, state_after(4))
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with (
    Output(tmp_path, steps=3) as out,
    pytest.raises(WorkdirError, match="holds 4 finished steps, and steps is 3"),
  ):
    out.resume(state_after(0))
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_completions_are_printed_every_few_steps(tmp_path, capsys):
  with Output(tmp_path, steps=8, samples=2, samples_every=3) as out:
    out.resume(state_after(0))
    capsys.readouterr()
    printed = []
    for step in range(5):
      run_steps(out, [step])
      printed.append(capsys.readouterr().out.count("-> 'c'"))
  assert printed == [2, 0, 0, 2, 0]


def interrupted_run(workdir, evaluation, reason):
  """Writes an evaluation and then raises."""
  with Output(workdir, steps=8) as out:
    out.resume(state_after(0))
    out.write_evaluation(0, evaluation)
    raise reason


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, Stopped])
def test_the_curve_of_an_interrupted_run_is_drawn(tmp_path, error):
  reason = error("stop", 2) if error is Stopped else error("stop")
  evaluation = Evaluation({"eval/accuracy": 0.25, "eval/n": 8.0}, SAMPLES)
  with pytest.raises(error) as caught:
    interrupted_run(tmp_path, evaluation, reason)
  assert caught.value is reason
  assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_reason_of_an_interruption_is_kept_if_nothing_can_be_drawn(tmp_path):
  with pytest.raises(ValueError, match="the reason") as caught:
    interrupted_run(tmp_path, Evaluation({}, []), ValueError("the reason"))
  assert str(caught.value) == "the reason"
  assert not (tmp_path / "curve.png").exists()


def test_a_save_is_due_after_some_seconds_by_the_clock_of_the_first_host(tmp_path, monkeypatch):
  now = [50.0]
  monkeypatch.setattr("grpo_jax.run.output.time.monotonic", lambda: now[0])
  with Output(tmp_path, steps=8, save_seconds=10.0) as out:
    now[0] = 55.0
    out.resume(state_after(0))
    now[0] = 64.9
    assert not out.is_save_due()
    now[0] = 65.0
    assert out.is_save_due()
    out.save(1, state_after(1))
    assert not out.is_save_due()
    now[0] = 75.0
    assert out.is_save_due()
    monkeypatch.setattr("grpo_jax.distributed.hosts.of_first", lambda flag: not flag)
    assert not out.is_save_due()  # the first host thinks otherwise


def test_without_seconds_no_save_is_due_and_no_host_is_asked(tmp_path, monkeypatch):
  monkeypatch.setattr("grpo_jax.distributed.hosts.of_first", None)
  with Output(tmp_path, steps=8) as out:
    out.resume(state_after(0))
    assert out.is_save_due() is False


def test_an_evaluation_without_metrics_is_not_written(tmp_path):
  with Output(tmp_path, steps=8) as out:
    out.resume(state_after(0))
    out.write_evaluation(0, Evaluation({}, []))
  assert (tmp_path / "metrics.jsonl").read_text() == ""
  assert not (tmp_path / "samples").exists()


def test_hosts_other_than_the_first_write_no_metrics(tmp_path, monkeypatch, capsys):
  with Output(tmp_path, steps=2) as out:
    out.resume(state_after(0))
    out.write_evaluation(0, Evaluation({"eval/accuracy": 0.25}, SAMPLES))
  capsys.readouterr()
  before = sorted(tmp_path.rglob("*"))
  monkeypatch.setattr(hosts, "is_first", lambda: False)
  with Output(tmp_path, steps=2) as out:
    out.resume(state_after(0))
    run_steps(out, range(2))
    out.write_evaluation(2, Evaluation({"eval/accuracy": 0.5}, SAMPLES))
    out.draw_curve()
  assert sorted(tmp_path.rglob("*")) == before
  assert json.loads((tmp_path / "metrics.jsonl").read_text())["eval/accuracy"] == 0.25
  assert capsys.readouterr().out == ""
