"""Runs in an environment worker process: holds environments and calls them. `workers.py` starts it.

`Session` is the part that calls environments, in a worker process or in the run's own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from grpo_jax.environments import isolation
from grpo_jax.environments.base import (
  Environment,
  EnvironmentFault,
  Key,
  Outcome,
  Step,
  checked_observation,
  checked_reward,
  checked_step,
  failed,
)
from grpo_jax.environments.time_limit import OutOfTime, call_within
from grpo_jax.tasks.base import Example, Prompt, Task
from grpo_jax.tasks.rewards.worker_process import (
  GRACE,
  START_SECONDS,
  receive,
  start_receiving,
)

CLOSE_SECONDS = 1.0  # longest time limit of `close`
Answer: TypeAlias = Outcome | Prompt | None
HINT = (
  "\nEnvironments in isolated workers have no network, cannot write files and cannot start "
  "programs. If this one needs that, set rewards.isolate=false"
)


@dataclass(frozen=True)
class Job:
  """Asks for one call of an environment.

  Attributes:
    key: of the episode.
    kind: "reset", "step", "finish", or "restore", which resets and replays `texts`.
    example, seed: for "reset" and "restore".
    texts: the text of the turn, or of all turns so far.
    answers: for "restore", what the environment answered before: the prompt and the outcomes.
  """

  key: Key
  kind: str
  example: Example | None = None
  seed: int = 0
  texts: tuple[str, ...] = ()
  answers: tuple[Any, ...] = ()

  @property
  def calls(self) -> int:
    """Returns the number of calls of the environment that have a time limit each."""
    return len(self.texts) + {"step": 0, "finish": 1, "reset": 2, "restore": 2}[self.kind]


class Session:
  """Holds the environments of some episodes and runs jobs on them. Never raises for one of them.

  Args:
    make: factory of environments.
    timeout: time limit of one call, in seconds; None: no limit.
    isolated: explain refused operations by the isolation of the process.
  """

  def __init__(
    self, make: Callable[[], Environment], timeout: float | None, isolated: bool = False
  ) -> None:
    self._make, self._timeout, self._isolated = make, timeout, isolated
    self._environments: dict[Key, Environment] = {}

  def run(self, job: Job) -> Answer:
    """Returns the prompt of a reset, the outcome of another job, and an outcome of any failure."""
    run = {"reset": self._reset, "step": self._step, "finish": self._finish}
    try:
      answer = self._restore(job) if job.kind == "restore" else run[job.kind](job)
    except EnvironmentFault as error:
      answer = failed(f"{error}")
    except Exception as error:  # from what an answer is made of, such as a strange number
      answer = failed(
        f"{job.kind} gave something that raised {type(error).__name__}: {error}"[:500]
      )
    if isinstance(answer, Outcome) and answer.done:
      self._close(job.key)
    return answer

  def close(self) -> None:
    """Closes all environments."""
    for key in [*self._environments]:
      self._close(key)

  def _reset(self, job: Job) -> Prompt | None:
    environment = self._call("constructor", self._make)
    for method in ("reset", "step"):
      if not callable(getattr(environment, method, None)):
        raise EnvironmentFault(f"class {type(environment).__name__!r} has no method {method}")
    self._environments[job.key] = environment
    arguments = [job.example, job.seed][: _positions(environment.reset)]
    prompt = self._call("reset", environment.reset, *arguments)
    if prompt is None:
      return None
    prompt = checked_observation(prompt, "reset returned the prompt")
    if not prompt:
      raise EnvironmentFault("reset returned an empty prompt; None stands for the example's own")
    return prompt

  def _restore(self, job: Job) -> Outcome:
    turns = (replace(job, texts=(text,)) for text in job.texts)
    answers = [self._reset(job), *map(self._step, turns)]
    if answers != list(job.answers):
      raise EnvironmentFault(
        "process ended, and played again it did not answer the same: given the example, the seed "
        "and the texts, it must not vary"
      )
    return Outcome("", None, False)

  def _step(self, job: Job) -> Outcome:
    step = checked_step(self._call("step", self._environment(job).step, job.texts[0]))
    return Outcome(step.observation, step.reward, step.done, None, step.metrics)

  def _finish(self, job: Job) -> Outcome:
    finish = getattr(self._environment(job), "finish", None)
    reward = None if finish is None else checked_reward(self._call("finish", finish), "finish")
    return Outcome("", reward, True)

  def _environment(self, job: Job) -> Environment:
    if job.key not in self._environments:
      raise EnvironmentFault("state could not be restored")
    return self._environments[job.key]

  def _close(self, key: Key) -> None:
    environment = self._environments.pop(key, None)
    close = getattr(environment, "close", None)
    if close is not None:
      limit = None if self._timeout is None else min(self._timeout, CLOSE_SECONDS)
      with contextlib.suppress(Exception, SystemExit, OutOfTime):
        call_within(limit, close)

  def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a method under the time limit; whatever goes wrong is an `EnvironmentFault`."""
    try:
      return call_within(self._timeout, function, *arguments)
    except OutOfTime:
      raise EnvironmentFault(f"{name} took more than {self._timeout:g} s") from None
    except EnvironmentFault as error:
      raise EnvironmentFault(f"{name}: {error}") from error
    except (Exception, SystemExit, GeneratorExit) as error:
      hint = HINT if self._isolated and isinstance(error, PermissionError) else ""
      message = f"{error}"[:500]
      raise EnvironmentFault(f"{name} raised {type(error).__name__}: {message}{hint}") from error


