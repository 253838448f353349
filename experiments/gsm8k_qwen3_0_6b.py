"""Qwen3-0.6B on GSM8K: sequence-level ratios (GSPO), two updates per rollout.

Hardware  one GPU of 80 GB, or a v5e-8 (then --config.mesh.fsdp=8)
Target    greedy accuracy on the test problems of at least 0.71 after 60 steps, what miles holds its
          end-to-end test to. Small models can also go down here (a careful public notebook lost ten
          points), so compare with the evaluation before training, which the run prints
State     a recipe: checked and stepped on a tiny model by the tests, not run at full size by us
Command   python -m grpo_jax.train --config experiments/gsm8k_qwen3_0_6b.py --workdir runs/qwen3
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "Qwen/Qwen3-0.6B"
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.steps = 60
  c.task.name = "gsm8k"
  with c.unlocked():
    c.task.settings.update(format="chat", answer="boxed", reward="math")
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.prompt_length = 320
  c.rollout.overlong = "drop"
  c.rollout.completion_length = 2048  # it thinks before it answers
  c.rollout.mask_truncated = True
  c.algorithm.name = "gspo"
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup_steps = 5
  c.train.mini_batches = 2
  c.train.micro_batches = 4
  c.eval.every = 20
  c.eval.batch_prompts = 64
  return c
