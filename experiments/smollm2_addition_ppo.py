"""Trains SmolLM2-135M to add two-digit numbers with PPO and a critic, to compare with GRPO.

It is `smollm2_addition.py` with another algorithm: same model, prompts, completions and updates.
The critic is a second copy of the model with a value head.

Hardware  2 CPU cores, float32
Time      not measured
Result    none yet
Command   python -m grpo_jax.train --config experiments/smollm2_addition_ppo.py --workdir runs/ppo
          (both sides: python -m benchmarks.critic)
"""

from pathlib import Path

from grpo_jax.config import load


def get_config():
  c = load(str(Path(__file__).parent / "smollm2_addition.py")).copy_and_resolve_references()
  c.algorithm.name = "ppo"
  c.critic.learning_rate = 4e-5
  return c
