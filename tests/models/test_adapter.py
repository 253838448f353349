"""A model adapted from one function agrees with the decoder that shares the prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import FunctionModel
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.sampling import Sampler
from grpo_jax.tokens import ByteTokenizer
from tests.helpers import plain

CONFIG = ModelConfig(vocab_size=257, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)


def hidden_states(params, tokens, mask):
  """The independent decoder of `helpers.plain`, on rows without padding."""
  return jax.vmap(lambda row: plain.hidden_states(CONFIG, params, row))(tokens)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapted():
  return FunctionModel(hidden_states, head=MODEL.head, vocab_size=CONFIG.vocab_size)


def test_scores_are_those_of_the_shared_prompt(params, adapted):
  rng = np.random.default_rng(0)
  prompts, completions = rng.integers(0, 257, (2, 3)), rng.integers(0, 257, (2, 4, 5))
  arguments = (params, jnp.asarray(prompts), jnp.ones((2, 3), bool), jnp.asarray(completions))
  np.testing.assert_allclose(
    adapted.score(*arguments), MODEL.score(*arguments), atol=2e-5, rtol=1e-4
  )


def test_completions_are_those_of_the_decoder(params, adapted):
  prompts = ["ab", "cd", "ef"]
  outs = [
    Sampler(model, ByteTokenizer(), prompt_length=2, completion_length=5)(
      params, prompts, jax.random.key(3), group=4
    )
    for model in (MODEL, adapted)
  ]
  np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
  np.testing.assert_allclose(outs[0].logp, outs[1].logp, atol=1e-5)
