"""Trains Qwen3-0.6B on GSM8K with sequence-level ratios (GSPO) and two updates per rollout.

Hardware  one GPU of 80 GB, or a v5e-8 (with --config.mesh.fsdp=8), or a v5e-16
Time      not measured
Result    not run at full size; the tests load it and run one step with a tiny model
Target    greedy accuracy of at least 0.71 on the test problems after 60 steps, as the end-to-end
          test of miles asks for. Small models can also lose accuracy here (ten points in a careful
          public notebook), so compare with the evaluation before training, which the run prints
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
  c.rollout.completion_length = 2048  # includes its reasoning before the answer
  c.rollout.mask_truncated = True
  c.algorithm.name = "gspo"
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup_steps = 5
  c.train.mini_batches = 2
  c.train.micro_batch_tokens = 17_000  # one prompt and its 8 completions on a device at a time
  c.eval.every = 20
  c.eval.batch_prompts = 64
  return c
