"""Tests the rewards of pairs against texts one by one, and the update against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import preference_loss
from grpo_jax.learning.preferences import Pairs, make_preference_step, make_rewards, pair_rewards
from grpo_jax.learning.skipping import SKIPPED
from grpo_jax.learning.step import TrainState
from grpo_jax.models.decoder import Decoder
from tests.helpers.learning import CONFIG, RATE, assert_trees_close, bits

MODEL = Decoder(dataclasses.replace(CONFIG, labels=1))
OPTIMIZER = optax.sgd(RATE)
RNG = np.random.default_rng(0)
# (beginning, rest of the chosen text, rest of the rejected one): empty ones too.
TEXTS = [
  tuple(RNG.integers(0, 19, size) for size in sizes)
  for sizes in ((3, 2, 4), (1, 5, 1), (4, 0, 2), (2, 3, 0), (0, 3, 5), (3, 4, 4))
]


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(1))


def make_pairs(texts=TEXTS, n=4, t=6, empty=0, junk=7):
  """Returns the texts as arrays, with `empty` pairs and junk tokens as padding."""
  count = len(texts) + empty
  prompts, prompt_mask = np.full((count, n), junk), np.zeros((count, n), bool)
  completions, lengths = np.full((count, 2, t), junk), np.zeros((count, 2), int)
  for row, (prefix, *rests) in enumerate(texts):
    prompts[row, n - len(prefix) :], prompt_mask[row, n - len(prefix) :] = prefix, True
    for side, rest in enumerate(rests):
      completions[row, side, : len(rest)], lengths[row, side] = rest, len(rest)
  real = np.arange(count) < len(texts)
  margins, weights = np.where(real, np.arange(count) / 4, np.nan), np.where(real, 1 / 6, 0)
  arrays = (prompts, prompt_mask, completions, lengths, margins, weights)
  return Pairs(*map(jnp.asarray, arrays))


def plain_rewards(params):
  """Returns the output of the classifier after each whole text, computed alone."""
  rewards = np.zeros((len(TEXTS), 2))
  for row, (prefix, *rests) in enumerate(TEXTS):
    for side, rest in enumerate(rests):
      ids = jnp.asarray(np.concatenate([prefix, rest]))[None]
      hidden, _ = MODEL.prefill(params, ids, jnp.ones(ids.shape, bool))
      rewards[row, side] = (hidden[0] * params["score"][0]).sum()
  return rewards


@pytest.mark.slow
def test_rewards_are_those_of_each_text_alone(params):
  rewards = pair_rewards(MODEL, params, make_pairs())
  np.testing.assert_allclose(rewards, plain_rewards(params), atol=1e-5)
  np.testing.assert_allclose(make_rewards(MODEL)(params, make_pairs()), rewards, atol=1e-6)


@pytest.mark.parametrize("shape", [{"n": 9}, {"t": 11}, {"n": 5, "t": 8, "empty": 2, "junk": 3}])
def test_padding_changes_no_reward(params, shape):
  expected = pair_rewards(MODEL, params, make_pairs())
  rewards = pair_rewards(MODEL, params, make_pairs(**shape))
  np.testing.assert_allclose(rewards[: len(TEXTS)], expected, atol=1e-5)


def test_where_a_text_is_cut_into_beginning_and_rest_changes_nothing(params):
  """Half of what the texts share may as well be computed twice."""
  cut = [(p[:1], *(np.concatenate([p[1:], rest]) for rest in rests)) for p, *rests in TEXTS]
  rewards = pair_rewards(MODEL, params, make_pairs(cut, t=10))
  np.testing.assert_allclose(rewards, plain_rewards(params), atol=1e-5)


def step_once(params, pairs, optimizer=OPTIMIZER, **options):
  step = make_preference_step(MODEL, optimizer, lambda count: RATE, **options)
  state, metrics = step(TrainState.create(params, optimizer), pairs)
  return state, {name: float(value) for name, value in metrics.items()}


def test_an_update_follows_the_gradient_of_the_loss(params):
  pairs = make_pairs()

  def loss(params):
    r = pair_rewards(MODEL, params, pairs)
    return preference_loss(r[:, 0], r[:, 1], margin=pairs.margins, center=0.1)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  expected = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
  state, actual = step_once(params, pairs, center=0.1)
  assert_trees_close(state.params, expected, atol=1e-6)
  norm = float(optax.tree.norm(gradient))
  expected = {"loss": float(value), "grad_norm": norm, "learning_rate": RATE, SKIPPED: 0.0}
  assert actual == pytest.approx(expected | {k: float(v) for k, v in metrics.items()}, abs=1e-5)
  assert int(state.step) == 1


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_change_nothing(params, micro_batches):
  whole, metrics = step_once(params, make_pairs(), center=0.1)
  parts, same = step_once(params, make_pairs(), center=0.1, micro_batches=micro_batches)
  assert_trees_close(parts.params, whole.params, atol=1e-6)
  assert same == pytest.approx(metrics, abs=1e-5)


def test_empty_pairs_change_nothing(params):
  """Their margins are NaN here. In micro-batches, they do not count in the means."""
  whole, metrics = step_once(params, make_pairs())
  for options in ({}, {"micro_batches": 4}):
    padded, same = step_once(params, make_pairs(empty=2), **options)
    assert_trees_close(padded.params, whole.params, atol=1e-6)
    assert same == pytest.approx(metrics, abs=1e-5)


def test_a_loss_that_is_not_finite_is_skipped(params):
  pairs = make_pairs()
  broken = dataclasses.replace(pairs, margins=pairs.margins.at[1].set(jnp.nan))
  before = bits(params)
  state, metrics = step_once(params, broken)
  assert metrics[SKIPPED] == 1
  assert bits(state.params) == before


def test_a_new_head_of_zeros_learns_to_tell_the_texts_apart(params):
  """A language model's first rewards are 0; the same six pairs are seen forty times."""
  params = params | {"score": jnp.zeros_like(params["score"])}
  optimizer = optax.adam(1e-2)
  step = make_preference_step(MODEL, optimizer)
  state, pairs = TrainState.create(params, optimizer), make_pairs()
  state, first = step(state, pairs)
  assert float(first["accuracy"]) == 0.5
  for _ in range(40):
    state, metrics = step(state, pairs)
  assert float(metrics["accuracy"]) == 1
  assert (np.diff(pair_rewards(MODEL, state.params, pairs))[:, 0] < -pairs.margins).all()
