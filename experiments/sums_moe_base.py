"""Pretrains a Qwen3-MoE of 3.4 million parameters on sums, from a config.json alone."""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = f"random:{Path(__file__).parent / 'sums_moe' / 'config.json'}"
  c.steps = 2000
  c.stop.when = "eval/accuracy>0.3"
  with c.unlocked():
    c.task.settings.update(
      dataset="chain_sum",
      config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
      keep=r"\d+ \+ \d+",
      train_size=3800,
      eval_size=200,
      shots=0,
    )
  c.eval.every = 50
  c.eval.batch_prompts = 200
  c.rollout.given = "answer"
  c.rollout.prompts_per_step = 128
  c.rollout.group_size = 1
  c.rollout.completion_length = 4
  c.algorithm.name = "online_rft"
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50
  return c
