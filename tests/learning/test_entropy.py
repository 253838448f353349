"""Tests an entropy bonus: its gradient, and the coefficient that adapts and is resumed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import Algorithm, train
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.entropy import EntropyControl
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.learning.updates import Learner, UpdateConfig
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from tests.helpers.learning import MODEL, RATE, assert_trees_close, bits, make_batch, step_once

ADAPTIVE = Algorithm(average="token", entropy_bonus=0.25, entropy_target=2.0, entropy_delta=0.125)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def numbers(control):
  return float(control.level), float(control.coef)


# --- the control ----------------------------------------------------------------------------------


def test_the_control_by_hand():
  """Rises at and below the target, falls above it, and not below 0; nothing counts above it."""
  control = EntropyControl.new(ADAPTIVE)
  assert numbers(control) == (0.25, 0.0)  # the entropy is not known yet
  expected = [
    (1.0, (0.375, 0.375)),
    (2.0, (0.5, 0.5)),
    (2.25, (0.375, 0.0)),
    (9.0, (0.25, 0.0)),
    (1.5, (0.375, 0.375)),
    (3.0, (0.25, 0.0)),
    (3.0, (0.125, 0.0)),
    (3.0, (0.0, 0.0)),
    (3.0, (0.0, 0.0)),
    (0.0, (0.125, 0.125)),
  ]
  for entropy, values in expected:
    control = control.after(ADAPTIVE, jnp.float32(entropy), jnp.bool_(True))
    assert numbers(control) == values
    assert control.level.dtype == control.coef.dtype == jnp.float32


def test_a_skipped_update_leaves_the_control_as_it_is():
  control = EntropyControl.new(ADAPTIVE).after(ADAPTIVE, jnp.float32(1.0), jnp.bool_(True))
  for entropy in (3.0, 1.0, float("nan")):
    after = control.after(ADAPTIVE, jnp.float32(entropy), jnp.bool_(False))
    assert numbers(after) == numbers(control)


def test_only_adaptive_rows_have_a_control():
  assert EntropyControl.new(Algorithm(entropy_bonus=0.1)) is None
  assert TrainState.create({"w": jnp.ones(2)}, optax.sgd(0.1), algorithm="grpo").entropy is None
  assert TrainState.create({"w": jnp.ones(2)}, optax.sgd(0.1)).entropy is None


def test_a_state_with_a_control_and_its_dict():
  params = {"w": jnp.ones(2)}
  state = TrainState.create(params, optax.sgd(0.1), algorithm=ADAPTIVE)
  tree = state.to_dict()
  assert list(tree) == ["step", "params", "opt_state", "history", "entropy"]
  assert set(tree["entropy"]) == {"level", "coef"}
  assert bits(TrainState.from_dict(tree)) == bits(state)
  assert isinstance(TrainState.from_dict(tree).entropy, EntropyControl)
  shapes = TrainState.shapes(params, optax.sgd(0.1), algorithm=ADAPTIVE)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)


# --- the gradient ---------------------------------------------------------------------------------


def entropies(params, batch, temperature=0.7):
  """Returns the entropy of each completion token from whole logits, [P, G, T]."""
  hidden = MODEL.score(params, batch.prompts, batch.prompt_mask, batch.completions)
  logps = jax.nn.log_softmax(hidden @ MODEL.head(params) / temperature)
  return -(jnp.exp(logps) * logps).sum(-1)


def mean_entropy(params, batch):
  return jnp.sum(jnp.where(batch.mask, batch.weights * entropies(params, batch), 0.0))


@pytest.mark.parametrize("micro_batches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_bonus_raises_the_entropy_along_its_gradient(params, micro_batches):
  """Without advantages the update is `rate * c * d mean entropy / d params`."""
  batch = make_batch(average="token")
  batch = dataclasses.replace(batch, advantages=jnp.zeros((4, 3)))
  row = Algorithm(average="token", entropy_bonus=0.5)
  updated, metrics = step_once(params, batch, row, micro_batches)
  value, gradient = jax.value_and_grad(mean_entropy)(params, batch)
  expected = jax.tree.map(lambda p, g: p + RATE * 0.5 * g, params, gradient)
  assert optax.tree.norm(gradient) > 0.01
  assert_trees_close(updated, expected, 1e-6)
  np.testing.assert_allclose(metrics["entropy"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], -0.5 * value, rtol=1e-5)
  np.testing.assert_allclose(metrics["entropy_coef"], 0.5, rtol=1e-6)


@pytest.mark.parametrize(
  "mode", ["micro", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fast", "chunks"))]
)
def test_the_coefficient_of_an_update_is_that_of_the_state(params, mode):
  """Two updates: the first has no bonus, the second 0.375 (0.25 + 0.125), by one step of SGD."""
  batch = dataclasses.replace(make_batch(average="token"), advantages=jnp.zeros((4, 3)))
  row = dataclasses.replace(ADAPTIVE, entropy_target=9.0)
  optimizer = optax.sgd(RATE)
  options = {"micro": {"micro_batches": 2}, "chunks": {}}.get(mode, {})
  if mode == "chunks":
    options["chunks"] = Chunks(4, meshes.make_mesh((2, 1, 1), jax.devices()[:2]))
    batch = jax.device_put(batch, meshes.batch_sharding(options["chunks"].mesh))
    params = jax.device_put(params, meshes.replicated(options["chunks"].mesh))
  step = make_train_step(MODEL, row, optimizer, temperature=0.7, **options)
  state = TrainState.create(params, optimizer, algorithm=row)
  state, metrics = step(state, batch)
  assert_trees_close(state.params, params, 0)
  assert float(metrics["entropy_coef"]) == 0.0
  assert numbers(state.entropy) == (0.375, 0.375)
  state, metrics = step(state, batch)
  gradient = jax.grad(mean_entropy)(params, batch)
  expected = jax.tree.map(lambda p, g: p + RATE * 0.375 * g, params, gradient)
  assert_trees_close(state.params, expected, 1e-6)
  np.testing.assert_allclose(metrics["entropy_coef"], 0.375, rtol=1e-6)
  assert numbers(state.entropy) == (0.5, 0.5)


def test_above_the_target_there_is_no_bonus_and_the_coefficient_falls(params):
  batch = dataclasses.replace(make_batch(average="token"), advantages=jnp.zeros((4, 3)))
  row = dataclasses.replace(ADAPTIVE, entropy_target=0.5)
  assert mean_entropy(params, batch) > 1
  optimizer = optax.sgd(RATE)
  learn = Learner(MODEL, row, optimizer, None, UpdateConfig(temperature=0.7, epochs=2))
  state, metrics = learn(TrainState.create(params, optimizer, algorithm=row), batch, 0)
  assert_trees_close(state.params, params, 0)
  assert numbers(state.entropy) == (0.0, 0.0)
  assert float(metrics["entropy_coef"]) == 0.0


def test_an_adaptive_row_without_its_state_is_an_error(params):
  optimizer = optax.sgd(RATE)
  step = make_train_step(MODEL, ADAPTIVE, optimizer, temperature=0.7)
  with pytest.raises(ValueError, match=r"entropy_target=2.0 needs entropy_coef.*TrainState.create"):
    step(TrainState.create(params, optimizer), make_batch(average="token"))


# --- a run ----------------------------------------------------------------------------------------

OPTIONS = (
  "--config.algorithm.entropy_bonus=0.01",
  "--config.algorithm.entropy_target=9.0",
  "--config.algorithm.entropy_delta=0.005",
  "--config.rollout.completion_length=4",
  "--config.train.epochs=2",
)


def trained(workdir, *steps):
  """Returns the bits of the state after a run of that many steps, continued for each number."""
  for count in steps:
    c = load("experiments/tiny.py", [*OPTIONS, f"--config.steps={count}"])
    train.run(c, workdir)
  with checkpoint.Checkpoints(workdir, keep=9) as checkpoints:
    state = checkpoints.restore(steps[-1], build(c).initial_state())
  return state, [row for row in read_metrics(workdir) if "entropy_coef" in row]


@pytest.mark.slow
def test_a_resumed_run_has_the_coefficient_of_the_whole_one(tmp_path):
  whole, rows = trained(tmp_path / "whole", 4)
  resumed, again = trained(tmp_path / "resumed", 2, 4)
  assert bits(resumed) == bits(whole)
  # Eight updates; the mean of two per step: 0 and 0.015, 0.02 and 0.025, ...
  coefficients = [row["entropy_coef"] for row in rows]
  np.testing.assert_allclose(coefficients, [0.0075, 0.0225, 0.0325, 0.0425], rtol=1e-5)
  assert [row["entropy_coef"] for row in again] == coefficients
  np.testing.assert_allclose(whole.entropy.level, 0.01 + 8 * 0.005, rtol=1e-5)
