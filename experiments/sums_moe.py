"""Lifts the mixture of experts that `sums_moe_base.py` pretrains, on sums it has never seen."""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "runs/sums-base-model"
  c.steps = 100
  with c.unlocked():
    c.task.settings.update(
      dataset="chain_sum",
      config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
      keep=r"\d+ \+ \d+",
      train_size=3800,
      eval_size=200,
      shots=0,
    )
  c.eval.every = 20
  c.eval.batch_prompts = 200
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 16
  c.rollout.completion_length = 4
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 3e-4
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 3
  return c
