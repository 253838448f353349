"""Tests the optimizers by hand in float64, clip and schedules, and where the state is written."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.optimizer import OPTIMIZERS, learning_rate_schedule, make_optimizer
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


def two_updates(name, params, gradients, **settings):
  """Returns the parameters after two updates, and the optimizer state."""
  optimizer = make_optimizer(
    optax.constant_schedule(RATE), name=name, **SETTINGS | settings, clip_norm=0.0
  )
  params, state = jax.tree.map(jnp.float32, params), None
  for grads in gradients:
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def matrices(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape) for shape in shapes]


def test_adafactor_by_hand():
  """Algorithm 4 of Shazeer and Stern 2018 with steps of the learning rate, and decoupled decay.

  The matrix has one factor per row and one per column of each layer; the vector has no factors.
  """
  shapes = (2, 128, 130), (128,)
  w, b = matrices(0, *shapes)
  gradients = [dict(zip(("w", "norm"), matrices(seed, *shapes))) for seed in (1, 2)]
  gradients[1]["w"] *= 4.0  # its update is limited
  actual, _ = two_updates("adafactor", {"w": w, "norm": b}, gradients)
  rows = columns = second = 0.0
  for t, grads in enumerate(gradients, 1):
    decay, g = 1 - t**-0.8, grads["w"]
    rows = decay * rows + (1 - decay) * (g**2).sum(-1, keepdims=True)
    columns = decay * columns + (1 - decay) * (g**2).sum(-2, keepdims=True)
    second = decay * second + (1 - decay) * grads["norm"] ** 2
    update = g / np.sqrt(rows * columns / rows.sum(-2, keepdims=True))
    update /= max(1.0, math.sqrt((update**2).mean()))
    w = w - RATE * (update + 0.1 * w)
    update = grads["norm"] / np.sqrt(second)
    b = b - RATE * update / max(1.0, math.sqrt((update**2).mean()))
  np.testing.assert_allclose(actual["w"], w, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(actual["norm"], b, rtol=1e-4, atol=1e-4)


def orthogonalized(g):
  """Returns five steps of Newton and Schulz, from a matrix of Frobenius norm 1."""
  x = g / np.linalg.norm(g)
  x = x if x.shape[0] <= x.shape[1] else x.T
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x if g.shape[0] <= g.shape[1] else x.T


def test_muon_by_hand():
  """Nesterov momentum of 0.95, each layer made orthogonal alone, with a mean square of 0.2^2."""
  shape = (2, 6, 4)
  (w,) = matrices(0, shape)
  first, second = (matrices(seed, shape)[0] for seed in (1, 2))
  actual, _ = two_updates(
    "muon", {"layers": {"q": w}}, [{"layers": {"q": g}} for g in (first, second)]
  )
  mean = 0.0
  for t, g in enumerate((first, second), 1):
    mean = 0.95 * mean + 0.05 * g
    ahead = 0.95 * mean / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    update = 0.2 * math.sqrt(6) * np.stack([orthogonalized(layer) for layer in ahead])
    w = w - RATE * (update + 0.1 * w)
  np.testing.assert_allclose(actual["layers"]["q"], w, rtol=1e-4, atol=1e-4)


def test_muon_makes_each_expert_orthogonal_alone():
  """Experts are [L, E, in, out]; the scale of the update is that of one expert's matrix."""
  (w,), (g,) = (matrices(seed, (2, 3, 6, 4)) for seed in (0, 1))
  actual, _ = two_updates("muon", {"layers": {"experts_up": w}}, [{"layers": {"experts_up": g}}])
  ahead = 0.95 * 0.05 * g / (1 - 0.95**2) + 0.05 * g / (1 - 0.95)
  update = [orthogonalized(matrix) for matrix in ahead.reshape(6, 6, 4)]
  update = 0.2 * math.sqrt(6) * np.reshape(update, g.shape)
  expected = w - RATE * (update + 0.1 * w)
  np.testing.assert_allclose(actual["layers"]["experts_up"], expected, rtol=1e-4, atol=1e-4)


def test_tables_and_vectors_have_two_moments_in_muon():
  shapes = {"embed": (8, 4), "head": (8, 4), "layers": {"q": (2, 4, 4), "attn_norm": (2, 4)}}
  params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  _, state = two_updates("muon", params, [params])
  moments = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.ndim > 1
  ]
  count = collections.Counter(path.rpartition("/")[2] for path in moments)
  assert count == {"embed": 2, "head": 2, "q": 1, "attn_norm": 2}


def test_state_of_each_optimizer():
  """Numbers per parameter: two, 1 / 128 + 1 / 256, and one."""
  params = {"layers": {"q": jnp.ones((3, 128, 256))}}
  sizes = {}
  for name in OPTIMIZERS:
    _, state = two_updates(name, params, [params])
    arrays = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.size > 3)
    sizes[name] = arrays / (3 * 128 * 256)
  assert sizes == {"adamw": 2.0, "adafactor": 1 / 128 + 1 / 256, "muon": 1.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_a_state_that_the_table_lays_out(name):
  mesh = meshes.make_mesh((1, 4, 2))
  shapes = {"embed": (8, 4), "layers": {"q": (2, 128, 128), "attn_norm": (2, 4)}}
  params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  state = jax.eval_shape(make_optimizer(optax.constant_schedule(RATE), name=name).init, params)
  layouts = jax.tree.leaves(meshes.param_shardings(mesh, state))
  assert len(layouts) == len(jax.tree.leaves(state))


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ValueError, match="unknown optimizer 'adam'; known: adamw, adafactor, muon"):
    make_optimizer(optax.constant_schedule(RATE), name="adam")


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
  every = (*ROWS, *(row for rows in NAMES.values() for row in rows))
  # The biases of experts are [E, D] in each layer.
  matrices = {row.path for row in every if len(row.dims) == 2 and not row.path.endswith("_bias")}
  experts = ("router", "experts_gate", "experts_up", "experts_down")
  assert decayed(params) == matrices == {
    "embed", "head", "score",
    *(f"layers/{n}" for n in ("q", "k", "v", "o", "gate", "up", "down", *experts)),
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
