"""Tests prompts of any length: few programs, padding that changes nothing, one temperature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling import sampler as samplers
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.sampler import Sampler, padded_length
from grpo_jax.tokens import ByteTokenizer

CONFIG = ModelConfig(vocab_size=264, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24)
TRACED = []


class Counting(Decoder):
  """Records each trace of a program: the length of its prompts."""

  def prefill(self, params, tokens, mask):
    TRACED.append(tokens.shape[1])
    return super().prefill(params, tokens, mask)


MODEL = Counting(CONFIG)
SAMPLER = Sampler(MODEL, ByteTokenizer(), prompt_length=100, completion_length=3)


@functools.cache
def init():
  return unstack(MODEL.init(jax.random.key(0)))


def sample(prompts, sampler=SAMPLER, seed=0):
  return sampler(init(), prompts, jax.random.key(seed), group=2, temperature=1.0)


def test_batches_are_padded_to_quarters_of_the_prompt_length():
  for limit in (1, 15, 16, 46, 63, 64, 65, 320, 1000):
    sizes = [padded_length(n, limit) for n in range(1, limit + 1)]
    assert len(set(sizes)) <= 4
    assert sizes[-1] == limit
    for n, size in enumerate(sizes, 1):
      assert n <= size < n + -(-limit // 64) * 16
      assert size == limit or size % 16 == 0


def test_nothing_compiles_after_warm_up():
  TRACED.clear()
  lengths = np.random.default_rng(0).integers(1, 101, 40)
  for step, longest in enumerate([*lengths, 100, 1]):
    out = sample(["x" * max(longest // 2, 1), "y" * longest], seed=step)
    assert out.prompts.shape == (2, padded_length(longest, 100))
    assert out.prompt_mask.sum(-1).tolist() == [max(longest // 2, 1), longest]
  assert sorted(TRACED) == [32, 64, 96, 100]


def test_padding_changes_no_completion():
  short, long = sample(["12+", "x" * 9]), sample(["12+", "x" * 90])
  assert short.prompts.shape[1] == 32
  assert long.prompts.shape[1] == 96
  np.testing.assert_array_equal(short.tokens[0], long.tokens[0])
  np.testing.assert_allclose(short.logp[0], long.logp[0], atol=1e-5)


def test_hosts_pad_to_the_longest_prompt_of_all_hosts(monkeypatch):
  """Another host's prompts have 70 tokens."""

  def gathered(longest):
    return {"longest": np.concatenate([longest, [70]])}

  monkeypatch.setattr(samplers.hosts, "gathered", gathered)
  assert sample(["x", "yy"]).prompts.shape[1] == 96


def test_a_custom_stop_table():
  """Tokens 0..119 end a completion and 120..263 end it one token later, or no token ends it."""
  table = np.full((3, 264), 2, np.int32)
  table[0, 120:] = 1
  out = sample(["a", "b", "c"], dataclasses.replace(SAMPLER, stop_table=table))
  assert out.ended.all()
  np.testing.assert_array_equal(out.lengths, 1 + (out.tokens[..., 0] >= 120))
  assert len(set(out.lengths.ravel().tolist())) == 2
  endless = dataclasses.replace(SAMPLER, stop_table=np.zeros((2, 264), np.int32))
  assert sample(["a"], endless).lengths.tolist() == [[3, 3]]
  with pytest.raises(ValueError, match=r"stop_table has shape \(3, 4\), must be \[S, V\]"):
    dataclasses.replace(SAMPLER, stop_table=jnp.zeros((3, 4), int))


# --- the temperature ------------------------------------------------------------------------------


