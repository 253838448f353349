"""Tests that the decoder computes what PyTorch transformers computes, with and without a cache.

The folders in fixtures/ hold tiny random models with logits of transformers (float32, CPU); see
fixtures/make_tiny_llama.py and fixtures/make_families.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.load import load
from tests.helpers.model_files import FAMILIES, REAL, TIED, UNTIED, needs_real_model

# The programs are tiny, and optimizing them would take most of a test.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NAMES = sorted(folder.name for folder in FAMILIES.iterdir())


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_logits_equal_those_of_transformers(source):
  config, params = load(str(source))
  fixture = np.load(source / "expected.npz")
  # Prompts of one token, and completions padded on the right: hidden[t] predicts completion token
  # t, so it follows token t of the row.
  rows = [row[mask] for row, mask in zip(fixture["ids"], fixture["mask"])]
  longest = max(map(len, rows))
  padded = np.stack([np.pad(row, (0, longest + 1 - len(row))) for row in rows])
  model = Decoder(config)
  hidden = model.score(params, padded[:, :1], np.ones((len(rows), 1), bool), padded[:, None, 1:])
  for i, row in enumerate(rows):
    expected = fixture["logits"][i][fixture["mask"][i]]
    actual = hidden[i, 0, : len(row)] @ model.head(params)
    np.testing.assert_allclose(actual, expected, rtol=5e-6, atol=2e-5, err_msg=f"row {i}")


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_greedy_decoding_of_a_left_padded_batch_equals_transformers(source):
  config, params = load(str(source))
  fixture = np.load(source / "expected.npz")
  assert fixture["greedy_margin"] > 1e-2  # no near ties between the best two tokens
  tokens = greedy(config, params, fixture["ids"], fixture["mask"], 8)
  assert tokens == fixture["greedy"].tolist()


def greedy(config, params, ids, mask, steps):
  """Decodes with a cache; the most probable token of each step."""
  model, params = Decoder(config), unstack(params)
  hidden, prefix = model.prefill(params, ids, mask)
  hidden, cache = hidden[:, None], model.empty_cache(params, len(ids), 1, steps)
  tokens = []
  for t in range(steps):
    tokens.append((hidden @ model.head(params)).argmax(-1))
    hidden, cache = model.decode(params, tokens[-1], jnp.int32(t), prefix, mask, cache)
  return np.concatenate(tokens, axis=1).tolist()


def logits_of(model, params, hidden):
  """Returns the outputs of the head, or of a classifier."""
  head = params["score"].T if model.config.labels else model.head(params)
  logits = jnp.matmul(hidden, head, precision="highest")
  cap = model.config.softcap
  return logits if cap is None else cap * jnp.tanh(logits / cap)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_transformers_computes(name):
  """Left-padded prompts of two lengths, each computed once for two completions."""
  config, params = load(str(FAMILIES / name))
  fixture = dict(np.load(FAMILIES / name / "expected.npz"))
  prompts, mask, completions = (fixture[k] for k in ("prompts", "prompt_mask", "completions"))
  model = Decoder(config, length=prompts.shape[1] + completions.shape[2])

  @jit
  def score(params):
    hidden = model.score(params, prompts, mask, completions)
    return logits_of(model, params, hidden)

  @jit
  def decode(params):
    """Logits after the prompt, and after each completion token."""
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
  if name == "gemma3":  # the family whose layers differ most
    results["decode, layers stacked"] = decode(params)
  for path, actual in results.items():
    expected = fixture["logits"]
    if config.labels:  # a classifier has outputs after each token, but none before the first
      actual, expected = actual[:, :, 1:], expected[:, :, : actual.shape[2] - 1]
    actual = actual[:, :, : expected.shape[2]]
    np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=path)


def test_several_tokens_at_once_see_the_sinks():
  """Episodes go on after observations of several tokens: as one token after another."""
  config, params = load(str(FAMILIES / "gpt_oss"))
  fixture = np.load(FAMILIES / "gpt_oss" / "expected.npz")
  prompts, prompt_mask, completions = (
    fixture[name] for name in ("prompts", "prompt_mask", "completions")
  )
  model, params = Decoder(config), unstack(params)

  @jit
  def run(params):
    _, prefix = model.prefill(params, prompts, prompt_mask)
    cache = model.empty_cache(params, *completions.shape)
    hidden, _ = model.extend(params, completions, jnp.int32(0), prefix, prompt_mask, cache)
    return logits_of(model, params, hidden)

  np.testing.assert_allclose(run(params)[:, :, :-1], fixture["logits"][:, :, 1:], atol=2e-5)


@pytest.mark.slow
@needs_real_model
def test_smollm2_knows_the_capital_of_france():
  from grpo_jax.tokens import load_tokenizer

  config, params = load(REAL)
  assert config == ModelConfig(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    rope_theta=100000.0,
    norm_eps=1e-5,
    tied=True,
    context=8192,
  )
  tokenizer = load_tokenizer(REAL)
  ids = np.array([tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])])
  # PyTorch transformers 5.23 gives these ids for the same file, with its own GGUF reader.
  answer = greedy(config, params, ids, np.ones(ids.shape, bool), 8)[0]
  assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]
  assert tokenizer.decode(answer) == "The capital of France is Paris."
