"""Trains Qwen2.5-0.5B-Instruct on GSM8K with DAPO's loss and dynamic sampling.

Hardware  one GPU of 40 GB or more, or a v5e-8 (with --config.mesh.fsdp=8)
Time      not measured
Result    not run at full size; the tests load it and run one step with a tiny model
Target    greedy accuracy of at least 0.55 on the 1,319 test problems after 250 steps, from 0.496
          before. The end-to-end test of miles asks for this with the same recipe (batch 32 x 8,
          learning rate 1e-6, clip 0.2 / 0.28, 1,024 tokens). verl reports 0.567 with PPO
Command   python -m grpo_jax.train --config experiments/gsm8k_qwen2_5_0_5b.py --workdir runs/gsm8k

Without a network, --config.task.settings.jsonl=DIR is the folder with GSM8K's train.jsonl and
test.jsonl, and --config.model.source=DIR is the folder of the model.
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "Qwen/Qwen2.5-0.5B-Instruct"
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.steps = 250
  c.task.name = "gsm8k"
  with c.unlocked():
    c.task.settings.update(format="chat", answer="boxed", reward="math")
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.prompt_length = 320
  c.rollout.overlong = "drop"
  c.rollout.completion_length = 1024
  c.rollout.max_resamples = 3
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup_steps = 10
  c.train.micro_batch_tokens = 9_000  # one prompt and its 8 completions on a device at a time
  c.eval.every = 50
  c.eval.batch_prompts = 64
  return c