def test_the_temperature_is_given_once_and_recorded():
  """Checks that sampling is nearly greedy at temperature 0.01, and is not at 1."""
  cold = dataclasses.replace(SAMPLER, temperature=0.01)
  key = jax.random.key(0)
  at_hundredth, greedy, hot = (
    cold(init(), ["12+"], key, group=4, temperature=temperature) for temperature in (None, 0.0, 1.0)
  )
  assert [out.temperature for out in (at_hundredth, greedy, hot)] == [0.01, 0.0, 1.0]
  assert sample(["a"]).temperature == 1.0
  assert at_hundredth.entropy[:, :, 0].max() < hot.entropy[:, :, 0].min()
  np.testing.assert_array_equal(hot.tokens, SAMPLER(init(), ["12+"], key, group=4).tokens)
  assert (greedy.tokens == greedy.tokens[:, :1]).all()


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_an_invalid_temperature_is_refused(temperature):
  message = "must be finite and 0 [(]greedy[)] or above"
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SAMPLER, temperature=temperature)
  with pytest.raises(ValueError, match=message):
    SAMPLER(init(), ["a"], jax.random.key(0), group=1, temperature=temperature)


# --- the layout for decoding ----------------------------------------------------------------------


def test_stacked_parameters_are_unstacked_by_the_sampler():
  """On CPUs the layers of `decode` are a tuple, whatever layout is passed in."""
  layouts = []

  class Recording(Decoder):
    def decode(self, params, *rest):
      layouts.append(type(params["layers"]))
      return super().decode(params, *rest)

  sampler = dataclasses.replace(SAMPLER, model=Recording(CONFIG))
  stacked = sampler(MODEL.init(jax.random.key(0)), ["12+"], jax.random.key(0), group=2)
  assert set(layouts) == {tuple}
  unstacked = sampler(init(), ["12+"], jax.random.key(0), group=2)
  np.testing.assert_array_equal(stacked.tokens, unstacked.tokens)


def test_a_model_without_a_layout_for_decoding_is_sampled_as_it_is():
  class Minimal:
    """Implements the functions of the protocol and nothing else."""

    config, head, prefill = CONFIG, MODEL.head, MODEL.prefill
    decode, empty_cache, score = MODEL.decode, MODEL.empty_cache, MODEL.score

  sampler = dataclasses.replace(SAMPLER, model=Minimal())
  out = sampler(MODEL.init(jax.random.key(0)), ["12+"], jax.random.key(0), group=2)
  np.testing.assert_array_equal(
    out.tokens, SAMPLER(init(), ["12+"], jax.random.key(0), group=2).tokens
  )


# --- evaluation -----------------------------------------------------------------------------------


def test_a_filter_of_one_token_is_greedy():
  arguments = {"group": 2, "temperature": 1.3}
  one = SAMPLER(init(), ["12+"], jax.random.key(0), token_filter=TokenFilter(top_k=1), **arguments)
  greedy = SAMPLER(init(), ["12+"], jax.random.key(0), group=2, temperature=0.0)
  np.testing.assert_array_equal(one.tokens, greedy.tokens)
  np.testing.assert_allclose(one.logp, 0.0, atol=1e-6)


def test_a_filter_that_is_off_changes_nothing():
  plain = sample(["12+", "7"])
  key = jax.random.key(0)
  off = SAMPLER(init(), ["12+", "7"], key, group=2, temperature=1.0, token_filter=TokenFilter())
  np.testing.assert_array_equal(plain.tokens, off.tokens)
  np.testing.assert_array_equal(plain.logp, off.logp)


def test_a_stop_string_that_is_a_special_token_ends_completions():
  """It adds no text, so it could not be found there."""

  class Special(ByteTokenizer):
    def marker_ids(self, strings):
      return [7 for string in strings if string == "<|pad|>"]

  sampler = Sampler(MODEL, Special(), prompt_length=8, completion_length=3, stop=("<|pad|>",))
  assert 7 in sampler._ending_ids
  assert (sampler._table[:, 7] == len(sampler._table) - 1).all()
  assert (Sampler(MODEL, ByteTokenizer(), 8, 3, stop=("<|pad|>",))._table[0, 7]) == 0
