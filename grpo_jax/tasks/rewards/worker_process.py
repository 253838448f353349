"""What a reward worker does; see `workers.py`, which starts it."""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import Float

from grpo_jax.tasks.base import Prompt, RewardFunction, Task
from grpo_jax.tasks.rewards.scoring import RewardError, score

# `import grpo_jax` imports jax, which takes a second and much memory. So the package stands there
# without its contents until a reward function asks for one of its names.
START = """
import importlib.util, pickle, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = pickle.loads(connection.recv_bytes())
spec = importlib.util.find_spec("grpo_jax")
package = importlib.util.module_from_spec(spec)
def load(name):
  if name.startswith("__"):
    raise AttributeError(name)
  del package.__getattr__
  spec.loader.exec_module(package)
  return getattr(package, name)
package.__getattr__ = load
sys.modules["grpo_jax"] = package
from grpo_jax.tasks.rewards.worker_process import serve
serve(connection)
"""
GRACE = 10.0  # seconds


def serve(connection: Connection) -> None:
  """Builds the task that comes first and scores the batches that follow, until the parent is gone.

  Sends ("ready", weights), and for a batch ("calling", what) before each function and then ("done",
  what `score_task` gives). An error goes as ("raised", message).
  """
  os.set_inheritable(connection.fileno(), False)
  inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
  threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
  try:
    task = _announcing(pickle.loads(inbox.get())(), lambda what: connection.send(("calling", what)))
  except Exception as error:
    connection.send(("raised", f"{type(error).__name__}: {error}"))
    return
  connection.send(("ready", {name: weight for name, (_, weight) in task.rewards.items()}))
  with open(os.devnull, "w") as nowhere:
    while True:
      payload = inbox.get()
      try:
        timeout, *arguments = pickle.loads(payload)
        # The parent kills this process when its time is up. Where the parent is gone by then, and a
        # function never gives the thread that sees that a turn, this ends it: it needs no turn.
        faulthandler.dump_traceback_later(timeout + GRACE, exit=True, file=nowhere)
        answer = ("done", score_task(task, *arguments))
      except RewardError as error:
        answer = ("raised", str(error))
      except Exception as error:
        answer = ("raised", f"{type(error).__name__}: {error}")
      faulthandler.cancel_dump_traceback_later()
      connection.send(answer)


def score_task(
  task: Task,
  rewards: bool,
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Mapping[str, Sequence[Any]],
  lengths: Sequence[Sequence[int]] | None,
) -> tuple[dict[str, Float[np.ndarray, "P G"]], Float[np.ndarray, "P G"]]:
  """(rewards by name, accuracy), [P, G]; without `rewards` there are none of the first."""
  batch = (prompts, completions, columns, lengths)
  values = score(task.rewards, *batch)[1] if rewards else {}
  return values, score({"accuracy": (task.accuracy, 1.0)}, *batch)[1]["accuracy"]


def _receive(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
  try:
    while True:
      inbox.put(connection.recv_bytes())
  except (EOFError, OSError):
    os._exit(0)  # the parent is gone


def _announcing(task: Task, tell: Callable[[str], None]) -> Task:
  """The task with functions that say when they are called."""

  def telling(what: str, function: RewardFunction) -> RewardFunction:
    @functools.wraps(function)
    def call(*args: Any, **columns: Any) -> Any:
      tell(what)
      return function(*args, **columns)

    return call

  rewards = {
    name: (telling(f"reward function {name!r}", function), weight)
    for name, (function, weight) in task.rewards.items()
  }
  return replace(task, rewards=rewards, accuracy=telling("the accuracy", task.accuracy))
