"""Tests that rows which are filled again write the completions of the plain loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling.refill import generate_refilled
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
  for name in ("tokens", "mask", "ended", "logp", "entropy"):
    np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("max_compactions", [0, 3])
@pytest.mark.parametrize("rows", [1, 3, 5, 12])
def test_completions_are_bit_for_bit_those_of_the_plain_loop(
  params, expected, rows, max_compactions
):
  lengths = expected["unstacked"].mask.sum(-1)
  assert lengths.min() < 4
  assert lengths.max() == 16
  out = sample(generate_refilled, unstack(params), rows=rows, max_compactions=max_compactions)
  assert_same(out, expected["unstacked"])
