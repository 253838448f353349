"""Trains a tiny random model to write lower-case letters: the whole pipeline, no download.

It is a smoke test and not a result, since there is nothing to generalize.

Hardware  2 CPU cores
Time      under a minute
Result    reward 0.09 in the first step and above 0.98 from step 20 on; held-out accuracy 0.0 before
          and 1.0 after
Command   python -m grpo_jax.train --config experiments/tiny.py --workdir runs/tiny
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "random:tiny"
  c.steps = 40
  c.task.name = "letters"
  c.rollout.prompts_per_step = 8
  c.rollout.group_size = 8
  c.rollout.completion_length = 8
  c.algorithm.name = "dr_grpo"
  c.optimizer.learning_rate = 3e-3
  return c
