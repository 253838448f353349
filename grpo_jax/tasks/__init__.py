"""Tasks by name. A new task is a new file here that returns a `Task`, and one row in `TASKS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grpo_jax.tasks.base import Example, RewardFunction, Task, unknown
from grpo_jax.tasks.countdown import countdown_task
from grpo_jax.tasks.gsm8k import gsm8k_task
from grpo_jax.tasks.letters import letters_task
from grpo_jax.tasks.reasoning_gym import reasoning_gym_task
from grpo_jax.tasks.rewards.scoring import RewardError, score
from grpo_jax.tasks.rewards.workers import score_in_process, score_with
from grpo_jax.tasks.table import table_task

__all__ = [
  "TASKS",
  "Example",
  "RewardError",
  "RewardFunction",
  "Task",
  "make_task",
  "score",
  "score_in_process",
  "score_with",
]

TASKS: dict[str, Callable[..., Task]] = {
  "reasoning_gym": reasoning_gym_task,
  "gsm8k": gsm8k_task,
  "countdown": countdown_task,
  "table": table_task,  # JSONL or Parquet, by the ending of the file's name
  "jsonl": table_task,
  "parquet": table_task,
  "letters": letters_task,
}


def make_task(name: str, **settings: Any) -> Task:
  """The task called `name`, built with its own settings.

  Raises ValueError for an unknown name or setting (listing the known ones) and for a setting that
  the task cannot do without.

  >>> make_task("reasoning_gym", dataset="chain_sun")
  Traceback (most recent call last):
  ValueError: unknown reasoning-gym dataset 'chain_sun': did you mean 'chain_sum'...
  """
  if name not in TASKS:
    raise unknown("task", name, TASKS)
  parameters = inspect.signature(TASKS[name]).parameters
  for setting in settings:
    if setting not in parameters:
      raise unknown(f"setting of task {name!r}", setting, parameters)
  for setting, parameter in parameters.items():
    if parameter.default is parameter.empty and setting not in settings:
      raise ValueError(f"task {name!r} needs the setting {setting!r}, which was not given")
  return TASKS[name](**settings)
