"""Lists the tasks by name. A new task is a new file here that returns a `Task`, and a row below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_jax.tasks.base import Example, RewardFunction, Task, check_settings, unknown_name
from grpo_jax.tasks.code import code_task
from grpo_jax.tasks.countdown import countdown_task
from grpo_jax.tasks.gsm8k import gsm8k_task
from grpo_jax.tasks.guess_number import guess_number_task
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
  "table": table_task,  # JSONL or Parquet, by the file's extension
  "jsonl": table_task,
  "parquet": table_task,
  "letters": letters_task,
  "guess_number": guess_number_task,
  "code": code_task,
}


def make_task(name: str, **settings: Any) -> Task:
  """Builds the task called `name` with its own settings.

  Raises:
    ValueError: the task or a setting is unknown (the message lists the valid names), or a required
      setting is missing.

  Example:
    >>> make_task("reasoning_gym", dataset="chain_sun")
    Traceback (most recent call last):
    ValueError: unknown reasoning-gym dataset 'chain_sun': did you mean 'chain_sum'...
  """
  if name not in TASKS:
    raise unknown_name("task", name, TASKS)
  check_settings(f"task {name!r}", TASKS[name], settings)
  return TASKS[name](**settings)
