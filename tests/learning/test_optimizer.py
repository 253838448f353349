"""Tests AdamW by hand in float64, its clip, its schedules, and where the new state is written."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.learning.optimizer import learning_rate_schedule, make_optimizer
from grpo_jax.learning.step import TrainState, make_apply
from grpo_jax.models.io.weights import NAMES, ROWS

SETTINGS = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
RATE = 0.5
PARAMS = {
  "layers": {"q": np.array([[1.0, -2.0]]), "attn_norm": np.array([1.5])},
  "final_norm": np.array([0.5]),
}
GRADS = [
  {
    "layers": {"q": np.array([[3.0, 0.0]]), "attn_norm": np.array([4.0])},
    "final_norm": np.zeros(1),
  },
  {
    "layers": {"q": np.array([[0.1, -0.2]]), "attn_norm": np.array([0.2])},
    "final_norm": np.array([-0.4]),
  },
]


def by_hand(clip: float) -> dict:
  """Computes algorithm 2 of Loshchilov and Hutter 2019, arXiv 1711.05101, after a clip."""
  b1, b2, eps, decay = SETTINGS.values()
  params = PARAMS
  first = second = jax.tree.map(np.zeros_like, params)
  for t, grads in enumerate(GRADS, 1):
    norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    scale = min(1.0, clip / norm) if clip else 1.0
    grads = jax.tree.map(lambda g, scale=scale: g * scale, grads)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, grads)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, grads)
    decays = {"layers": {"q": decay, "attn_norm": 0.0}, "final_norm": 0.0}
    params = jax.tree.map(
      lambda p, m, v, d, t=t: (
        p - RATE * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + d * p)
      ),
      params,
      first,
      second,
      decays,
    )
  return params


@pytest.mark.parametrize("clip", [0.0, 1.0, 100.0])
def test_adamw_by_hand(clip):
  """The norms of the two gradients are 5 and 0.5: a clip at 1 changes the first alone."""
  optimizer = make_optimizer(optax.constant_schedule(RATE), **SETTINGS, clip_norm=clip)
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
  state = optimizer.init(params)
  for grads in GRADS:
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, by_hand(clip))


def test_a_gradient_of_zero_is_not_scaled():
  optimizer = make_optimizer(
    optax.constant_schedule(RATE), **SETTINGS | {"weight_decay": 0.0}, clip_norm=1.0
  )
  params = {"final_norm": jnp.ones(2)}
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  np.testing.assert_array_equal(updates["final_norm"], 0.0)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.2]),
    # 0.2 + 0.8 (1 + cos(pi t / 4)) / 2, t = 0, 1, 2 and 4 steps after the warm-up
    ("cosine", [1 / 3, 2 / 3, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2]),
  ],
)
def test_schedules_by_hand(name, expected):
  rate = learning_rate_schedule(
    learning_rate=1.0, schedule=name, warmup_steps=2, steps=6, final_fraction=0.2
  )
  rates = [rate(step) for step in (0, 1, 2, 3, 4, 6)]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)
  assert rate(100) == rate(6)


def test_an_unknown_schedule_is_refused():
  with pytest.raises(ValueError, match="unknown schedule 'cosin'; known: constant, linear, cosine"):
    learning_rate_schedule(
      learning_rate=1.0, schedule="cosin", warmup_steps=0, steps=1, final_fraction=0.0
    )


def test_the_new_state_is_written_over_the_old():
  """The optimizer's part of a step needs less than 1 % of its arguments as temporary memory."""
  optimizer = make_optimizer(optax.constant_schedule(RATE), **SETTINGS, clip_norm=1.0)
  params = {"embed": jnp.zeros((512, 256)), "layers": {"q": jnp.zeros((4, 256, 128))}}
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  apply = jax.jit(make_apply(optimizer, lambda count: RATE, 0.0), donate_argnums=0)
  plan = apply.lower(state, params, jnp.float32(0), {}).compile().memory_analysis()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert plan.alias_size_in_bytes >= 3 * size
  assert plan.temp_size_in_bytes < 0.01 * size


def decayed(params):
  """Returns the names of the parameters that a gradient of 0 moves: those that decay."""
  optimizer = make_optimizer(optax.constant_schedule(RATE), **SETTINGS, clip_norm=1.0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(update)
  }


def test_only_matrices_decay_in_every_shape_of_the_model():
  """Stacked, norm weights and biases are [L, D] and look like matrices."""
  params = {"layers": {}}
  for row in (*ROWS, *(row for rows in NAMES.values() for row in rows)):
    shape = (2, 3)[: len(row.dims)]
    if row.in_layer:
      params["layers"][row.path.removeprefix("layers/")] = jnp.ones((4, *shape))
    else:
      params[row.path] = jnp.ones(shape)
  matrices = {row.path for row in ROWS if len(row.dims) == 2}
  assert decayed(params) == matrices == {
    "embed", "head", "score", *(f"layers/{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")),
  }  # fmt: skip


def test_biases_norms_and_vectors_of_other_models_do_not_decay():
  params = {
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "layers": [{"q_bias": jnp.ones(3), "q": jnp.ones((2, 3))}],
    "norm": {"scale": jnp.ones(3)},
    "temperature": jnp.ones(()),
    "q_lora_a": jnp.ones((2, 3, 1)),
  }
  assert decayed(params) == {"dense/kernel", "layers/0/q", "q_lora_a"}
