"""Reward functions in processes of their own, so that one that hangs or dies costs one reward.

The processes are started anew, not forked, and never import jax. Each builds the task for itself,
so reward functions may be anything, closures too.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from grpo_jax.tasks.base import Prompt, RewardFunction, Task
from grpo_jax.tasks.rewards.scoring import RewardError, check_batch, score, shown, weighted_sum
from grpo_jax.tasks.rewards.worker_process import START, score_task

START_SECONDS = 600.0  # a worker that has not built the task by then will not
REMEDY = (
  "Name reward functions as 'path/to/file.py:function', or have them called in this process: "
  "rewards.workers=0"
)
Rewards = Mapping[str, tuple[RewardFunction, float]]
Unit = tuple[slice, slice]  # of prompts, and of the completions of each


@dataclass(frozen=True)
class Scores:
  """What completions earned.

  Attributes:
    total: weighted sum of the rewards, [P, G]; NaN = not scored.
    per_name: rewards of each function, [P, G]; NaN where it does not apply.
    accuracy: [P, G], 1.0 where right by the task's strict rule.
    missing: completions on which a function hung or died. Everything is NaN for them.
  """

  total: Float[np.ndarray, "P G"]
  per_name: dict[str, Float[np.ndarray, "P G"]]
  accuracy: Float[np.ndarray, "P G"]
  missing: int


class Scorer(Protocol):
  """A task's rewards as one call.

  Arguments are those of `base.score`. With `rewards=False` only the accuracy is computed, `total`
  is NaN and `per_name` empty.
  """

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[Any]],
    lengths: Sequence[Sequence[int]] | None = None,
    *,
    rewards: bool = True,
  ) -> Scores: ...


def score_in_process(task: Task) -> Scorer:
  """The scorer that calls a task's functions here, without a limit of time: for notebooks."""

  def scorer(prompts, completions, columns, lengths=None, *, rewards=True) -> Scores:
    values, accuracy = score_task(task, rewards, prompts, completions, columns, lengths)
    weights = {name: weight for name, (_, weight) in task.rewards.items()}
    total = weighted_sum(values, weights) if rewards else np.full(accuracy.shape, np.nan)
    return Scores(total, values, accuracy, 0)

  return scorer


def score_with(reward: RewardFunction, accuracy: RewardFunction | None = None) -> Scorer:
  """Returns the scorer that calls one reward function in this process, without a time limit.

  Args:
    reward: `f(prompts, completions, **columns) -> list[float | None]`.
    accuracy: of the same form, 1.0 for a right answer; None takes the reward.

  Example:
    >>> def short(prompts, completions, **columns):
    ...   return [float(len(text) < 3) for text in completions]
    >>> score_with(short)(["5 - 9 ="], [["-4", "minus four"]], {}).total.tolist()
    [[1.0, 0.0]]
  """
  name = getattr(reward, "__name__", "reward")
  return score_in_process(Task(name, {}, {name: (reward, 1.0)}, accuracy or reward))


