"""Trains the mixture of experts that `sums_moe_base.py` pretrains, on the reward alone.

The problems are those that it was pretrained on, without their answers, and the 200 held-out sums
are the same: it has never seen them. The experts chosen while sampling are used again in the update
(`--config.train.routes=fresh` chooses them again). docs/models.md compares the two.

Hardware  2 CPU cores, float32
Time      1.4 minutes
Result    greedy accuracy on the 200 held-out sums: 0.250 before (standard error 0.031), and after
          120 steps 0.420, 0.405 and 0.455 on seeds 0, 1 and 2
Command   python -m grpo_jax.train --config experiments/sums_moe.py --workdir runs/sums
          (after the two commands of `sums_moe_base.py`; other seeds with --config.seed=1)
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "runs/sums-base-model"
  c.steps = 120
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
  c.optimizer.learning_rate = 2e-4
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 10
  return c
