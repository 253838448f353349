"""Defines a reward that runs the completion as code, for the tests of isolated workers.

Worker processes import this file, so it must not import jax.
"""

from grpo_jax.tasks.base import Example, Task


def run(prompts, completions, **columns):
  """Returns the number each completion evaluates to; what it raises comes out as it is."""
  return [float(eval(text)) for text in completions]  # what third-party scorers do


def task_with_canary():
  """Returns a task whose reward is 1.0 for "right"; a completion can replace what is right."""
  rights = ["right"]

  def reward(prompts, completions, **columns):
    for text in completions:
      if text.startswith("rights"):
        eval(text, {"rights": rights})
    return [float(text in rights) for text in completions]

  splits = {"train": [Example("p", {}, "p")]}
  return Task("hostile", splits, {"right": (reward, 1.0)}, reward, canary="banana")


def task():
  return Task(
    "hostile", {}, {"run": (run, 1.0)}, accuracy=lambda completions, **_: [0.0] * len(completions)
  )
