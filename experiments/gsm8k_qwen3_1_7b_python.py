"""Trains Qwen3-1.7B on GSM8K with a Python tool: it writes programs and reads what they print.

The tool is described to the model by its chat template, which also marks its calls and the results.
A program runs in the sandbox, without network and files, for at most five seconds. An episode has
up to three calls; a turn without one is the answer.

Hardware  one GPU of 80 GB, or a v5e-16 or a v5p-8 (with --config.mesh.fsdp=-1 and
          --config.mesh.data=1), on machines where programs can be isolated (docs/sandbox.md)
Time      not measured
Result    not run at full size; the tests load it and run one step with a tiny model
Watch     `tools/calls` and `tools/failed` beside the accuracy: the first shows whether the model
          still calls, which the reward does not ask for, and the second should fall first
Command   python -m grpo_jax.train --config experiments/gsm8k_qwen3_1_7b_python.py --workdir runs/py

The model does not think before a turn (`enable_thinking`): a turn is short, and the program takes
the place of the thought. With thoughts, raise `episode.turn_length` and
`rollout.completion_length` to 2,048 and more.
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "Qwen/Qwen3-1.7B"
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.steps = 100
  c.task.name = "gsm8k"
  with c.unlocked():
    c.chat.arguments.enable_thinking = False
    c.task.settings.update(
      format="chat",
      answer="boxed",
      reward="math",
      tools=["python"],
      tool_settings={"format": "hermes", "max_calls": 3},
    )
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.prompt_length = 512  # the description of the tool is part of it
  c.rollout.overlong = "drop"
  c.rollout.completion_length = 1536
  c.rollout.mask_truncated = True
  c.episode.turns = 4  # three calls and the answer
  c.episode.turn_length = 512
  c.episode.observation_length = 256
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 1e-6
  c.optimizer.warmup_steps = 5
  c.train.micro_batch_tokens = 13_000  # one prompt and its 8 completions on a device at a time
  c.eval.every = 20
  c.eval.batch_prompts = 64
  c.rewards.workers = 4  # they run the programs
  return c
