"""Tests products of rounded factors: by hand, in a whole model, on meshes, and in runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.models.int8 import (
  Int8Matrix,
  int8_matmul,
  int8_matrix,
  rotate,
  rounded,
  with_int8_matrices,
)
from grpo_jax.models.io.weights import MATRICES
from grpo_jax.rollout import collect
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from grpo_jax.tasks.rewards.workers import score_in_process

TINY = "experiments/tiny.py"
INT8 = [
  "--config.rollout.weights=int8",
  "--config.algorithm.correction=token_truncate",
  "--config.algorithm.correction_max=2.0",
  "--config.rollout.completion_length=6",
]


def test_a_product_by_hand():
  """Levels 127, -50 and 1 of scale 0.02; columns of scale 0.01 and, of zeros, 0."""
  h = jnp.array([[2.54, -1.0, 0.015]])
  matrix = int8_matrix(jnp.array([[1.27, 0.0], [0.5, 0.0], [-1.27, 0.0]]))
  assert matrix.values.tolist() == [[127, 0], [50, 0], [-127, 0]]
  np.testing.assert_allclose(matrix.scales, [[0.01, 0.0]], rtol=1e-6)
  expected = (127 * 127 - 50 * 50 - 127) * 0.02 * 0.01
  np.testing.assert_allclose(jax.jit(int8_matmul)(h, matrix), [[expected, 0.0]], rtol=1e-6)


def test_long_sums_do_not_overflow():
  """127 * 127 * 4096 is beyond int16, and beyond the whole numbers of float32."""
  rotated = rotate(jnp.ones((1, 4096)))  # rotated again, it is all ones
  matrix = int8_matrix(rotated.T)
  assert (matrix.values == 127).all()
  np.testing.assert_allclose(int8_matmul(rotated, matrix), 4096.0, rtol=1e-6)


def hadamard(size):
  """Sylvester's matrix by the parity of common bits of row and column, divided by its root."""
  common = np.arange(size)[:, None] & np.arange(size)
  return np.array([[(-1.0) ** int(n).bit_count() for n in row] for row in common]) / np.sqrt(size)


