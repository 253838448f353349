"""Trains small reward models: they learn, continue, fit any mesh, and are what the files hold."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax import train as grpo
from grpo_jax.config import ConfigError, load
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.preferences import pair_rewards
from grpo_jax.models.load import open_weights
from grpo_jax.reward_model import RewardModel, training
from grpo_jax.reward_model.pairs import Pair
from grpo_jax.reward_model.training import Settings, build, make_batch, with_overrides
from grpo_jax.run import reading
from grpo_jax.run.metrics import read_metrics
from grpo_jax.run.signals import Signals, Stopped
from grpo_jax.run.workdir import WorkdirError
from grpo_jax.tasks.files import open_rows
from tests.helpers import preferences

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAST = [
  "--config.optimizer.learning_rate=3e-3", "--config.compilation_cache=off",
  "--config.chat.date=2026-01-01",
]  # fmt: skip
TIMES = ("step_time", "tokens_per_second", "time/sampling", "time/rewards")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  return preferences.write(folder / "pairs.jsonl", preferences.shorter_wins(400))


def run_of(data, *overrides, **settings):
  settings = {"model": "random:tiny", "data": [data], "pairs_per_step": 16, **settings}
  return build(Settings(**settings), with_overrides([*FAST, *overrides]))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
  """Returns a run of two passes over 360 pairs, its work directory and its last metrics."""
  run, workdir = run_of(data, "--config.epochs=2"), tmp_path_factory.mktemp("run")
  return run, workdir, training.train(run, workdir)


# --- learning -------------------------------------------------------------------------------------


def test_it_learns_that_the_shorter_text_wins(trained):
  run, workdir, results = trained
  rows = read_metrics(workdir)
  before = next(row for row in rows if "eval/n" in row)
  assert (before["step"], before["eval/n"], before["eval/accuracy"]) == (0, 40, 0.5)
  assert before["eval/loss"] == pytest.approx(np.log(2))
  assert results["eval/accuracy"] > 0.9
  assert results["eval/margin"] > 1
  assert results["eval/accuracy_se"] < 0.05
  steps = [row for row in rows if "loss" in row]
  assert [row["step"] for row in steps] == list(range(45))  # 2 * 360 / 16
  assert steps[0]["num_tokens"] == sum(pair.tokens for pair in run.examples(0))
  assert (workdir / "curve.png").is_file()


def test_no_prompt_is_in_both_splits(trained):
  splits = trained[0].pairs.splits
  train, held = ({pair.key for pair in splits[name]} for name in ("train", "eval"))
  assert not train & held
  assert (len(train), len(held)) == (360, 40)


# --- the model that it leaves ---------------------------------------------------------------------


def test_the_saved_folder_scores_as_the_trained_parameters_do(trained, data):
  run, workdir, _ = trained
  _, params = reading.read_params(workdir)
  pairs = run.pairs.splits["eval"]
  expected = pair_rewards(run.model, params, make_batch(pairs, len(pairs), run.lengths))
  rows = {row["prompt"]: row for row in map(open_rows([data]).__getitem__, range(400))}
  held = [rows[pair.key] for pair in pairs]
  model = RewardModel.load(str(workdir / "model"))
  for side, name in enumerate(("chosen", "rejected")):
    scores = model([row["prompt"] for row in held], [row[name] for row in held])
    np.testing.assert_allclose(scores, expected[:, side], atol=1e-4)


def test_the_saved_folder_is_a_classifier_of_transformers(trained):
  """It has one label, and the padding token of its tokenizer. fixtures/interop.py loads such."""
  folder = trained[1] / "model"
  raw = json.loads((folder / "config.json").read_text())
  assert raw["architectures"] == ["LlamaForSequenceClassification"]
  assert (raw["id2label"], raw["pad_token_id"]) == ({"0": "LABEL_0"}, 256)
  assert {"tokenizer.json", "model.safetensors", "chat_template.jinja"} <= {
    file.name for file in folder.iterdir()
  }


@pytest.mark.slow
def test_grpo_and_ppo_learn_against_it(trained, tmp_path):
  """A critic may start from it too."""
  folder = trained[1] / "model"
  config = load("experiments/tiny.py", [
    f"--config.reward_model.source={folder}", f"--config.critic.source={folder}",
    "--config.algorithm.name=ppo", "--config.steps=1", "--config.task.settings.eval_size=4",
    "--config.rewards.workers=0", "--config.compilation_cache=off", "--config.log.samples=0",
  ])  # fmt: skip
  grpo.run(config, tmp_path / "ppo")
  row = next(row for row in read_metrics(tmp_path / "ppo") if "loss" in row)
  assert np.isfinite([row["rewards/reward_model/mean"], row["critic/loss"]]).all()
  assert row["critic/values_mean"] != 0  # its head is not the new one of zeros


def test_a_reward_model_may_be_trained_further(trained, data, tmp_path):
  """The first evaluation is the last one of the run before."""
  run = run_of(data, "--config.epochs=0.1", model=str(trained[1] / "model"))
  assert run.pad_id == 256
  results = run.evaluate(run.initial_state().params)
  assert results == pytest.approx(trained[2], abs=1e-4)


@pytest.mark.parametrize(
  ("name", "expected"), [("tiny_llama", 7), ("tiny_llama_reward", 0), ("tiny_qwen2_reward", 2)]
)
def test_the_padding_token_of_a_classifier_stays(name, expected):
  assert training.pad_id_of(str(FIXTURES / name), 7) == expected
  assert training.pad_id_of("random:tiny", 256) == 256


# --- the same on every mesh, and after an interruption --------------------------------------------


def test_parameters_and_batches_lie_on_the_mesh(data):
  run = run_of(data, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
  state = run.initial_state()
  assert state.params["layers"]["q"].sharding.spec == P(None, "fsdp", "tensor")
  assert state.opt_state[1][0].mu["layers"]["q"].sharding.spec == P(None, "fsdp", "tensor")
  batch = run.batch(run.examples(0))
  assert batch.completions.sharding == meshes.batch_sharding(run.mesh)


@pytest.mark.slow
def test_the_mesh_changes_nothing(data, tmp_path):
  losses = []
  for name, mesh in (("data", (8, 1, 1)), ("all", (2, 2, 2))):
    axes = (f"--config.mesh.{a}={n}" for a, n in zip(("data", "fsdp", "tensor"), mesh))
    run = run_of(data, "--config.epochs=0.2", *axes)
    training.train(run, tmp_path / name)
    losses.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
  assert len(losses[0]) == 5
  np.testing.assert_allclose(*losses, rtol=1e-3)
  assert losses[0][0] != losses[0][-1]


def test_an_interrupted_run_continues_to_the_same_bits(data, tmp_path, monkeypatch):
  def run():
    return run_of(data, "--config.epochs=0.2", "--config.eval.every=2")

  training.train(run(), tmp_path / "whole")
  with monkeypatch.context() as patch:
    signals = iter([0, 0, 15])
    patch.setattr(Signals, "of_any_host", lambda self, step: next(signals))
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
      training.train(run(), tmp_path / "parts")
  assert not (tmp_path / "parts" / "model").exists()
  training.train(run(), tmp_path / "parts")
  weights = [
    (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")
  ]
  assert weights[0] == weights[1]
  rows = [
    [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(tmp_path / name)]
    for name in ("whole", "parts")
  ]
  assert rows[0] == rows[1]
  assert [row["step"] for row in rows[0] if "eval/n" in row] == [0, 2, 4, 5]
  # A finished run has nothing to do, and says what it said.
  assert training.train(run(), tmp_path / "parts")["eval/n"] == 40


def test_other_settings_or_data_are_refused(data, trained, tmp_path):
  _, workdir, _ = trained
  with pytest.raises(ConfigError) as caught:
    training.train(run_of(data, "--config.epochs=2", "--config.seed=1", center=0.5), workdir)
  assert "put back center: 0.0 -> 0.5" in str(caught.value)
  assert "put back config.seed: 0 -> 1" in str(caught.value)
  run = run_of(data, "--config.epochs=2", "--config.eval.every=7", "--config.train.micro_batches=2")
  training.check_workdir(run, workdir)  # these may change
  text = Path(data).read_text()
  try:
    Path(data).write_text(text.replace("say 7", "say seven"))
    with pytest.raises(ConfigError, match=r"put back .*pairs\.jsonl has changed"):
      training.check_workdir(run, workdir)
  finally:
    Path(data).write_text(text)
  (workdir / training.SETTINGS).rename(tmp_path / "settings")
  (workdir / training.SETTINGS).write_text("[]")
  with pytest.raises(WorkdirError, match=r"reward_model\.json is damaged \(it does not hold set"):
    training.check_workdir(run, workdir)
  (tmp_path / "settings").rename(workdir / training.SETTINGS)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(WorkdirError, match=r"is the work directory of a run of grpo_jax\.train"):
    training.check_workdir(run, tmp_path)


def test_the_day_of_the_chat_template_is_that_of_the_first_command(trained, tmp_path):
  config = with_overrides([])
  assert training.with_chat_date(config, trained[1]).chat.date == "2026-01-01"
  assert len(training.with_chat_date(config, tmp_path).chat.date) == len("2026-01-01")
  given = with_overrides(["--config.chat.date=2020-02-02"])
  assert training.with_chat_date(given, trained[1]).chat.date == "2020-02-02"


def test_too_many_skipped_updates_end_the_run(data, tmp_path):
  run = run_of(data, "--config.epochs=0.2", "--config.train.max_skipped=2")
  pairs = [dataclasses.replace(pair, margin=np.nan) for pair in run.pairs.splits["train"]]
  splits = {"train": pairs, "eval": run.pairs.splits["eval"]}
  run = dataclasses.replace(run, pairs=dataclasses.replace(run.pairs, splits=splits))
  with pytest.raises(
    training.SkippedError, match=r"^2 updates in a row were skipped.*step 2 is sa"
  ):
    training.train(run, tmp_path)


# --- batches and metrics --------------------------------------------------------------------------


def pair_of(prefix, chosen, rejected, margin=0.0):
  arrays = [np.arange(1, n + 1, dtype=np.int32) for n in (prefix, chosen, rejected)]
  return Pair(arrays[0], tuple(arrays[1:]), margin, "key")


def test_a_batch_is_padded_to_one_of_few_lengths():
  batch = make_batch([pair_of(3, 2, 20), pair_of(5, 1, 0, 2.0)], 3, (100, 200))
  assert (batch.prompts.shape, batch.completions.shape) == ((3, 25), (3, 2, 25))
  assert batch.prompts[:, -5:].tolist() == [[0, 0, 1, 2, 3], [1, 2, 3, 4, 5], [0] * 5]
  assert batch.prompt_mask.sum(1).tolist() == [3, 5, 0]
  assert batch.completions[0, 0, :4].tolist() == [1, 2, 0, 0]
  assert batch.lengths.tolist() == [[2, 20], [1, 0], [0, 0]]
  assert (batch.margins.tolist(), batch.weights.tolist()) == ([0, 2, 0], [0.5, 0.5, 0])
  # The longest rest leaves one slot: the state after the last token is read there.
  full = make_batch([pair_of(100, 199, 1)], 1, (100, 200))
  assert (full.prompts.shape, full.completions.shape) == ((1, 100), (1, 2, 200))


def test_metrics_of_held_out_pairs_by_hand():
  metrics = training.metrics_of(np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
  assert metrics["eval/accuracy"] == 0.5
  assert metrics["eval/accuracy_se"] == pytest.approx(0.5 / np.sqrt(3))
  assert metrics["eval/margin"] == pytest.approx(1 / 3)
  assert metrics["eval/loss"] == pytest.approx((2 * np.log(2) + np.log(1 + np.e)) / 3)


# --- what is wrong is said before anything compiles -----------------------------------------------


def test_all_mistakes_are_listed(data, tmp_path):
  with pytest.raises(ConfigError) as caught:
    run_of(
      data, "--config.epochs=0", "--config.optimizer.learning_rate=-1", center=-1.0,
      model=str(tmp_path / "none"),
    )  # fmt: skip
  for text in (
    "epochs is 0.0, it must be above 0", "optimizer.learning_rate is -1", "--center is -1.0",
    "no model at",
  ):  # fmt: skip
    assert text in str(caught.value)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"pairs_per_step": 12}, r"--pairs-per-step is 12, .* multiple of 8.* set --pairs-per-step=16"),
    ({"max_length": 5000}, "--max-length is 5000, and random:tiny has a context of 4096 tokens"),
    ({"max_length": 20}, r"line 1: 'chosen' has \d+ tokens with its prompt, allowed: 20"),
    ({"path": "none.jsonl"}, "no such file: none.jsonl"),
    ({"source": {"eval_fraction": 1.5}}, r"eval_fraction is 1.5: it must be in \[0, 1\)"),
  ],
)
def test_a_mistake_is_named(data, settings, message):
  path = settings.pop("path", data)
  with pytest.raises(ConfigError, match=message):
    run_of(path, **settings)


def test_weights_that_are_not_finite_are_named(data):
  run = run_of(data)
  parts = {**run.weights.parts, "final_norm": lambda index: np.full(64, np.nan)[index]}
  run = dataclasses.replace(run, weights=dataclasses.replace(run.weights, parts=parts))
  with pytest.raises(ConfigError, match=r"model 'random:tiny': .*final_norm hold NaN"):
    run.initial_state()


def test_fields_that_have_no_meaning_here_are_refused():
  with pytest.raises(ConfigError, match=r"rollout\.group_size is not read here; fields that are:"):
    with_overrides(["--config.rollout.group_size=4"])
  with pytest.raises(ConfigError, match="'--help' is not an override"):
    with_overrides(["--help"])
  c = with_overrides(["--config.optimizer.warmup_steps=3"])
  assert (c.optimizer.warmup_steps, c.epochs, c.optimizer.learning_rate) == (3, 1.0, 1e-5)


def test_evaluation_data_of_their_own(data, tmp_path):
  other = preferences.write(tmp_path / "test.jsonl", preferences.shorter_wins(5, seed=1))
  with pytest.warns(UserWarning, match="left out of training: 5 of 400 rows"):
    run = run_of(data, source={"eval_path": other})
  assert (len(run.pairs.splits["train"]), len(run.pairs.splits["eval"])) == (395, 5)
  none = run_of(data, source={"eval_fraction": 0.0})
  assert none.evaluate(None) == {}
  assert open_weights("random:tiny").config.labels == 0  # the source itself is a language model


def test_devices_see_the_same_step(data):
  """The order of the pairs depends on the seed and the step alone."""
  first, again = run_of(data), run_of(data)
  assert [p.key for p in first.examples(3)] == [p.key for p in again.examples(3)]
  other = run_of(data, "--config.seed=1")
  assert [p.key for p in first.examples(3)] != [p.key for p in other.examples(3)]
  assert jax.device_count() == 8
