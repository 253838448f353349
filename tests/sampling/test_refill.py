"""Tests that rows which are filled again write the completions of the plain loop."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.refill import generate_refilled, halvings
from grpo_jax.sampling.stopping import stop_table

CONFIG = ModelConfig(vocab_size=23, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
PROMPTS = jnp.array([[0, 0, 3, 4], [0, 5, 6, 7], [8, 9, 10, 11], [0, 0, 0, 7]], jnp.int32)
MASK = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
STOP = jnp.asarray(stop_table([], [], [2, 5, 9], vocab_size=23))
GROUP = 3
KEYS = generation.row_keys(jax.random.key(1), jnp.arange(4), GROUP)
SETTINGS = {"length": 16, "temperature": 1.0, "pad_id": 2}


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  return params | {"embed": params["embed"] * 0.9}


def sample(function, params, model=MODEL, **options):
  program = jax.jit(partial(function, model, **SETTINGS | options))
  return jax.device_get(program(params, PROMPTS, MASK, KEYS, STOP))


@pytest.fixture(scope="module")
def expected(params):
  return {
    name: sample(generation.generate, layout(params))
    for name, layout in (("unstacked", unstack), ("stacked", lambda params: params))
  }


def assert_same(actual, expected):
  """Numbers agree to rounding: products of other sizes are rounded otherwise."""
  for name in ("tokens", "mask", "ended"):
    np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
  for name in ("logp", "entropy"):
    pair = getattr(actual, name), getattr(expected, name)
    np.testing.assert_allclose(*pair, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("max_compactions", [0, 3])
@pytest.mark.parametrize("rows", [1, 3, 5, 12])
def test_completions_are_those_of_the_plain_loop(params, expected, rows, max_compactions):
  lengths = expected["unstacked"].mask.sum(-1)
  assert lengths.min() < 4
  assert lengths.max() == 16
  out = sample(generate_refilled, unstack(params), rows=rows, max_compactions=max_compactions)
  assert_same(out, expected["unstacked"])


@pytest.mark.parametrize("shards", [2, 4])
def test_each_shard_has_a_queue_of_its_own(params, expected, shards):
  out = sample(generate_refilled, params, rows=2, prompt_shards=shards)
  assert_same(out, expected["stacked"])


def test_greedy_and_filtered_completions_are_the_same_too(params):
  for options in ({"temperature": 0.0}, {"token_filter": TokenFilter(top_k=3)}):
    plain = sample(generation.generate, unstack(params), **options)
    assert_same(sample(generate_refilled, unstack(params), rows=4, **options), plain)


def test_layers_with_a_window_see_the_same_tokens(params):
  model = Decoder(dataclasses.replace(CONFIG, window=5, local_layers=(True, False)))
  plain = sample(generation.generate, params, model)
  assert_same(sample(generate_refilled, params, model, rows=3), plain)


def test_one_row_writes_all_completions_one_after_another(params, expected):
  """Each step then writes a token: the row-steps are the tokens."""
  out = sample(generate_refilled, unstack(params), rows=1)
  assert out.row_steps.shape == (4,)
  assert out.row_steps.sum() == expected["unstacked"].mask.sum()


def test_row_steps_by_hand(params, expected):
  """A queue over 5 rows: each completion goes to the row that is free first."""
  lengths = expected["unstacked"].mask.sum(-1).reshape(-1)
  ends = [0] * 5
  for length in lengths:
    ends[ends.index(min(ends))] += length
  out = sample(generate_refilled, unstack(params), rows=5, max_compactions=0)
  assert out.row_steps.sum() == pytest.approx(5 * max(ends))
  compacted = sample(generate_refilled, unstack(params), rows=5).row_steps.sum()
  assert lengths.sum() <= compacted < 5 * max(ends)


def test_the_cache_has_room_for_the_rows_alone(params):
  """The largest array of keys in the program is that of 2 rows, not of 12."""
  program = jax.jit(partial(generate_refilled, MODEL, rows=2, **SETTINGS))
  text = str(jax.make_jaxpr(program)(params, PROMPTS, MASK, KEYS, STOP))
  assert "f32[2,2,1,15,8]" in text  # [L, R, K, T - 1, Dh]
  assert "f32[2,12,1,15,8]" not in text
  plain = jax.jit(partial(generation.generate, MODEL, **SETTINGS))
  assert "f32[2,12,1,15,8]" in str(jax.make_jaxpr(plain)(params, PROMPTS, MASK, KEYS, STOP))


def test_halvings():
  assert halvings(64, 5) == [32, 16, 8, 4, 2]
  assert halvings(3, 5) == [2, 1]
