"""Tests top-k, top-p and min-p by enumeration, and that draws follow the filtered distribution."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.generate import draw, draw_filtered

# Two equal tokens, an impossible one, and no order.
P = np.array([0.05, 0.3, 0.1, 0.1, 0.0, 0.4, 0.05])
WITH_ZERO = np.log(P, where=P > 0, out=np.full(7, -np.inf))


def filtered(p, top_k=0, top_p=1.0, min_p=0.0):
  """The distribution by its definition, in plain Python: rank, cut, cut, cut, renormalize."""
  ranked = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: (-p[i], i))
  if top_k:
    ranked = ranked[:top_k]
  rest, total = [], sum(p[i] for i in ranked)
  for i in ranked:
    if sum(p[j] for j in rest) / total < top_p - 1e-9:
      rest.append(i)
  rest = [i for i in rest if p[i] >= min_p * p[rest[0]] * (1 - 1e-9)]
  total = sum(p[i] for i in rest)
  return [p[i] / total if i in rest else 0.0 for i in range(len(p))]


SETTINGS = [
  *({"top_k": k} for k in (1, 2, 3, 4, 7, 100)),
  *({"top_p": p} for p in (1e-6, 0.35, 0.41, 0.69, 0.71, 0.85, 0.999)),
  *({"min_p": p} for p in (0.01, 0.2, 0.26, 0.8, 1.0)),
  # top_p is of what top_k leaves: 4/7 of two tokens, and not 0.4 of all of them.
  {"top_k": 2, "top_p": 0.5},
  {"top_k": 2, "top_p": 0.6},
  {"top_k": 5, "top_p": 0.9, "min_p": 0.3},
]


def name(settings):
  return "-".join(f"{key}{value}" for key, value in settings.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_the_distribution_that_is_drawn_from(settings):
  """Chi-square of 20,000 draws, and the log-probability and entropy of each."""
  expected = filtered(P, **settings)
  keys = jax.random.split(jax.random.key(1), 20000)
  logits = jnp.broadcast_to(jnp.asarray(WITH_ZERO, jnp.float32), (len(keys), 7))
  drawn = jax.jit(draw_filtered, static_argnums=2)(logits, keys, TokenFilter(**settings))
  tokens, logp, entropy = map(np.asarray, drawn)
  counts = np.bincount(tokens, minlength=7)
  allowed = np.array(expected) > 0
  assert not counts[~allowed].any()
  exact = np.array(expected)[allowed] * len(keys)
  chi_square = ((counts[allowed] - exact) ** 2 / exact).sum()
  freedom = max(allowed.sum() - 1, 1)
  # Wilson and Hilferty 1931: the quantile that 1 of 10,000 right samplers exceeds.
  limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
  assert chi_square < limit
  np.testing.assert_allclose(logp, np.log(np.array(expected)[tokens]), atol=1e-5)
  nats = -sum(p * math.log(p) for p in expected if p > 0)
  np.testing.assert_allclose(entropy, nats, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_filter_of_every_small_distribution(size):
  """All distributions of eighths over `size` tokens, against the definition."""
  eighths = [w for w in itertools.product(range(9), repeat=size) if sum(w) == 8]
  p = np.array(eighths) / 8
  order = np.argsort(-p, axis=1, kind="stable")
  ranked = jnp.log(jnp.asarray(np.take_along_axis(p, order, 1), jnp.float32))
  grid = itertools.product((0, 1, 2, 3), (0.21, 0.45, 0.69, 0.91, 1.0), (0.0, 0.3, 0.55, 1.0))
  for top_k, top_p, min_p in grid:
    token_filter = TokenFilter(top_k, top_p, min_p)
    kept = np.asarray(jax.nn.softmax(token_filter.apply(ranked), -1))
    actual = np.zeros_like(kept)
    np.put_along_axis(actual, order, kept, 1)
    expected = [filtered(row, top_k, top_p, min_p) for row in p]
    np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=str(token_filter))


def test_no_filter_changes_no_probability():
  keys = jax.random.split(jax.random.key(0), 500)
  logits = jnp.broadcast_to(jnp.asarray(np.sort(WITH_ZERO)[::-1], jnp.float32), (500, 7))
  for one, other in zip(draw(logits, keys), draw_filtered(logits, keys, TokenFilter())):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"top_k": -1}, "top_k is -1"), ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"), ({"top_p": math.nan}, "top_p is nan"),
    ({"min_p": -0.1}, "min_p is -0.1"), ({"min_p": 2.0}, "min_p is 2.0"),
  ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    TokenFilter(**settings)
