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

from pathlib import Path

from grpo_jax.config import load


def get_config():
  c = load(str(Path(__file__).parent / "smollm2_addition.py")).copy_and_resolve_references()
  c.steps = 30
  c.teacher.source = "runs/teacher"
  c.eval.every = 5
  c.rollout.prompts_per_step = 16
  c.rollout.group_size = 4
  c.rollout.temperature = 1.0
  c.algorithm.name = "opd"
  return c
