"""Prompts of any length through the sampler: few programs, and padding that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling import sampler as samplers
from grpo_jax.sampling.sampler import Sampler, padded_length
from grpo_jax.tokens import ByteTokenizer

CONFIG = ModelConfig(vocab_size=264, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24)
TRACED = []


class Counting(Decoder):
  """Notes every trace of a program: the length of its prompts."""

  def prefill(self, params, tokens, mask):
    TRACED.append(tokens.shape[1])
    return super().prefill(params, tokens, mask)


MODEL = Counting(CONFIG)
PARAMS = unstack(MODEL.init(jax.random.key(0)))
SAMPLER = Sampler(MODEL, ByteTokenizer(), prompt_length=100, completion_length=3)


def sample(prompts, sampler=SAMPLER, seed=0):
  return sampler(PARAMS, prompts, jax.random.key(seed), group=2, temperature=1.0)


def test_batches_are_padded_to_quarters_of_the_longest_prompt():
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


def test_the_length_that_a_batch_is_padded_to_changes_no_completion():
  alone, beside = sample(["12+", "x" * 9]), sample(["12+", "x" * 90])
  assert alone.prompts.shape[1] == 32
  assert beside.prompts.shape[1] == 96
  np.testing.assert_array_equal(alone.tokens[0], beside.tokens[0])
  np.testing.assert_allclose(alone.logp[0], beside.logp[0], atol=1e-5)


def test_all_hosts_pad_to_the_longest_prompt_of_any(monkeypatch):
  """Another host's prompts have 70 tokens."""

  def gathered(longest):
    return {"longest": np.concatenate([longest, [70]])}

  monkeypatch.setattr(samplers.hosts, "gathered", gathered)
  assert sample(["x", "yy"]).prompts.shape[1] == 96


def test_a_table_of_stops_of_ones_own():
  """Tokens 0..119 end at once, 120..263 after the next; and none ever does."""
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
