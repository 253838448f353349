"""Tests that need a GPU or a TPU, and skip elsewhere: `make device-check` runs them there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax
from grpo_jax import train
from grpo_jax.config import load
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.run.metrics import read_metrics
from tests.helpers.learning import MODEL, make_batch

pytestmark = pytest.mark.skipif(
  jax.devices()[0].platform == "cpu", reason="needs a GPU or a TPU, and JAX_PLATFORMS to name it"
)


def test_the_arrays_of_a_donated_state_are_given_up():
  optimizer = optax.adam(1e-3)
  step = make_train_step(MODEL, "dapo", optimizer)
  state = TrainState.create(MODEL.init(jax.random.key(0)), optimizer)
  before = [leaf for leaf in jax.tree.leaves(state.params) if isinstance(leaf, jax.Array)]
  state, _ = step(state, make_batch(temperature=1.0))
  assert before
  assert all(leaf.is_deleted() for leaf in before)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def logprob_error(precision, dtype="float32", width=1024, vocab=4096):
  """Returns the largest error of log-probs in nats, against float64 on the host."""
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(64, width)), rng.normal(size=(width, vocab)) / width**0.5
  tokens = rng.integers(0, vocab, 64)
  hidden, head = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (hidden, head))
  logits = hidden @ head
  largest = logits.max(axis=-1, keepdims=True)
  total = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[:, 0]
  expected = logits[np.arange(64), tokens] - total
  with jax.default_matmul_precision(precision):
    given = [jnp.asarray(a, dtype) for a in (hidden, head)]
    logp, _ = jax.jit(grpo_jax.head_logprobs)(*given, jnp.asarray(tokens))
  return float(np.abs(np.asarray(logp, np.float64) - expected).max())


def test_log_probs_in_float32_have_its_precision():
  """`model.matmul_precision=auto` is `highest` in float32; TF32 and bfloat16 passes would show."""
  assert logprob_error("highest") < 5e-5


def test_log_probs_at_lower_precision_are_rounded_as_announced():
  errors = {precision: logprob_error(precision) for precision in ("highest", "high", "default")}
  # TF32 has 11 bits, and a single bfloat16 pass 8: sums of 1024 products of size 1/32.
  assert errors["highest"] <= errors["high"] <= errors["default"] < 0.05


def test_the_sampler_and_the_trainer_agree(tmp_path):
  options = ["steps=2", "task.settings.eval_size=8", "rollout.group_size=4", "log.samples=0"]
  train.run(load("experiments/tiny.py", [f"--config.{o}" for o in options]), tmp_path)
  rows = [row for row in read_metrics(tmp_path) if "loss" in row]
  assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
