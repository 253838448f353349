"""Runs in a reward worker process: builds the task and scores batches. `workers.py` starts it."""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import os
import pickle
import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import Float

from grpo_jax.environments import isolation
from grpo_jax.tasks.base import Columns, Prompt, RewardFunction, Task
from grpo_jax.tasks.rewards.logs import Logs, TrainerState
from grpo_jax.tasks.rewards.scoring import RewardError, inner_function, score

START_SECONDS = 600.0  # time limit in seconds for building the task in a worker
GRACE = 10.0  # seconds after its time limit until a worker without a parent ends itself


def serve(connection: Connection) -> None:
  """Builds a task and scores batches until the parent process is gone.

  The first message is the pickled (factory of the task, whether to isolate). It is answered by
  ("ready", [weights, layers]). Every further message is a pickled (timeout in seconds, *arguments
  of `score_task`). It is answered by ("calling", function) before each call of a function, then by
  ("logged", [extras, metrics]), as in `logs.Logs`, if functions logged anything, and then by
  ("done", [rewards, accuracy]). The error of a function is answered by ("raised", message), and one
  that must end the run by ("broken", message).

  Answers are JSON, never pickles: text of a model has been in this process.
  """
  os.set_inheritable(connection.fileno(), False)

  def answer(kind: str, value: Any) -> None:
    connection.send_bytes(json.dumps([kind, value]).encode())

  with open(os.devnull, "w") as devnull:
    # Ends a process whose parent is gone and whose task is never built.
    faulthandler.dump_traceback_later(START_SECONDS + GRACE, exit=True, file=devnull)
    try:
      make, isolate = pickle.loads(receive(connection))
      task = _with_announcements(make(), lambda name: answer("calling", name))
      canary = _make_canary(task)
      layers = isolation.confine() if isolate else []
    except Exception as error:
      answer("raised", f"{type(error).__name__}: {error}")
      return
    faulthandler.cancel_dump_traceback_later()
    answer("ready", [{name: weight for name, (_, weight) in task.rewards.items()}, layers])
    inbox = start_receiving(connection)
    while True:
      payload = inbox.get()
      try:
        timeout, *arguments = pickle.loads(payload)
        # The parent kills this process at its time limit. If the parent is gone, the receiving
        # thread ends the process, unless a function never releases the GIL. This timer ends it
        # then: it does not need the GIL.
        faulthandler.dump_traceback_later(timeout + GRACE, exit=True, file=devnull)
        logs = Logs(sum(len(texts) for texts in arguments[2]))
        rewards, accuracy = score_task(task, *arguments, logs=logs)
        if logs.metrics or any(logs.extras):
          answer("logged", [logs.extras, logs.metrics])
        values = {name: array.tolist() for name, array in rewards.items()}
        reply = ("done", [values, accuracy.tolist()])
      except RewardError as error:
        reply = ("raised", f"{error}{_hint(error) if layers else ''}")
      except Exception as error:
        reply = ("raised", f"{type(error).__name__}: {error}")
      try:
        canary()
      except Exception as error:
        reply = ("broken", str(error))
      faulthandler.cancel_dump_traceback_later()
      answer(*reply)


def _make_canary(task: Task) -> Callable[[], None]:
  """Returns a check that the scorers still give a fixed wrong answer what they gave it at first.

  A scorer that evaluates completions can be changed by one of them.
  """
  examples = task.splits.get("train") or task.splits.get("eval") if task.canary else None
  if not examples:
    return lambda: None
  example = examples[0]
  columns = {name: [value] for name, value in example.columns.items()}

  def scores() -> list[tuple[str, float]]:
    rewards, accuracy = score_task(task, True, [example.prompt], [[task.canary]], columns, None)
    values = {**rewards, "accuracy": accuracy}
    return [(name, float(value[0, 0])) for name, value in values.items()]

  before = scores()

  def check() -> None:
    for (name, value), (_, now) in zip(before, scores()):
      if value != now and not (math.isnan(value) and math.isnan(now)):
        raise RewardError(
          f"the scorer {name!r} of task {task.name!r} was changed by a completion: it gives the "
          f"wrong answer {task.canary!r} {now:g} and gave it {value:g} at the start"
        )

  return check