class RewardWorkers:
  """The scorer that calls a task's functions in worker processes, under a limit of time.

  One call gets the whole batch, as the functions expect. If it does not return in time, or its
  process dies, the prompts are scored one by one, all completions of one in a call; and the
  completions of a prompt that fails again one by one. A completion that fails alone is missing, and
  a warning shows it. A function that raises, or returns what is not a list of numbers, stops the
  run: RewardError.

  Args:
    make: gives the task; called in every worker, so it has to be picklable, as
      `functools.partial(make_task, name, **settings)` is.
    workers: processes. One scores a batch; several look for completions that fail faster.
    timeout: seconds that a call of all functions may take, on however many completions.
    here: further rewards, name -> (function, weight), called in this process: those that need its
      device. There is no limit of time for them.

  Use it as a context manager, or call `close`. The processes also end with this one, however it
  ends.
  """

  def __init__(
    self,
    make: Callable[[], Task],
    workers: int = 1,
    timeout: float = 30.0,
    *,
    here: Rewards | None = None,
  ) -> None:
    if workers < 1 or not 0 < timeout < math.inf:
      raise ValueError(f"workers is {workers} and timeout {timeout}: need at least 1, and seconds")
    try:
      pickled = pickle.dumps(make)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
      raise ValueError(f"the task cannot be built in another process: {error}. {REMEDY}") from error
    self._timeout = timeout
    self._here = dict(here or {})
    self._whole = True  # whether whole batches have been quick enough so far
    self._workers = [_Worker(pickled) for _ in range(workers)]
    for worker in self._workers:
      worker.start()

  def __enter__(self) -> RewardWorkers:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the processes; a later call starts new ones."""
    for worker in self._workers:
      worker.kill()

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[Any]],
    lengths: Sequence[Sequence[int]] | None = None,
    *,
    rewards: bool = True,
  ) -> Scores:
    shape = check_batch(prompts, completions, columns, lengths)

    def payload(unit: Unit) -> bytes:
      of, within = unit
      texts = [list(row)[within] for row in completions[of]]
      counts = None if lengths is None else [[int(n) for n in row][within] for row in lengths[of]]
      part = {name: values[of] for name, values in columns.items()}
      try:
        return pickle.dumps((self._timeout, rewards, list(prompts[of]), texts, part, counts))
      except Exception as error:
        raise RewardError(
          f"the columns {', '.join(columns)} cannot be sent to another process: {error}. Leave out "
          "what is not plain data, or have rewards called in this process: rewards.workers=0"
        ) from error

    try:
      done, missing = self._run(shape, payload, lambda p, g: shown(prompts[p], completions[p][g]))
    finally:
      for worker in self._workers:
        if worker.unit:  # an error or Ctrl-C came between
          worker.kill()
    weights, accuracy, values = self._weights(), np.full(shape, np.nan), {}
    for unit, (part, right) in done:
      accuracy[unit] = right
      for name, array in part.items():
        values.setdefault(name, np.full(shape, np.nan))[unit] = array
    if not rewards:
      return Scores(np.full(shape, np.nan), {}, accuracy, int(missing.sum()))
    values = {name: values.get(name, np.full(shape, np.nan)) for name in weights}
    if self._here:
      values |= score(self._here, prompts, completions, columns, lengths)[1]
      weights |= {name: weight for name, (_, weight) in self._here.items()}
    total = np.where(missing, np.nan, weighted_sum(values, weights))
    return Scores(total, values, accuracy, int(missing.sum()))

  def _run(
    self, shape: tuple[int, int], payload: Callable[[Unit], bytes], show: Callable[[int, int], str]
  ) -> tuple[list[tuple[Unit, Any]], np.ndarray]:
    """Results of units that cover what is not missing, and which completions are, [P, G]."""
    whole = (slice(0, shape[0]), slice(0, shape[1]))
    pending = deque([whole] if self._whole else _parts(whole) or [whole])
    done: list[tuple[Unit, Any]] = []
    missing, slow = np.zeros(shape, bool), False
    while pending or any(worker.unit for worker in self._workers):
      for worker in self._workers:
        if pending and worker.connection is None:
          worker.start()
        if pending and worker.idle:
          unit = pending.popleft()
          worker.give(unit, payload(unit), self._timeout)
      for worker, kind, value in _events([w for w in self._workers if w.connection and not w.idle]):
        unit, worker.unit = worker.unit, None
        if kind == "done":
          done.append((unit, value))
        elif kind == "raised":
          raise RewardError(value)
        else:  # too late, or dead
          calling = worker.calling
          worker.kill()
          slow |= unit == whole and kind == "late"
          parts = _parts(unit)
          pending.extend(parts)
          if not parts:
            missing[unit] = True
            why = f"took more than {self._timeout:g} s" if kind == "late" else f"ended its {value}"
            where = show(unit[0].start, unit[1].start)
            warnings.warn(
              f"no reward for a completion: {calling} {why}\n{where}", RuntimeWarning, stacklevel=3
            )
    if slow and not missing.any():
      self._whole = False
    return done, missing

  def _weights(self) -> dict[str, float]:
    return dict(next(worker.weights for worker in self._workers if worker.weights is not None))


def _parts(unit: Unit) -> list[Unit]:
  """The prompts of a unit; of one prompt its completions; of one completion nothing."""
  of, within = unit
  if of.stop - of.start > 1:
    return [(slice(p, p + 1), within) for p in range(of.start, of.stop)]
  if within.stop - within.start > 1:
    return [(of, slice(g, g + 1)) for g in range(within.start, within.stop)]
  return []


# --- the parent's side of a worker ----------------------------------------------------------------


class _Worker:
  """A process: none, starting (it builds the task), idle, or busy with a unit."""

  def __init__(self, make: bytes) -> None:
    self._make = make
    self.connection: Connection | None = None
    self.weights: dict[str, float] | None = None
    self.unit: Unit | None = None
    self.deadline = 0.0
    self.calling = ""  # what it called last
    self._ready = False

  @property
  def idle(self) -> bool:
    return self.connection is not None and self._ready and self.unit is None

  def start(self) -> None:
    self.connection, child = multiprocessing.Pipe()
    self.deadline, self._ready = time.monotonic() + START_SECONDS, False
    self._process = subprocess.Popen(
      [sys.executable, "-u", "-P", "-c", START, str(child.fileno())],
      pass_fds=[child.fileno()],
      stdin=subprocess.DEVNULL,
      start_new_session=True,  # Ctrl-C is for the parent; what a function starts dies with it
      env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a function that uses jax takes no accelerator
    )
    child.close()
    self._send(pickle.dumps(sys.path))
    self._send(self._make)

  def give(self, unit: Unit, payload: bytes, timeout: float) -> None:
    self.unit, self.deadline = unit, time.monotonic() + timeout
    self.calling = "a reward function"
    self._send(payload)

  def _send(self, payload: bytes) -> None:
    with contextlib.suppress(OSError):  # it has died, as the next receive will find
      self.connection.send_bytes(payload)

  def receive(self) -> tuple[str, Any]:
    """("done", values), ("raised", message), ("died", how); or ("", None), nothing to do."""
    try:
      kind, value = self.connection.recv()
    except (EOFError, OSError):
      kind, value = "died", f"process ({self._exit()})"
    if kind == "calling":
      self.calling = value
    elif kind == "ready":
      self.weights, self._ready = value, True
    elif not self._ready:
      self.kill()
      reason = value if kind == "raised" else f"it ended its {value}"
      raise RewardError(f"a reward worker could not build the task: {reason}. {REMEDY}")
    else:
      return kind, value
    return "", None

  def kill(self) -> None:
    if self.connection is None:
      return
    self.connection.close()
    self.connection, self.unit = None, None
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def _exit(self) -> str:
    """How the process ended, whose end of the connection is closed."""
    try:
      code = self._process.wait(timeout=1)
    except subprocess.TimeoutExpired:
      return "still there, but without its connection"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _events(workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, str, Any]]:
  """Waits for the first worker that is done or late; ("late", None) for the latter."""
  nearest = min(worker.deadline for worker in workers) - time.monotonic()
  ready = wait([worker.connection for worker in workers], timeout=max(nearest, 0.0))
  for worker in workers:
    if worker.connection in ready:
      kind, value = worker.receive()
      if kind:
        yield worker, kind, value
    elif time.monotonic() >= worker.deadline:
      if not worker.unit:
        raise RewardError(f"a reward worker did not build the task in {START_SECONDS:g} s")
      yield worker, "late", None
