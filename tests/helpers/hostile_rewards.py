"""Defines a reward that runs the completion as code, for the tests of isolated workers.

Worker processes import this file, so it must not import jax.
"""

from grpo_jax.tasks.base import Task


def run(prompts, completions, **columns):
  """Returns the number each completion evaluates to; what it raises comes out as it is."""
  return [float(eval(text)) for text in completions]  # what third-party scorers do


def task():
  return Task(
    "hostile", {}, {"run": (run, 1.0)}, accuracy=lambda completions, **_: [0.0] * len(completions)
  )
