"""Trains a model that is not this project's: a Flax linen module, and a Flax NNX module.

    python examples/bring_your_model.py [linen] [nnx]

`FunctionModel` adapts any function `(params, tokens, mask) -> hidden states` to the `Model`
protocol. It computes one row per completion and keeps no cache: correct for every causal model, and
slower than a model that shares the prompt (`grpo_jax.models.decoder`).
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.learning import TrainState, make_train_step
from grpo_jax.models import FunctionModel
from grpo_jax.rollout import RolloutConfig, collect
from grpo_jax.sampling import Sampler
from grpo_jax.tasks import Example, score_with
from grpo_jax.tokens import ByteTokenizer

VOCAB, WIDTH = 257, 32


def linen_model() -> tuple[FunctionModel, Any]:
  """Returns a small language model in Flax linen, by `init` and `apply`."""
  import flax.linen as nn

  class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):  # [B, S] -> [B, S, D]
      self.param("head", nn.initializers.normal(0.02), (WIDTH, VOCAB))
      x = nn.Embed(VOCAB, WIDTH)(tokens)
      return nn.tanh(nn.Dense(WIDTH)(jnp.concatenate([x, running_mean(x, mask)], -1)))

  network = Network()
  example = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
  params = network.init(jax.random.key(0), *example)["params"]

  def hidden_states(params, tokens, mask):
    return network.apply({"params": params}, tokens, mask)

  return FunctionModel(hidden_states, head=lambda params: params["head"], vocab_size=VOCAB), params


def nnx_model() -> tuple[FunctionModel, Any]:
  """Returns the same model in Flax NNX, by `split` and `merge`."""
  from flax import nnx

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
      self.mix = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
      self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens, mask):
      x = self.embed(tokens)
      return nnx.tanh(self.mix(jnp.concatenate([x, running_mean(x, mask)], -1)))

  graph, params = nnx.split(Network(nnx.Rngs(0)))

  def hidden_states(params, tokens, mask):
    return nnx.merge(graph, params)(tokens, mask)

  def head(params):
    return nnx.merge(graph, params).head.kernel[...]

  return FunctionModel(hidden_states, head=head, vocab_size=VOCAB), params


def running_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the mean of all real tokens so far, [B, S, D]; padding changes nothing."""
  weight = mask[..., None].astype(x.dtype)
  return jnp.cumsum(x * weight, 1) / jnp.maximum(jnp.cumsum(weight, 1), 1)


MODELS = {"linen": linen_model, "nnx": nnx_model}


def vowels(prompts, completions, **columns):
  """Rewards the share of vowels in the answer."""
  return [sum(c in "aeiou" for c in text) / 4 for text in completions]


def train(make: Callable, steps: int = 60) -> list[float]:
  """Returns the mean reward of each step."""
  model, params = make()
  examples = [Example(prompt, {}, prompt) for prompt in ("a:", "b:", "c:", "d:")]
  sampler = Sampler(model, ByteTokenizer(), prompt_length=2, completion_length=4, temperature=1.0)
  config = RolloutConfig(group_size=16, algorithm="dr_grpo")
  optimizer = optax.adam(1e-2)
  state = TrainState.create(params, optimizer)
  step = make_train_step(model, config.algorithm, optimizer)
  rewards = []
  for i in range(steps):
    rollout = collect(
      sampler, state.params, examples, score_with(vowels), jax.random.key(i), config
    )
    state, _ = step(state, rollout.batch)
    rewards.append(rollout.metrics["reward"])
  return rewards


if __name__ == "__main__":
  for name in sys.argv[1:] or MODELS:
    rewards = train(MODELS[name])
    print(f"{name}: reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
