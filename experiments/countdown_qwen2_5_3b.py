"""Trains Qwen2.5-3B on Countdown: reach a target number from three or four numbers.

Hardware  one GPU of 80 GB (with remat), or a v5e-16 / v5p-8 (with --config.mesh.fsdp=-1 and
          --config.mesh.data=1)
Time      not measured
Result    not run at full size; the tests load it and run one step with a tiny model
Target    about 0.60 of new problems solved, as nano-aha-moment reports for this recipe (64
          completions per step in groups of 4, learning rate 1e-6, KL 0.001) on one 80 GB GPU. 0.5B
          models fail at this task; from 1.5B on, models learn to search (TinyZero)
Command   python -m grpo_jax.train --config experiments/countdown_qwen2_5_3b.py --workdir runs/cd
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "Qwen/Qwen2.5-3B"
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.steps = 1000
  c.task.name = "countdown"
  with c.unlocked():
    c.task.settings.update(format="completion", train_size=50_000, eval_size=500)
  c.rollout.prompts_per_step = 16
  c.rollout.group_size = 4
  c.rollout.completion_length = 1024
  c.algorithm.name = "grpo"
  c.algorithm.beta = 0.001
  c.optimizer.learning_rate = 1e-6
  c.train.micro_batch_tokens = 4_500  # one prompt and its 4 completions on a device at a time
  c.eval.every = 100
  c.checkpoint.every = 100
  return c
