from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "random:tiny"
  c.steps = 4
  c.task.name = "letters"
  c.rollout.prompts_per_step = 4
  c.rollout.group_size = 4
  c.rollout.completion_length = 6
  c.rollout.max_refills = 1
  c.algorithm.name = "dr_grpo"
  c.optimizer.learning_rate = 3e-3
  c.optimizer.clip_norm = 1.0
  c.lora.rank = 2
  c.train.reduction = "ordered"
  c.train.slots = 4
  c.model.remat = "none"
  c.model.attention = "blocks"
  c.checkpoint.every = 2
  c.checkpoint.keep = 1
  c.eval.batch_prompts = 50
  return c
