"""Every model family computes what PyTorch transformers computes, with and without a cache.

The folders in fixtures/families/ are tiny random models with logits of transformers; how they were
made is in fixtures/make_families.py.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.load import load

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
# The programs are tiny, and most of a test would be spent on optimizing them.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NAMES = sorted(folder.name for folder in FAMILIES.iterdir())


def logits_of(model, params, hidden):
  """What a head or a classifier gives."""
  head = params["score"].T if model.config.labels else model.head(params)
  logits = jnp.matmul(hidden, head, precision="highest")
  cap = model.config.softcap
  return logits if cap is None else cap * jnp.tanh(logits / cap)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_transformers_computes(name):
  """Prompts of two lengths, left-padded, each computed once for two completions."""
  config, params = load(str(FAMILIES / name))
  model, expected = Decoder(config), dict(np.load(FAMILIES / name / "expected.npz"))
  prompts, mask, completions = (expected[k] for k in ("prompts", "prompt_mask", "completions"))

  @compiled
  def score(params):
    hidden = model.score(params, prompts, mask, completions)
    return logits_of(model, params, hidden)

  @compiled
  def decode(params):
    """A row of logits from the prompt alone, and one more after each completion token."""
    first, prefix = model.prefill(params, prompts, mask)
    count, group, length = completions.shape
    cache = model.empty_cache(params, count, group, length)

    def step(cache, inputs):
      hidden, cache = model.decode(params, *inputs, prefix, mask, cache)
      return cache, hidden

    tokens = jnp.moveaxis(completions, -1, 0)
    _, hidden = jax.lax.scan(step, cache, (tokens, jnp.arange(length)))
    first = jnp.broadcast_to(first[:, None, None], (count, group, 1, config.width))
    return logits_of(model, params, jnp.concatenate([first, jnp.moveaxis(hidden, 0, 2)], axis=2))

  results = {"score": score(params), "decode": decode(unstack(params))}
  if name == "gemma3":  # the one with all that differs from layer to layer
    results["decode, layers stacked"] = decode(params)
  for what, got in results.items():
    want = expected["logits"]
    if config.labels:  # a classifier's outputs stand after each token, and not in front of it
      got, want = got[:, :, 1:], want[:, :, : got.shape[2] - 1]
    np.testing.assert_allclose(got[:, :, : want.shape[2]], want, atol=2e-5, err_msg=what)
