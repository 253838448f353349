"""A tiny model, a batch with ragged lengths, and one plain SGD step on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.core.masks import token_weights
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder

CONFIG = ModelConfig(vocab_size=19, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
RATE = 0.1


def make_batch(ref=False, average="sequence", temperature=None):
  """Returns 4 prompts of 2 to 4 tokens with 3 completions each, of 1 to 5 tokens."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 6, (4, 3))
  lengths[0, 0] = 5
  mask = np.arange(5) < lengths[..., None]
  prompt_mask = np.arange(4) >= np.array([0, 1, 2, 0])[:, None]
  batch = Batch(
    prompts=jnp.asarray(rng.integers(0, 19, (4, 4)), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(rng.integers(0, 19, (4, 3, 5)), jnp.int32),
    mask=jnp.asarray(mask),
    advantages=jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    weights=token_weights(jnp.asarray(mask), average, max_length=6),
    sampler_logp=jnp.asarray(-rng.random((4, 3, 5)), jnp.float32),
    temperature=temperature,
  )
  if ref:
    batch = dataclasses.replace(batch, ref_logp=batch.sampler_logp - 0.3)
  return batch


def step_once(
  params, batch, algorithm, micro_batches=1, temperature=0.7, base_params=None, **options
):
  """Returns (new params, metrics) of one plain SGD step, so that the update is the gradient."""
  optimizer = optax.sgd(RATE)
  step = make_train_step(
    MODEL,
    algorithm,
    optimizer,
    lambda count: RATE,
    temperature=temperature,
    micro_batches=micro_batches,
    **options,
  )
  state = dataclasses.replace(TrainState.create(params, optimizer), history=None)
  state, metrics = step(state, batch, base_params)
  assert int(state.step) == 1
  return state.params, metrics


def assert_trees_close(result, expected, atol):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


def bits(tree):
  """Returns the bytes of each leaf."""
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
