"""Trains Qwen2.5-1.5B-Instruct on GSM8K with LoRA.

Adapters of rank 32 are on every matrix of the layers.
The reference of the KL term is the base model without adapters, so there is no second copy.

Hardware  one GPU of 40 GB or more, or a v5e-8 (with --config.mesh.fsdp=8)
Time      not measured
Result    not run at full size; the tests load it and run one step with a tiny model
Target    0.779 on the test problems, as verl reports for GRPO with LoRA on this model
Command   python -m grpo_jax.train --config experiments/gsm8k_qwen2_5_1_5b_lora.py --workdir runs/l

Afterwards, `python -m grpo_jax.export --workdir runs/l --out my-model` writes the merged model.
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "Qwen/Qwen2.5-1.5B-Instruct"
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.lora.rank = 32
  c.lora.alpha = 64.0
  c.steps = 200
  c.task.name = "gsm8k"
  with c.unlocked():
    c.task.settings.update(format="chat", answer="boxed", reward="math")
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.prompt_length = 320
  c.rollout.overlong = "drop"
  c.rollout.completion_length = 512
  c.algorithm.name = "grpo"
  c.algorithm.beta = 0.001
  c.optimizer.learning_rate = 2e-5
  c.optimizer.warmup_steps = 10
  c.train.micro_batch_tokens = 4_500  # one prompt and its 8 completions on a device at a time
  c.eval.every = 50
  c.eval.batch_prompts = 64
  return c
