"""Tests that every form of grouped products equals the definition, with all gradients.

The definition passes each token through each of its experts by itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.models import experts
from tests.helpers.dense_experts import dense

FORMS = {"dense": dense, "blocked": experts.blocked, "ragged": experts.ragged}
D, F = 6, 5
# Tokens, experts, experts of a token: even and uneven blocks, one token, more experts than rows.
SIZES = {"many": (50, 8, 3), "few": (2, 8, 3), "one": (1, 4, 1), "all": (7, 3, 3)}


def arguments(tokens, count, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "h": (tokens, D),
    "router": (D, count),
    "up": (count, D, F),
    "down": (count, F, D),
  }
  return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def mixture(a, k, form, normalized=True, chosen=None):
  count = a["router"].shape[1]
  routing = experts.route(a["h"] @ a["router"], k, normalized, chosen)
  group = form(routing, count)
  rows = jnp.tanh(group.product(group.spread(a["h"]), a["up"]))
  return group.combine(group.product(rows, a["down"]))


def definition(a, k, normalized=True, chosen=None):
  """Computes token by token in NumPy, float64."""
  a = {name: np.asarray(value, np.float64) for name, value in a.items()}
  out = []
  for number, token in enumerate(a["h"]):
    logits = token @ a["router"]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    own = np.argsort(-probs)[:k] if chosen is None else np.asarray(chosen)[number]
    weights = probs[own] / (probs[own].sum() if normalized else 1)
    parts = [np.tanh(token @ a["up"][e]) @ a["down"][e] for e in own]
    out.append(sum(w * part for w, part in zip(weights, parts)))
  return np.stack(out)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_equals_the_definition(form, size, normalized):
  tokens, count, k = size
  a = arguments(tokens, count)
  actual = jax.jit(lambda a: mixture(a, k, form, normalized))(a)
  np.testing.assert_allclose(actual, definition(a, k, normalized), atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_token_is_dropped_when_all_choose_the_same_expert(form):
  a = arguments(40, 8)
  chosen = jnp.tile(jnp.array([[5, 2]]), (40, 1))
  actual = mixture(a, 2, form, chosen=chosen)
  np.testing.assert_allclose(actual, definition(a, 2, chosen=chosen), atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", ["blocked", "ragged"])
def test_gradients_of_all_arguments_equal_those_of_the_dense_form(form, size):
  tokens, count, k = size
  a, dy = arguments(tokens, count), jnp.asarray(np.random.default_rng(1).normal(size=(tokens, D)))

  def gradients(form):
    return jax.jit(jax.grad(lambda a: (mixture(a, k, form) * dy).sum()))(a)

  expected, actual = gradients(dense), gradients(FORMS[form])
  for name in a:
    np.testing.assert_allclose(actual[name], expected[name], atol=2e-5, err_msg=name)
  # With one expert of weight one, the router has no gradient.
  assert np.abs(expected["router"]).max() > 1e-3 or k == 1


def test_gradients_of_the_dense_form_are_those_of_differences():
  a = arguments(4, 3)
  chosen = jnp.array([[0, 1], [1, 2], [2, 0], [0, 2]])  # fixed: a difference must not change it

  def loss(a):
    return (definition(a, 2, chosen=chosen) ** 2).sum()

  actual = jax.grad(lambda a: (mixture(a, 2, dense, chosen=chosen) ** 2).sum())(a)
  rng = np.random.default_rng(2)
  for name, value in a.items():
    direction = rng.normal(size=value.shape)
    moved = [{**a, name: np.asarray(value, np.float64) + s * 1e-5 * direction} for s in (1, -1)]
    expected = (loss(moved[0]) - loss(moved[1])) / 2e-5
    np.testing.assert_allclose((actual[name] * direction).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", ["tokens", "experts", "both"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_and_gradients_are_the_same_on_eight_devices(form, split):
  shape = {"tokens": (8, 1), "experts": (1, 8), "both": (2, 4)}[split]
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:8]).reshape(shape), ("data", "expert"), axis_types=(AxisType.Auto,) * 2
  )
  a = arguments(48, 8)
  specs = {"h": P("data"), "router": P()}
  specs |= {name: P("expert") for name in ("up", "up_bias", "down")}
  laid_out = {
    name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in a.items()
  }

  def loss(a):
    out = mixture(a, 3, form)
    return (jnp.sin(out) * jnp.arange(D)).sum(), out

  (_, expected), gradients = jax.value_and_grad(loss, has_aux=True)(a)
  (_, actual), sharded = jax.jit(jax.value_and_grad(loss, has_aux=True))(laid_out)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  for name in a:
    np.testing.assert_allclose(sharded[name], gradients[name], atol=5e-5, err_msg=name)


def test_blocks_hold_every_row_at_the_bound():
  """Shapes are static; the worst case fills them: E - 1 experts with one row, one with the rest."""
  tokens, count = 16, 4
  chosen = jnp.array([0, 1, 2, *[3] * 13])[:, None]
  routing = experts.route(jnp.zeros((tokens, count)), 1, True, chosen)
  group = experts.blocked(routing, count)
  rows = group.spread(jnp.arange(1.0, 17.0)[:, None])
  # Blocks of 16 / 4 rows: 4 + (16 - 4) // 4 = 7; of 1, 1, 1 and 4 used.
  assert rows.shape == (7, 4, 1)
  assert rows[:3, 0, 0].tolist() == [1, 2, 3]
  assert rows[3:, :, 0].ravel().tolist() == [*range(4, 17), 0, 0, 0]
  np.testing.assert_array_equal(group.combine(rows)[:, 0], np.arange(1.0, 17.0))
