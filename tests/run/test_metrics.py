"""Metrics: their values by hand, what a kill and a resume leave in the files, what is shown."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.run import metrics as metrics_module
from grpo_jax.run.metrics import MetricsWriter, OneStepLate, curve, read_metrics, rollout_metrics

NAN = math.nan


def test_rollout_metrics_by_hand():
  rewards = np.array([[1.0, 0.0, 2.0], [0.3, 0.3, 0.3], [NAN, 4.0, NAN], [NAN, NAN, NAN]])
  lengths = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 8], [8, 2, 2]])
  truncated = lengths == 8
  out = rollout_metrics(rewards, {"right": rewards, "never": rewards * NAN}, lengths, truncated)
  values = [1.0, 0.0, 2.0, 0.3, 0.3, 0.3, 4.0]  # sum 7.9
  mean = 7.9 / 7
  std = math.sqrt(sum((value - mean) ** 2 for value in values) / 6)
  expected = {
    "reward": mean,
    "reward_std": std,
    "rewards/right/mean": mean,
    "rewards/never/mean": NAN,
    "frac_reward_zero_std": 2 / 3,  # of three groups with a score, the second and the third
    "frac_unscored": 5 / 12,
    "completions/mean_length": 56 / 12,
    "completions/min_length": 1,
    "completions/max_length": 8,
    "completions/mean_terminated_length": 32 / 9,
    "completions/clipped_ratio": 3 / 12,
  }
  assert out.keys() == expected.keys()
  for name, value in expected.items():
    assert out[name] == pytest.approx(value, nan_ok=True), name
    assert type(out[name]) is float


def test_rollout_metrics_with_nothing_scored_or_nothing_ended():
  ones = np.ones((2, 2), int)
  out = rollout_metrics(np.full((2, 2), NAN), {}, ones, ones == 1)
  assert math.isnan(out["reward"])
  assert math.isnan(out["reward_std"])
  assert math.isnan(out["frac_reward_zero_std"])
  assert math.isnan(out["completions/mean_terminated_length"])
  assert out["frac_unscored"] == out["completions/clipped_ratio"] == 1.0


def test_rollout_metrics_wants_one_shape():
  with pytest.raises(ValueError, match=r"lengths has shape \(2,\), rewards \(1, 2\)"):
    rollout_metrics(np.zeros((1, 2)), {}, np.zeros(2, int), np.zeros((1, 2), bool))


def test_one_step_late(monkeypatch):
  written, gets = [], []
  get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: gets.append(len(tree)) or get(tree))
  late = OneStepLate(lambda step, values: written.append((step, values)))
  late.push(4, {"loss": jnp.float32(0.5), "n": jnp.int32(3), "host": 1.5})
  assert written == []
  assert gets == []
  late.push(5, {"loss": jnp.bfloat16(0.25)})
  assert written == [(4, {"loss": 0.5, "n": 3, "host": 1.5})]
  assert gets == [3]  # one transfer for the step, not one for each metric
  assert all(type(value) in (float, int) for value in written[0][1].values())
  late.flush()
  late.flush()
  assert written[1:] == [(5, {"loss": 0.25})]


def test_one_step_late_under_a_transfer_guard():
  written = []
  with jax.transfer_guard("disallow"):
    late = OneStepLate(lambda step, values: written.append(values))
    late.push(0, {"loss": jax.device_put(np.float32(0.5))})
    late.flush()
  assert written == [{"loss": 0.5}]


def test_one_step_late_names_a_metric_that_is_no_number():
  late = OneStepLate(lambda step, values: None)
  late.push(0, {"kl": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"metric 'kl' has shape \(3,\)"):
    late.flush()


def lines(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def test_metrics_are_lines_of_json_at_once(tmp_path):
  writer = MetricsWriter(tmp_path / "new" / "run", total_steps=3)
  writer.write(0, {"reward": 0.5, "kl": NAN, "accuracy": np.float32(0.25), "num_tokens": 7})
  assert lines(tmp_path / "new" / "run") == [
    '{"step": 0, "accuracy": 0.25, "kl": null, "num_tokens": 7, "reward": 0.5}'
  ]
  writer.write(1, {"reward": math.inf, "eval/accuracy": None})
  writer.close()
  writer.close()
  assert read_metrics(tmp_path / "new" / "run")[1] == {
    "step": 1,
    "eval/accuracy": None,
    "reward": None,
  }


@pytest.mark.parametrize("value", ["0.5", np.zeros(2), [1.0]])
def test_a_metric_is_a_number(tmp_path, value):
  with MetricsWriter(tmp_path, 1) as writer, pytest.raises(ValueError, match="metric 'kl' is"):
    writer.write(0, {"kl": value})
  with MetricsWriter(tmp_path, 1) as writer, pytest.raises(ValueError, match="not named 'step'"):
    writer.write(0, {"step": 1.0})


def run(workdir, steps, total=8, resume_step=None):
  with MetricsWriter(workdir, total, resume_step, show=False) as writer:
    for step in steps:
      writer.write(step, {"reward": step / 10})
      writer.write_samples(step, [{"prompt": "p", "completion": "c", "reward": step}])


def test_a_killed_and_resumed_run_leaves_what_an_uninterrupted_one_does(tmp_path):
  run(tmp_path / "whole", range(8))
  run(tmp_path / "parts", range(6))
  path = tmp_path / "parts" / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + b'{"step": 6, "rew')  # killed while writing
  run(tmp_path / "parts", range(4, 8), resume_step=4)
  assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  names = [p.name for p in sorted((tmp_path / "parts" / "samples").iterdir())]
  assert names == [f"step_{step:06d}.jsonl" for step in range(8)]
  assert not list((tmp_path / "parts").glob(".*"))


def test_resuming_drops_samples_of_steps_that_will_run_again(tmp_path):
  run(tmp_path, range(6))
  MetricsWriter(tmp_path, 8, resume_step=4).close()
  assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [
    f"step_{step:06d}.jsonl" for step in range(4)
  ]
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_kill_before_the_line_ends_loses_no_step_that_counts(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "reward": 0.1}\n{"step": 1, "reward": 0.2}')  # no newline
  run(tmp_path, [2], resume_step=2)
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_run_that_starts_over_starts_its_file_over(tmp_path):
  run(tmp_path, range(3))
  run(tmp_path, range(2))
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_kill_while_rewriting_keeps_the_old_file(tmp_path, monkeypatch):
  run(tmp_path, range(6))
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics_module.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    MetricsWriter(tmp_path, 8, resume_step=2)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a line of metrics"):
    read_metrics(tmp_path)


def test_samples_are_json_lines_even_with_numpy_and_nan(tmp_path):
  with MetricsWriter(tmp_path, 1) as writer:
    path = writer.write_samples(12, [{"reward": np.float32(NAN), "ids": np.arange(2), "ok": True}])
  assert path == tmp_path / "samples" / "step_000012.jsonl"
  assert json.loads(path.read_text()) == {"reward": None, "ids": [0, 1], "ok": True}


def test_tensorboard_events_are_written(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  run(tmp_path, range(3))
  run(tmp_path, range(2, 4), resume_step=2)

  def events(path):  # a record: length, its checksum, the event, the event's checksum
    raw, at = path.read_bytes(), 0
    while at < len(raw):
      size = int.from_bytes(raw[at : at + 8], "little")
      yield Event.FromString(raw[at + 12 : at + 12 + size])
      at += size + 16

  found = [e for p in sorted((tmp_path / "tensorboard").iterdir()) for e in events(p)]
  scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
  assert sorted(step for step, *_ in scalars) == [0, 1, 2, 2, 3]
  assert (1, "reward", pytest.approx(0.1)) in scalars
  # The second file tells TensorBoard to forget what the first has for step 2 and later.
  assert [e.step for e in found if e.HasField("session_log")] == [2]


def test_one_plain_line_per_step_without_a_terminal(tmp_path, capsys):
  with MetricsWriter(tmp_path, 20) as writer:
    writer.write(0, {"eval/accuracy": 0.475})
    writer.write(0, {"reward": 0.5, "entropy": 1.25, "accuracy": 0.25, "tokens_per_second": 1500.4})
    writer.print_samples(
      [
        {"prompt": "1 + 1 = 2\n5 - 9 =", "completion": " -4\n", "reward": 1.0},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "[/b]", "reward": NAN},
      ]
    )
  shown = capsys.readouterr().out.splitlines()
  assert shown[0] == "step 0: eval/accuracy 0.475"
  assert shown[1].startswith(
    "step    1/20  reward 0.500  accuracy 0.250  entropy 1.250  tokens/s 15"
  )
  assert shown[2:] == [r"    1.00 | 5 - 9 = -> ' -4\n'", "    none | Hi -> '[/b]'"]


def test_a_terminal_gets_a_bar_and_completions_as_they_are(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "200")
  with MetricsWriter(tmp_path, 20, resume_step=3) as writer:
    writer.write(3, {"reward": 0.5})
    writer.print_samples([{"prompt": "p", "completion": "[/b] [red]x", "reward": 0.0}])
  shown = capsys.readouterr().out
  assert "'[/b] [red]x'" in shown
  assert "reward 0.500" in shown
  assert "4/20" in shown


def test_nothing_is_shown_where_not_wanted(tmp_path, capsys):
  run(tmp_path, range(2))
  assert capsys.readouterr().out == ""


def test_curve_draws_a_picture(tmp_path):
  with MetricsWriter(tmp_path, 30, show=False) as writer:
    writer.write(0, {"eval/accuracy": 0.4})
    for step in range(30):
      writer.write(step, {"reward": step / 30, "entropy": NAN if step == 3 else 1 / (step + 1)})
    writer.write(30, {"eval/accuracy": 0.9})
  path = curve(tmp_path)
  assert path == tmp_path / "curve.png"
  import matplotlib.image

  picture = matplotlib.image.imread(path)
  assert picture.shape[0] > 400
  assert picture.shape[1] > 800
  assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_curve_of_one_step_and_of_none(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
  assert curve(tmp_path).stat().st_size > 1000
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": null}\n')
  with pytest.raises(ValueError, match="no reward, accuracy or entropy to draw"):
    curve(tmp_path)
