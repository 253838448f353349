"""Tests learning from completions that are given: pretraining, by the functions of a rollout."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config as configs
from grpo_jax import doctor, export, misfits, train
from grpo_jax.build import build
from grpo_jax.learning.step import make_loss
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.load import load, open_weights
from grpo_jax.rollout import RolloutConfig, collect, given
from grpo_jax.run.health import examine
from grpo_jax.run.metrics import read_metrics
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks import Example, make_task, score_with
from grpo_jax.tokens import ByteTokenizer, load_tokenizer

CONFIG = ModelConfig(
  vocab_size=257, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, tied=False
)
MODEL = Decoder(CONFIG)
SAMPLER = Sampler(MODEL, ByteTokenizer(), prompt_length=5, completion_length=4)
EXAMPLES = [
  Example("1+1=", {"answer": "2"}, "a"),
  Example("9+3=", {"answer": 12}, "b"),
  Example("7=", {"answer": "7"}, "c"),
]
END = 256


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def right(prompts, completions, answer, **columns):
  return [float(text == str(a)) for text, a in zip(completions, answer)]


def test_the_gradient_is_that_of_the_mean_cross_entropy(params):
  """Compares with plain rows of one sequence each, without padding, groups or caches."""
  config = RolloutConfig(1, "online_rft", given="answer")
  rollout = collect(SAMPLER, params, EXAMPLES, score_with(right), jax.random.key(1), config)
  assert rollout.metrics["reward"] == 1
  (_, metrics), gradient = jax.value_and_grad(make_loss(MODEL, "online_rft"), has_aux=True)(
    params, rollout.batch, None
  )

  def cross_entropy(params, by_token=False):
    sequences, tokens = [], []
    for example in EXAMPLES:
      prompt, own = list(example.prompt.encode()), [*str(example.columns["answer"]).encode(), END]
      row, length = jnp.array([prompt + own]), len(prompt)
      hidden = MODEL.score(params, row[:, :1], jnp.ones((1, 1), bool), row[:, None, 1:])
      logits = hidden[0, 0] @ MODEL.head(params)
      logp = jax.nn.log_softmax(logits)[jnp.arange(len(logits)), row[0, 1:]]
      tokens.append(-logp[length - 1 :])
      sequences.append(tokens[-1].mean())
    return jnp.concatenate(tokens).mean() if by_token else jnp.stack(sequences).mean()

  expected = jax.grad(cross_entropy)(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01
  nll = metrics["sampling/sampling_logp_difference/mean"]
  np.testing.assert_allclose(nll, cross_entropy(params, by_token=True), rtol=1e-5)


def test_completions_are_the_column_and_the_end_of_text():
  out = given(SAMPLER, EXAMPLES, "answer", 1)
  assert out.tokens[:, 0].tolist() == [[50, END, END, END], [49, 50, END, END], [55, END, END, END]]
  assert out.mask.sum(-1).ravel().tolist() == [2, 3, 2]
  assert out.prompts.tolist()[2] == [END, END, END, 55, 61]
  assert out.ended.all()
  groups = given(SAMPLER, [Example("a", {"x": ["b", "cd"]}, "a")], "x", 2)
  assert groups.texts == [["b", "cd"]]
  assert groups.mask.sum(-1).tolist() == [[2, 3]]


@pytest.mark.parametrize(
  ("example", "size", "message"),
  [
    (Example("a", {"b": 1}, "k"), 1, "'k' has no column 'answer' .* columns are b; set rollout"),
    (Example("a", {"answer": "b"}, "k"), 2, "'k' holds 1 completions, and rollout.group_size is 2"),
    (Example("a", {"answer": "wxyz"}, "k"), 1, "'wxyz' has 5 tokens .* completion length of 4"),
  ],
)
def test_what_cannot_be_given_is_named(example, size, message):
  with pytest.raises(ValueError, match=message):
    given(SAMPLER, [example], "answer", size)


def test_settings_of_samples_do_not_go_with_given_ones():
  c = configs.default_config()
  c.rollout.given, c.rollout.ahead, c.rollout.cache_gib = "solution", 1, 0.5
  assert misfits.given_misfits(c, make_task("letters")) == [
    "rollout.given is 'solution', and the problems of task 'letters' have no such column: they "
    "have none",
    "rollout.given is 'solution', and rollout.ahead is 1, which is for samples: set it to 0",
    "rollout.given is 'solution', and rollout.cache_gib is 0.5, which is for samples: set it to 0",
  ]
  c.rollout.given = ""
  assert misfits.given_misfits(c, make_task("letters")) == []


def test_no_finding_about_samples():
  c = configs.default_config()
  rows = [
    {"step": s, "reward": 1.0, "entropy": 0.0, "accuracy": 0.0, "frac_reward_zero_std": 1.0,
     "grad_norm": 1.0, "sampling/sampling_logp_difference/mean": 5.0}
    for s in range(30)
  ]  # fmt: skip
  assert "mismatch" in [finding.name for finding in examine(rows, c)]
  c.rollout.given = "answer"
  assert examine(rows, c) == []


@pytest.mark.slow
def test_a_model_of_ones_own_shape_is_pretrained_and_exported(tmp_path, capsys):
  """A config.json is enough: random weights, training, and a folder to go on from."""
  shape = read_json(Path("experiments/sums_moe/config.json"))
  shape |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
  shape |= {"num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8}
  (tmp_path / "config.json").write_text(json.dumps(shape))
  small = [
    f"model.source=random:{tmp_path}", "steps=12", "task.settings.train_size=8",
    "task.settings.eval_size=4", "rollout.prompts_per_step=8", "eval.every=0", "log.samples=0",
    "optimizer.warmup_steps=0", "optimizer.learning_rate=0.02",
  ]  # fmt: skip
  c = configs.load("experiments/sums_moe_base.py", [f"--config.{change}" for change in small])
  train.run(c, tmp_path / "run")
  rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
  nll = [row["sampling/sampling_logp_difference/mean"] for row in rows]
  assert abs(nll[0] - math.log(257)) < 1
  assert nll[-1] < nll[0] - 1.5  # eight sums, by heart
  assert not any("router/max_load" in row for row in rows)  # nothing was sampled
  assert "doctor" not in capsys.readouterr().out
  assert export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "base")]) == 0
  config, _ = load(str(tmp_path / "base"))
  assert (config.names, config.experts, config.layers) == ("qwen_moe", 4, 2)
  tokenizer = load_tokenizer(str(tmp_path / "base"))
  assert tokenizer.encode("12 + 3 =") == list(b"12 + 3 =")
  # A tokenizer beside the config.json is taken.
  assert load_tokenizer(f"random:{tmp_path / 'base'}").name == str(tmp_path / "base")


def test_random_weights_of_a_config_file_follow_the_seed(tmp_path):
  source = "random:experiments/sums_moe/config.json"
  first, again, other = (open_weights(source, seed=seed).read() for seed in (0, 0, 1))
  np.testing.assert_array_equal(first["embed"], again["embed"])
  assert np.abs(first["embed"] - other["embed"]).max() > 0.1
  (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
  with pytest.raises(ValueError, match="no_such_family"):
    open_weights(f"random:{tmp_path}")
  with pytest.raises(ValueError, match=r"unknown random model 'nowhere'; known: .* the path of a"):
    open_weights("random:nowhere")


def test_the_doctor_says_nothing_of_the_group_of_one():
  run = build(configs.load("experiments/sums_moe_base.py", ["--config.task.settings.train_size=9"]))
  assert [finding.name for finding in doctor.before(run)] == []
