"""Environments and tools for tests, some of them hostile. Worker processes import this file.

It must not import jax. A turn is an order: the environment does what its text says.
"""

import ctypes
import os
import socket
import sys
import time

import numpy as np

from grpo_jax.environments.base import Step
from grpo_jax.tasks.base import Example, Task


class Obedient:
  """Counts its turns, and does what a text says."""

  def __init__(self):
    self.turns = 0

  def reset(self, example, seed):
    self.orders, self.seed = example.columns.get("orders", ""), seed
    if self.orders == "raise":
      raise KeyError("no such problem")
    if self.orders == "sleep":
      time.sleep(60)
    if self.orders == "differ":
      return f"prompt of {id(self)}"
    return f"{example.prompt} {seed}" if self.orders == "prompt" else None

  def step(self, text):
    self.turns += 1
    if text in ACTIONS:
      return ACTIONS[text]()
    if text.startswith("vary"):
      return f"{time.monotonic_ns()}", None, False
    return f"{text} {self.seed} {self.turns}", float(self.turns), text == "done"

  def finish(self):
    return 0.5


class Lengths:
  """Answers each turn by its length, which is also its reward; three characters end the episode."""

  def reset(self, example):
    pass

  def step(self, text):
    return f"<{len(text)}>", len(text) / 10, len(text) == 3


def swallow():
  """Hangs, and swallows the interruption of its time limit."""
  while True:
    try:
      time.sleep(60)
    except BaseException:
      continue


def hang_in_c():
  """Hangs where no signal handler of Python runs."""
  ctypes.PyDLL(None).sleep(60)


def connect():
  with socket.socket() as connection:
    connection.connect(("127.0.0.1", 9))


ACTIONS = {
  "raise": lambda: {}["missing"],
  "exit": lambda: sys.exit(3),
  "die": lambda: os._exit(3),
  "kill": lambda: os.kill(os.getpid(), 9),
  "sleep": lambda: time.sleep(60),
  "spin": lambda: [0 for _ in iter(int, 1)],
  "swallow": swallow,
  "hang in c": hang_in_c,
  "two": lambda: ("a", 1.0),
  "four": lambda: ("a", 1.0, False, {}),
  "none": lambda: None,
  "text reward": lambda: ("a", "1.0", False),
  "nan": lambda: ("a", float("nan"), False),
  "inf": lambda: ("a", float("inf"), False),
  "huge": lambda: ("a", 10**400, False),
  "done 1": lambda: ("a", 1.0, 1),
  "number": lambda: (3, 1.0, False),
  "bytes": lambda: (b"a", 1.0, False),
  "message": lambda: ({"role": "user", "content": "a"}, 1.0, False),
  "messages": lambda: ([{"role": "user", "content": "a"}], 1.0, False),
  "no role": lambda: ([{"content": "a"}], 1.0, False),
  "not plain": lambda: ([{"role": "user", "content": "a", "x": object()}], 1.0, False),
  "long": lambda: ("a" * 10_000_000, 1.0, False),
  "metrics": lambda: Step("a", None, False, {"x": "y"}),
  "list": lambda: ["a", 1.0, False],
  "array": lambda: ("a", np.float32(0.5), np.bool_(True)),
  "surrogate": lambda: ("a\ud800", 1.0, False),
  "secret": lambda: (f"{os.environ.get('SECRET')}", None, False),
  "connect": connect,
}


def task(error=""):
  """Returns a task with `Obedient` environments."""
  if error:
    raise ValueError(error)
  examples = [Example("p", {}, "p")]
  reward = lambda completions, **columns: [0.0] * len(completions)  # noqa: E731
  return Task(
    "obedient", {"train": examples, "eval": examples}, {"zero": (reward, 1.0)}, reward,
    environment=Obedient,
  )  # fmt: skip


def tool_task(tools=("python", "calculator")):
  """Returns a task with tools."""
  from grpo_jax.environments.tools import with_tools

  plain = task()
  return with_tools(Task(plain.name, plain.splits, plain.rewards, plain.accuracy), [*tools])
