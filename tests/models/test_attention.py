"""Tests attention of a group, untiled and tiled, against a loop over single queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import attention
from grpo_jax.models.attention import group_attention, tile_queries, within_window
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder

P, G, S, N, H, K, D = 2, 2, 7, 5, 4, 2, 3
PROMPT_MASK = np.array([[False, False, True, True, True], [True] * 5])  # left-padded
CASES = {"plain": (None, None), "softcap": (1.5, None), "window": (None, 3), "both": (0.7, 5)}


def arrays():
  rng = np.random.default_rng(0)
  shapes = ((P, G, S, H, D), (P, G, S, K, D), (P, G, S, K, D), (P, N, K, D), (P, N, K, D))
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def attention_by_query(q, k, v, prefix_k, prefix_v, softcap, window):
  """Computes the definition in float64: a softmax over the keys that a query sees."""
  out = np.zeros((P, G, S, H, D))
  for p, g, s, h in np.ndindex(P, G, S, H):
    visible = np.flatnonzero(PROMPT_MASK[p])
    keys = [*prefix_k[p, visible, h // (H // K)], *k[p, g, : s + 1, h // (H // K)]]
    values = [*prefix_v[p, visible, h // (H // K)], *v[p, g, : s + 1, h // (H // K)]]
    if window:
      keys, values = keys[-window:], values[-window:]
    scores = np.array(keys) @ q[p, g, s, h] / np.sqrt(D)
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores)
    out[p, g, s, h] = weights / weights.sum() @ np.array(values)
  return out


def group(q, k, v, prefix_k, prefix_v, softcap, window):
  """Calls group attention as the decoder does."""
  count, slots = PROMPT_MASK.sum(-1)[:, None], jnp.arange(S)
  in_prompt = jnp.maximum(jnp.cumsum(PROMPT_MASK, -1) - 1, 0)

  def attend(q, at):
    own_mask = within_window(at[:, None] >= slots, at, slots, window)
    seen = within_window(jnp.asarray(PROMPT_MASK)[:, None], count + at, in_prompt, window)
    return group_attention(
      q, (k, v), own_mask, (prefix_k, prefix_v), seen, scale=D**-0.5, softcap=softcap
    )

  return tile_queries(attend, q, N + S)


def force_tiles(monkeypatch, size, keys):
  """Makes tiles of `size` queries with `keys` keys each, however short the sequence."""
  monkeypatch.setattr(attention, "UNTILED_SCORES", 1)
  monkeypatch.setattr(attention, "TILE_SCORES", size * keys)


@pytest.mark.parametrize("size", [None, 3])  # of seven queries: three, three and one
@pytest.mark.parametrize(("softcap", "window"), CASES.values(), ids=CASES)
def test_every_query_sees_its_keys(softcap, window, size, monkeypatch):
  if size:
    force_tiles(monkeypatch, size, N + S)
  actual = jax.jit(lambda *a: group(*a, softcap, window))(*arrays())
  wide = [np.asarray(a, np.float64) for a in arrays()]
  np.testing.assert_allclose(actual, attention_by_query(*wide, softcap, window), atol=1e-5)


def test_gradients_of_tiles_equal_untiled_gradients(monkeypatch):
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(P, G, S, H, D)), jnp.float32)

  def gradients():
    return jax.jit(jax.grad(lambda *a: jnp.sum(group(*a, 1.5, 5) * weights), range(5)))(*arrays())

  untiled = gradients()
  force_tiles(monkeypatch, 2, N + S)
  for actual, expected in zip(gradients(), untiled, strict=True):
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_tiled_model_computes_the_same(monkeypatch):
  """Covers local layers, left-padded prompts, prefill, hidden states and gradients."""
  config = ModelConfig(
    vocab_size=37, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24,
    window=4, local_layers=(True, False), attn_softcap=2.0,
  )  # fmt: skip
  model = Decoder(config, remat="dots")
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  prompts, completions = rng.integers(0, 37, (P, N)), rng.integers(0, 37, (P, G, S))

  def compute():
    def loss(params):
      hidden = model.score(params, prompts, jnp.asarray(PROMPT_MASK), completions)
      return jnp.sum(jnp.sin(hidden)), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, gradient, model.prefill(params, prompts, jnp.asarray(PROMPT_MASK))[0]

  untiled = compute()
  force_tiles(monkeypatch, 2, N)  # and one query of a completion, which sees more keys
  for actual, expected in zip(*map(jax.tree.leaves, (compute(), untiled)), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_the_length_and_not_its_square(monkeypatch):
  def temporaries(length):
    def loss(q, k, v):
      slots = jnp.arange(length)

      def attend(q, at):
        return group_attention(q, (k, v), at[:, None] >= slots, scale=1.0)

      return jnp.sum(jnp.sin(tile_queries(attend, q, length)))

    shape = jax.ShapeDtypeStruct((1, 1, length, 1, 4), jnp.float32)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temporaries(1024) > 1024**2 * 4  # untiled
  monkeypatch.setattr(attention, "UNTILED_SCORES", 512**2)
  monkeypatch.setattr(attention, "TILE_SCORES", 2**14)
  short, long = temporaries(1024), temporaries(2048)
  assert long < 2048**2 * 4 / 8
  assert long < 2.5 * short