def _hint(error: BaseException | None) -> str:
  """Returns what to do where isolation is the cause of an error."""
  while error is not None and not isinstance(error, PermissionError):
    error = error.__cause__
  if error is None:
    return ""
  return (
    "\nReward processes have no network, cannot write files and cannot start programs. If this "
    "reward needs that, set rewards.isolate=false"
  )


def score_task(
  task: Task,
  rewards: bool,
  prompts: Sequence[Prompt],
  completions: Sequence[Sequence[str]],
  columns: Columns,
  lengths: Sequence[Sequence[int]] | None,
  ids: Sequence[Sequence[Sequence[int]]] | None = None,
  state: TrainerState | None = None,
  *,
  logs: Logs | None = None,
) -> tuple[dict[str, Float[np.ndarray, "P G"]], Float[np.ndarray, "P G"]]:
  """Returns (rewards by name, accuracy), each [P, G].

  If the accuracy judges by one of the rewards, as by default, that function is called once.

  Args:
    task: the task.
    rewards: whether to compute the rewards; if not, the first result is empty.
    prompts: as in `scoring.score`, like all further arguments. What the accuracy function logs is
      dropped if the rewards are computed, as it is often one of them.

  Example:
    >>> from grpo_jax.tasks.letters import letters_task
    >>> rewards, accuracy = score_task(letters_task(), True, ["1:"], [["ab", "a1"]], {}, None)
    >>> rewards["letters"], accuracy
    (array([[1. , 0.5]]), array([[1., 0.]]))
  """
  batch = (prompts, completions, columns, lengths)
  options = {"ids": ids, "state": state}
  values = score(task.rewards, *batch, **options, logs=logs)[1] if rewards else {}
  name = _judging_reward(task)
  if name in values:
    is_reward = task.rewards[name][0] is task.accuracy
    return values, values[name] if is_reward else (values[name] == 1).astype(np.float64)
  name = getattr(inner_function(task.accuracy), "__name__", "accuracy")
  accuracy = {name: (task.accuracy, 1.0)}
  return values, score(accuracy, *batch, **options, logs=None if rewards else logs)[1][name]


def _judging_reward(task: Task) -> str | None:
  """Returns the name of the reward that the accuracy is, or that `ExactlyOne` judges by."""
  judge = getattr(task.accuracy, "function", task.accuracy)
  return next((name for name, (f, _) in task.rewards.items() if f is judge), None)


def receive(connection: Connection) -> bytes:
  """Returns the next message; ends the process when the parent is gone."""
  try:
    return connection.recv_bytes()
  except (EOFError, OSError):
    os._exit(0)


def start_receiving(connection: Connection) -> queue.SimpleQueue[bytes]:
  """Returns the inbox of a thread that receives messages; the process ends with its parent.

  Call it after `isolation.confine`, which holds for the calling thread and those it starts later:
  a text that replaces what the thread calls would otherwise run unconfined.
  """
  inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

  def receive_all() -> None:
    while True:
      inbox.put(receive(connection))

  threading.Thread(target=receive_all, daemon=True).start()
  return inbox


def _with_announcements(task: Task, announce: Callable[[str], None]) -> Task:
  """Returns the task with functions that announce each of their calls."""

  def announcing(name: str, function: RewardFunction) -> RewardFunction:
    @functools.wraps(function)
    def call(
      *args: Any, **columns: Any
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
      announce(name)
      return function(*args, **columns)

    return call

  rewards = {
    name: (announcing(f"reward function {name!r}", function), weight)
    for name, (function, weight) in task.rewards.items()
  }
  name = _judging_reward(task)
  if name is None:
    return replace(task, rewards=rewards, accuracy=announcing("the accuracy", task.accuracy))
  accuracy = rewards[name][0]
  if task.rewards[name][0] is not task.accuracy:
    accuracy = replace(task.accuracy, function=accuracy)
  return replace(task, rewards=rewards, accuracy=accuracy)
