"""Defines reward functions that hang or crash on demand, for the tests of reward workers.

Worker processes import this file, so it must not import jax.
"""

import asyncio
import os
import re
import signal
import sys
import time

from grpo_jax.tasks.base import Task


def obey(prompts, completions, answer, log=None, **columns):
  """Returns 1.0 for the answer and otherwise 0.0, and obeys completions that are orders."""
  if log and log[0]:
    with open(log[0], "a") as file:
      file.write(f"{len(completions)}\n")
  for text in completions:
    if text == "sleep":
      time.sleep(3600)
    elif text == "loop":
      while True:
        pass
    elif text == "backtrack":
      re.match(r"(a+)+$", "a" * 60 + "b")
    elif text == "exit":
      os._exit(3)
    elif text == "system exit":
      sys.exit(4)
    elif text == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    elif text == "raise":
      raise RuntimeError("as ordered")
    elif text == "too few":
      return [0.0]
    elif text == "pause":
      time.sleep(0.3)
    elif text.startswith("beat "):
      while True:
        with open(text.removeprefix("beat "), "a") as file:
          file.write(".")
        time.sleep(0.02)
  return [float(text == a) for text, a in zip(completions, answer)]


async def letters(completions, **columns):
  await asyncio.sleep(0)
  return [len(text) if text else None for text in completions]


def tokens(completion_lengths, **columns):
  return completion_lengths


def together(completions, **columns):
  """Returns the number of completions of its call."""
  return [len(completions)] * len(completions)


def jax_is_loaded(completions, **columns):
  return ["jax" in sys.modules] * len(completions)


def task(error=""):
  """Builds the task from local functions, which cannot be pickled; raises if there is an error."""
  if error:
    raise ValueError(error)
  return Task(
    name="guarded",
    splits={},
    rewards={
      "obey": (lambda **columns: obey(**columns), 1.0),
      "letters": (letters, 10.0),
      "tokens": (tokens, 100.0),
      "together": (together, 0.0),
      "jax": (jax_is_loaded, 0.0),
    },
    accuracy=lambda completions, answer, **columns: [
      float(text == a) for text, a in zip(completions, answer)
    ],
  )


def beat_forever(path):
  """Runs a parent process whose worker never finishes."""
  from functools import partial

  from grpo_jax.tasks.rewards.workers import RewardWorkers

  workers = RewardWorkers(partial(task), timeout=3600.0, isolate=False)
  workers(["p"], [[f"beat {path}"]], {"answer": ["a"]}, [[1]])


if __name__ == "__main__":
  sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
  import guarded_rewards

  guarded_rewards.beat_forever(sys.argv[1])
