"""Teaches SmolLM2-135M to add two-digit numbers by on-policy distillation from the trained demo.

The policy is the untrained model of `smollm2_addition.py`, on the same problems. The teacher is
that experiment's trained model. The policy writes, the teacher says how probable each of its tokens
was, and no reward is used: the row `opd`.

Hardware  2 CPU cores, float32
Time      6 s a step on an AMD EPYC, 4.5 minutes with the evaluations
Result    the teacher had 0.905 on the 200 held-out sums (seed 0 of `smollm2_addition.py`, 40
          steps). The student: 0.285 before; 0.650, 0.625 and 0.655 after 30 steps with seeds 0, 1
          and 2, when it has sampled 23,300 tokens. GRPO from scratch has 0.670, 0.500 and
          0.560 after 21,400 tokens (standard errors 0.034). See docs/teachers.md
Command   python -m grpo_jax.train --config experiments/smollm2_addition.py --workdir runs/addition
            --config.steps=40
          python -m grpo_jax.export --workdir runs/addition --out runs/teacher
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