def rotation(size):
  block = min(size & -size, 64)
  return np.kron(np.eye(size // block), hadamard(block))


@pytest.mark.parametrize("size", [3, 8, 96, 192])
def test_a_rotation_is_orthogonal_and_that_of_hadamards_blocks(size):
  x = np.random.default_rng(0).normal(size=(2, 5, size))
  np.testing.assert_allclose(rotate(jnp.float32(x)), x @ rotation(size), atol=1e-5)
  np.testing.assert_allclose(rotation(size) @ rotation(size), np.eye(size), atol=1e-12)


def test_one_large_channel_does_not_make_the_others_coarse():
  """A channel of 100 among those of about 1, which would have three levels without the rotation."""
  rng = np.random.default_rng(0)
  h, weights = rng.normal(size=(64, 128)), rng.normal(size=(128, 32))
  h[:, 5] = 100
  exact = h @ weights
  error = np.abs(int8_matmul(jnp.float32(h), int8_matrix(jnp.float32(weights))) - exact).mean()
  plain = Int8Matrix(*rounded(jnp.float32(weights), axis=-2))
  levels, scales = rounded(jnp.float32(h), axis=-1)
  without = np.asarray(levels, float) @ np.asarray(plain.values, float) * scales * plain.scales
  assert error < 0.4 * np.abs(without - exact).mean()


def test_only_matrices_of_layers_are_rounded():
  run = build(load(TINY, INT8))
  params = run.loaded_params()
  small = with_int8_matrices(params)
  kinds = {name: isinstance(leaf, Int8Matrix) for name, leaf in small["layers"].items()}
  assert {name for name, is_rounded in kinds.items() if is_rounded} == set(MATRICES)
  assert small["embed"] is params["embed"]
  rotated = np.stack([rotation(len(q)) @ q for q in np.asarray(params["layers"]["q"], float)])
  error = small["layers"]["q"].values * small["layers"]["q"].scales - rotated
  largest = np.abs(rotated).max(-2, keepdims=True)
  assert (np.abs(error) <= largest / 254 + 1e-7).all()


def reference_logp(run, params, out):
  """Returns log-probs of completions, with products of rounded factors in float64 by numpy."""

  def product(h, matrix):
    def levels(x, axis):
      scale = np.abs(x).max(axis, keepdims=True) / 127
      return np.rint(x / np.where(scale > 0, scale, 1)), scale

    turn = rotation(len(matrix))
    (a, s), (b, t) = levels(np.float64(h) @ turn, -1), levels(turn @ np.float64(matrix), -2)
    return ((a @ b) * s * t).astype(np.float32)

  c = run.model.config
  tokens = np.concatenate([out.prompts[0][out.prompt_mask[0]], out.tokens[0, 0]])
  layers = {name: np.asarray(leaf) for name, leaf in params["layers"].items()}
  x = np.asarray(params["embed"])[tokens]
  positions = np.arange(len(tokens))
  by = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
  cos, sin = (f(positions[:, None, None] * by) for f in (np.cos, np.sin))

  def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weight

  def rotated(x):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

  def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  for i in range(c.layers):
    w = {name: leaf[i] for name, leaf in layers.items()}
    h = norm(x, w["attn_norm"])
    q, k, v = (
      product(h, w[name]).reshape(len(tokens), count, c.head_dim)
      for name, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
    )
    q, k = rotated(q), rotated(k)
    k, v = (np.repeat(a, c.heads // c.kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("shd,thd->hst", q, k) / c.head_dim**0.5
    scores = np.where(positions[:, None] >= positions, scores, -np.inf)
    mixed = np.einsum("hst,thd->shd", softmax(scores), v).reshape(len(tokens), -1)
    x = x + product(mixed, w["o"])
    h = norm(x, w["mlp_norm"])
    gate = product(h, w["gate"])
    x = x + product(gate / (1 + np.exp(-gate)) * product(h, w["up"]), w["down"])
  logits = norm(x, np.asarray(params["final_norm"])) @ np.asarray(run.model.head(params))
  probs = np.log(softmax(logits))[len(tokens) - out.tokens.shape[-1] - 1 : -1]
  return probs[np.arange(out.tokens.shape[-1]), out.tokens[0, 0]]


def test_log_probs_of_the_sampler_are_those_of_the_rounded_policy():
  run = build(load(TINY, [*INT8, "--config.mesh.data=8"]))
  params = run.loaded_params()
  prompts = [example.prompt for example in run.task.splits["train"][:8]]
  rows = {
    name: run.sampler(convert(params), prompts, run.key(0), group=2)
    for name, convert in (("int8", run.to_rollout_params), ("trained", run.to_sampling_params))
  }
  out = rows["int8"]
  assert ((out.tokens >= 0) & (out.tokens < run.model.config.vocab_size)).all()
  expected, mask = reference_logp(run, params, out), out.mask[0, 0]
  # Where rounding of float32 moves an activation across the middle between two levels, it shows.
  np.testing.assert_allclose(out.logp[0, 0][mask], expected[mask], atol=0.02)
  same = (out.tokens == rows["trained"].tokens).all()
  assert not same or np.abs(out.logp - rows["trained"].logp).max() > 1e-4


def assert_same_levels(actual, expected):
  """A rotation sums floats, in another order on another mesh: a level in a thousand may be next."""
  if actual.dtype == np.int8:
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3
  else:
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "mesh",
  [(2, 2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 1, 8), (8, 1, 1)))],
)
def test_meshes_sample_the_same_tokens(mesh):
  data, fsdp, tensor = mesh
  sizes = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}",
           f"--config.mesh.tensor={tensor}"]  # fmt: skip
  run = build(load(TINY, [*INT8, *sizes]))
  params = run.to_rollout_params(run.loaded_params())
  q = params["layers"][0]["q"].values
  assert q.sharding.shard_shape(q.shape) == (64, 64 // tensor)
  prompts = [example.prompt for example in run.task.splits["train"][:8]]
  out = run.sampler(params, prompts, run.key(0), group=2)
  one = build(load(TINY, [*INT8, "--config.mesh.data=8"]))
  small = jax.tree.map(np.asarray, one.to_rollout_params(one.loaded_params()))
  jax.tree.map(assert_same_levels, jax.tree.map(np.asarray, params), small)
  alone = dataclasses.replace(one.sampler, prompt_sharding=None)
  expected = alone(small, prompts, run.key(0), group=2)
  assert (out.tokens == expected.tokens).mean() > 0.95
  np.testing.assert_allclose(out.logp[:, :, 0], expected.logp[:, :, 0], atol=0.02)


def test_corrections_weigh_the_rounded_policy():
  """The batch has the log-probs of the sampler, and the mismatch and the weights are metrics."""
  run = build(load(TINY, [*INT8, "--config.mesh.data=8"]))
  state = run.initial_state()
  params, examples = run.to_rollout_params(state.params), run.examples(0)
  out = collect(run.sampler, params, examples, score_in_process(run.task), run.key(0), run.rollout)
  _, metrics = run.learner()(state, out.batch, 0)
  assert 1e-3 < metrics["sampling/sampling_logp_difference/mean"] < 0.3
  weights = [float(value) for name, value in metrics.items() if "sampling_ratio" in name]
  assert len(weights) == 3
  assert np.isfinite(weights).all()
  assert max(weights) <= 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    ["mesh.data=4", "mesh.fsdp=2", "train.reduction=deterministic", "model.remat=none"],
    ["mesh.data=2", "mesh.tensor=2", "mesh.rollout_devices=4", "rollout.ahead=1", "lora.rank=4"],
  ],
)
def test_runs_resume_bit_for_bit_and_evaluate_with_the_weights_themselves(tmp_path, changes):
  changes = [*INT8, *(f"--config.{change}" for change in changes)]
  changes += ["--config.task.settings.eval_size=3", "--config.log.samples=0"]
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
  assert 1e-3 < rows[0]["sampling/sampling_logp_difference/mean"] < 0.3
  evaluated = run.to_sampling_params(states[0].params)
  assert not any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(evaluated))


def test_settings_that_do_not_go_together_are_named():
  with pytest.raises(ConfigError, match=r"rollout.weights is 'int8', but algorithm 'dr_grpo' take"):
    build(load(TINY, ["--config.rollout.weights=int8"]))
  with pytest.raises(ConfigError, match=r"rollout.weights is 'int8', but lora.quantize is 'nf4'"):
    build(load(TINY, [*INT8, "--config.lora.rank=2", "--config.lora.quantize=nf4"]))
  with pytest.raises(ConfigError, match=r"rollout.weights is 'int4', it must be 'trained' or 'int"):
    build(load(TINY, ["--config.rollout.weights=int4"]))
