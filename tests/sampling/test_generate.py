"""Tests exact draws, one random stream per row, and log-probs that are the trainer's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling.stopping import stop_table
from tests.helpers import plain

CONFIG = ModelConfig(vocab_size=23, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
PROMPTS = jnp.array([[0, 0, 3, 4], [0, 5, 6, 7], [8, 9, 10, 11]], jnp.int32)
MASK = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)


def stop_at(*ids):
  """Returns the stop table of these ids; without ids a completion never ends."""
  if not ids:
    return jnp.zeros((2, 23), jnp.int32)
  return jnp.asarray(stop_table([], [], ids, vocab_size=23))


STOP = stop_at(2)


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  return params | {"embed": params["embed"] * 0.9}


@partial(
  jax.jit, static_argnames=("length", "temperature", "pad_id", "max_compactions", "prompt_shards")
)
def run(
  params,
  prompts,
  mask,
  keys,
  stop,
  *,
  length=5,
  temperature=1.0,
  pad_id=2,
  max_compactions=0,
  prompt_shards=1,
):
  return generation.generate(
    MODEL,
    unstack(params),
    prompts,
    mask,
    keys,
    stop,
    length=length,
    temperature=temperature,
    pad_id=pad_id,
    max_compactions=max_compactions,
    prompt_shards=prompt_shards,
  )


def keys(step, ids=(0, 1, 2), group=4):
  return generation.row_keys(jax.random.key(step), jnp.array(ids), group)


def test_draw_inverts_the_distribution_function():
  """Compares with float64: u picks the first token whose cumulative probability exceeds u."""
  p = np.array([0.1, 0.0, 0.3, 0.05, 0.0, 0.55])
  cases = ((0.0, 0), (0.099, 0), (0.1001, 2), (0.399, 2), (0.41, 3), (0.46, 5), (1.0, 5))
  for u, expected in cases:
    index = generation._invert(jnp.asarray(p, jnp.float32), jnp.float32(u))
    assert int(index) == expected, (u, int(index))


def test_draw_has_the_right_frequencies():
  logits = jnp.log(jnp.array([0.5, 0.2, 0.2, 0.06, 0.03, 0.01, 1e-30]))
  keys = jax.random.split(jax.random.key(3), 40000)
  tokens = np.asarray(generation.draw(jnp.broadcast_to(logits, (40000, 7)), keys)[0])
  frequencies = np.bincount(tokens, minlength=7) / 40000
  p = np.array([0.5, 0.2, 0.2, 0.06, 0.03, 0.01, 0.0])
  error = 4.5 * np.sqrt(p * (1 - p) / 40000)  # 4.5 standard errors
  assert (np.abs(frequencies - p) <= error).all(), frequencies
  assert frequencies[6] == 0


def test_draw_returns_logprob_and_entropy():
  """Compares with float64, with a token of probability 0 and with logits far from 0."""
  logits = np.random.default_rng(0).normal(size=(50, 11)) * 3 + np.linspace(-80, 80, 50)[:, None]
  logits[:, 4] = -np.inf
  tokens, logp, entropy = generation.draw(
    jnp.asarray(logits, jnp.float32), jax.random.split(jax.random.key(1), 50)
  )
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(logp, np.log(p[np.arange(50), tokens]), atol=2e-5)
  expected = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
  np.testing.assert_allclose(entropy, expected, atol=2e-5)


def test_draw_gives_rare_tokens_of_a_large_vocabulary_their_probability():
  """Half the mass lies in one token, the rest evenly in 49,151 tokens of 1e-5 each."""
  vocab = 49152
  p = np.full(vocab, 0.5 / (vocab - 1))
  p[17] = 0.5
  draw = jax.jit(  # the logits are an argument: XLA would compute with constants as it compiles
    lambda z, k: jax.lax.map(lambda k: generation.draw(z, k)[0], k, batch_size=100)
  )
  logits = jnp.log(jnp.asarray(p, jnp.float32))
  tokens = np.asarray(draw(logits, jax.random.split(jax.random.key(5), 4000)))
  rest = tokens[tokens != 17]
  assert abs(len(rest) / 4000 - 0.5) < 4.5 * 0.5 / np.sqrt(4000)
  # Uniform over the vocabulary: mean rank within 4.5 standard errors of the middle.
  assert abs(rest.mean() / vocab - 0.5) < 4.5 * np.sqrt(1 / 12 / len(rest))


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
def test_recorded_logprobs_are_the_trainers(params, temperature):
  out = run(params, PROMPTS, MASK, keys(0), STOP, temperature=temperature)
  hidden = MODEL.score(params, PROMPTS, MASK, out.tokens)
  logp, entropy = head_logprobs(hidden, MODEL.head(params), out.tokens, temperature=temperature)
  np.testing.assert_allclose(out.logp, jnp.where(out.mask, logp, 0.0), atol=1e-4)
  np.testing.assert_allclose(out.entropy, jnp.where(out.mask, entropy, 0.0), atol=1e-4)
  assert (np.asarray(out.logp) < 0).sum() == np.asarray(out.mask).sum()


def test_steps_differ_and_one_step_repeats(params):
  first, again, other = (run(params, PROMPTS, MASK, keys(s), STOP) for s in (0, 0, 1))
  np.testing.assert_array_equal(first.tokens, again.tokens)
  for p in range(3):
    assert not np.array_equal(first.tokens[p], other.tokens[p])
    assert len({tuple(row) for row in np.asarray(first.tokens[p]).tolist()}) > 1


def test_splitting_the_batch_changes_no_sample(params):
  whole = run(params, PROMPTS, MASK, keys(0), STOP)
  for p in range(3):
    part = run(params, PROMPTS[p : p + 1], MASK[p : p + 1], keys(0, ids=(p,)), STOP)
    np.testing.assert_array_equal(part.tokens[0], whole.tokens[p])
  smaller = run(params, PROMPTS, MASK, keys(0, group=2), STOP)
  np.testing.assert_array_equal(smaller.tokens, whole.tokens[:, :2])
  order = jnp.array([2, 0, 1])
  reordered = run(params, PROMPTS[order], MASK[order], keys(0, ids=(2, 0, 1)), STOP)
  np.testing.assert_array_equal(reordered.tokens, whole.tokens[order])


def test_greedy_is_the_argmax_of_the_plain_model(params):
  out = run(params, PROMPTS, MASK, keys(0, group=2), STOP, temperature=0.0)
  for p, prompt in enumerate(([3, 4], [5, 6, 7], [8, 9, 10, 11])):
    ids = list(prompt)
    for t in range(5):
      logits = plain.hidden_states(CONFIG, params, ids)[-1] @ params["embed"].T
      assert int(out.tokens[p, 0, t]) == int(logits.argmax())
      ids.append(int(logits.argmax()))
      if ids[-1] == 2:
        break
    np.testing.assert_array_equal(out.tokens[p, 0], out.tokens[p, 1])


def test_completions_end_with_the_stop_token_and_are_padded_after_it(params):
  stop = [2, 5, 6, 7, 8, 9, 10, 11, 12, 13]
  out = run(params, PROMPTS, MASK, keys(0, group=8), stop_at(*stop), length=6, pad_id=1)
  tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
  lengths = mask.sum(-1)
  assert lengths.min() == 1  # some stop at once,
  assert lengths.max() > 1  # some do not
  ends = np.isin(tokens, stop)
  for p in range(3):
    for g in range(8):
      n = lengths[p, g]
      assert not ends[p, g, : n - 1].any()
      assert ends[p, g, n - 1] or n == 6
      assert out.ended[p, g] == ends[p, g, n - 1]
      assert (tokens[p, g, n:] == 1).all()
      assert (np.asarray(out.logp)[p, g, n:] == 0).all()


def test_a_stop_string_over_several_tokens_ends_a_completion(params):
  """Every token is one letter; without stop strings the same completions continue."""
  letters = [b"abc"[i % 3 : i % 3 + 1] for i in range(23)]
  table = jnp.asarray(stop_table(letters, ["ab", "cc"], [], vocab_size=23))
  free = run(params, PROMPTS, MASK, keys(0, group=8), stop_at(), length=6, pad_id=1)
  out = run(params, PROMPTS, MASK, keys(0, group=8), table, length=6, pad_id=1)
  ended = 0
  for p in range(3):
    for g in range(8):
      text = b"".join(letters[i] for i in np.asarray(free.tokens)[p, g])
      ends = [at + 2 for at in (text.find(b"ab"), text.find(b"cc")) if at >= 0]
      length = min(ends, default=6)
      assert int(out.mask[p, g].sum()) == length
      assert bool(out.ended[p, g]) == bool(ends)
      np.testing.assert_array_equal(out.tokens[p, g, :length], free.tokens[p, g, :length])
      ended += bool(ends)
  assert 0 < ended < 24


def test_the_loop_ends_when_all_rows_have_stopped(params):
  """Every token stops a completion, so there is no decode step."""
  calls = []

  class Counting(Decoder):
    def decode(self, *args):
      jax.debug.callback(lambda: calls.append(1))
      return super().decode(*args)

  out = generation.generate(
    Counting(CONFIG),
    params,
    PROMPTS,
    MASK,
    keys(0),
    stop_at(*range(23)),
    length=5,
    temperature=1.0,
    pad_id=0,
  )
  jax.effects_barrier()
  assert np.asarray(out.mask).sum() == 12
  assert calls == []


def test_a_single_token_budget(params):
  out = run(params, PROMPTS, MASK, keys(0), STOP, length=1)
  longer = run(params, PROMPTS, MASK, keys(0), STOP, length=5)
  np.testing.assert_array_equal(out.tokens[..., 0], longer.tokens[..., 0])


@pytest.mark.parametrize(
  ("max_compactions", "prompt_shards"), [(1, 3), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_compaction_changes_nothing(params, max_compactions, prompt_shards):
  """Compares with the plain loop, for rows that end one by one, all at once, and never."""
  for stop in (stop_at(2, 5, 6), stop_at(*range(23)), stop_at(22)):
    expected, compacted = (
      run(params, PROMPTS, MASK, keys(0), stop, length=20, pad_id=1, **options)
      for options in ({}, {"max_compactions": max_compactions, "prompt_shards": prompt_shards})
    )
    for name in ("tokens", "mask", "ended"):
      np.testing.assert_array_equal(getattr(compacted, name), getattr(expected, name), name)
    np.testing.assert_allclose(compacted.logp, expected.logp, atol=1e-5)
    np.testing.assert_allclose(compacted.entropy, expected.entropy, atol=1e-5)


def test_finished_rows_cost_nothing(params):
  """Every decode step computes the smallest shape that holds the live rows."""
  decoded = []

  class Counting(Decoder):
    def decode(self, params, tokens, index, *rest):
      jax.debug.callback(lambda i: decoded.append((int(i), tokens.shape)), index)
      return super().decode(params, tokens, index, *rest)

  out = jax.jit(
    lambda p: generation.generate(
      Counting(CONFIG), p, PROMPTS, MASK, keys(1), stop_at(2, 5),
      length=20, temperature=1.0, pad_id=0, max_compactions=3,
    )
  )(params)  # fmt: skip
  jax.effects_barrier()
  lengths = np.asarray(out.mask).sum(-1)
  shapes = [(3, 4), (6, 1), (3, 1), (2, 1)]
  expected, at = [], 0
  for index in range(lengths.max() - 1):
    live = (lengths > index + 1).sum(-1)  # rows with a token after number `index`
    while at + 1 < len(shapes):
      chunks, width = shapes[at + 1]
      if sum(-(-int(n) // width) for n in live) > chunks:
        break
      at += 1
    expected.append((index, shapes[at]))
  assert sorted(decoded) == expected
  assert at == len(shapes) - 1
  assert sum(chunks * width for _, (chunks, width) in expected) < 0.7 * 12 * len(expected)


@pytest.mark.parametrize("end", [0.0, 1.0 - 2.0**-23])
def test_the_ends_of_the_uniform_draw_nothing_improbable(monkeypatch, end):
  """Tokens of probability 4e-18 come first and last, and so do whole blocks of them."""
  likely = 150
  logits = np.full((1, 300), -40.0, np.float32)
  logits[0, likely] = 0.0
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, end, jnp.float32))
  token, logp, _ = generation.draw(jnp.asarray(logits), jax.random.split(jax.random.key(0), 1))
  assert int(token[0]) == likely
  assert float(logp[0]) == pytest.approx(0.0, abs=1e-6)