def _positions(reset: Callable[..., Any]) -> int:
  """Returns 1 for a `reset` that takes an example and no seed, else 2."""
  try:
    inspect.signature(reset).bind(None, 0)
  except TypeError:
    return 1
  except ValueError:  # some callables written in C have no signature to inspect
    pass
  return 2


# --- the process ----------------------------------------------------------------------------------


def serve(connection: Connection) -> None:
  """Builds a task and runs its environments until the parent process is gone.

  The first message is the pickled (factory of the task, time limit in seconds, whether to isolate).
  It is answered by ("ready", layers), or by ("raised", message). Every further message is a pickled
  list of jobs. Each is answered by ("at", key) when it begins and ("done", [key, kind, value]) when
  it has ended. An empty list closes all environments.

  Answers are JSON, never pickles: text of a model has been in this process.
  """
  os.set_inheritable(connection.fileno(), False)

  def answer(kind: str, value: Any) -> None:
    connection.send_bytes(json.dumps([kind, value]).encode())

  with open(os.devnull, "w") as devnull:
    # Ends a process whose parent is gone and whose task is never built.
    faulthandler.dump_traceback_later(START_SECONDS + GRACE, exit=True, file=devnull)
    try:
      make, timeout, isolate = pickle.loads(receive(connection))
      session = _build(make(), timeout, isolate, answer)
    except Exception as error:
      answer("raised", f"{type(error).__name__}: {error}")
      return
    faulthandler.cancel_dump_traceback_later()
    inbox = start_receiving(connection)
    while True:
      jobs: Sequence[Job] = pickle.loads(inbox.get())
      for job in jobs:
        answer("at", list(job.key))
        # Ends a process whose parent is gone and whose job never releases the GIL.
        faulthandler.dump_traceback_later(job.calls * timeout + GRACE, exit=True, file=devnull)
        value = session.run(job)
        faulthandler.cancel_dump_traceback_later()
        kind = "outcome" if isinstance(value, Outcome) else "prompt"
        answer("done", [list(job.key), kind, as_json(value)])
      if not jobs:
        session.close()


def _build(
  task: Task, timeout: float, isolate: bool, answer: Callable[[str, Any], None]
) -> Session:
  if task.environment is None:
    raise ValueError(f"task {task.name!r} has no environment")
  prepare = getattr(task.environment, "prepare", None)
  if prepare is not None:
    prepare()
  layers = isolation.confine() if isolate else []
  answer("ready", layers)
  return Session(task.environment, timeout, isolated=bool(layers))


def as_json(value: Answer) -> Any:
  """Returns an outcome as a list; a prompt stays."""
  if isinstance(value, Outcome):
    metrics = dict(value.metrics)
    return [value.observation, value.reward, value.done, value.failure, metrics]
  return value


def from_json(kind: str, value: Any) -> Answer:
  """Returns what `as_json` was given, checked.

  Raises:
    ValueError, TypeError, EnvironmentFault: it is something else.

  Example:
    >>> from_json("outcome", as_json(failed("step raised KeyError: 3"))).failure
    'step raised KeyError: 3'
  """
  if kind == "prompt":
    return None if value is None else checked_observation(value, "the prompt")
  if kind != "outcome":
    raise ValueError(f"an answer of kind {kind!r}")
  observation, reward, done, failure, metrics = value
  if failure is not None:
    return failed(f"{failure}")
  step = checked_step(Step(observation, reward, done, metrics))
  return Outcome(step.observation, step.reward, step.done, None, step.metrics)
