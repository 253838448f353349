"""Runs reward functions in worker processes, so that a hang or crash costs a single reward.

The processes are spawned, not forked, and never import jax. Each builds the task by itself, so
reward functions may be anything, including closures.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from jaxtyping import Bool

from grpo_jax.environments import child
from grpo_jax.tasks.base import Columns, Prompt, Rewards, Task
from grpo_jax.tasks.rewards.logs import Logs, TrainerState
from grpo_jax.tasks.rewards.scorer import (
  Errors,
  Scorer,
  Scores,
  Unit,
  UnitResult,
  call_units,
  joined,
  part_of,
  score_in_process,
  score_with,
  split,
  whole_of,
)
from grpo_jax.tasks.rewards.scoring import (
  RewardError,
  check_batch,
  score,
  show_completion,
  weighted_sum,
)
from grpo_jax.tasks.rewards.worker_process import START_SECONDS

__all__ = ["RewardWorkers", "Scorer", "Scores", "score_in_process", "score_with"]

MESSAGE_BYTES = 2**28  # longest message of a worker
REMEDY = (
  "Name reward functions as 'path/to/file.py:function', or have them called in this process: "
  "rewards.workers=0"
)


class RewardWorkers:
  """A scorer that calls a task's functions in worker processes, under a time limit.

  A call gets the whole batch, as reward functions expect. If it exceeds the time limit or its
  process crashes, the prompts are scored one by one, with all completions of a prompt in one call.
  The completions of a prompt that fails again are scored one by one. A completion that fails alone
  is missing, and a warning shows it. A function that raises, or does not return a list of numbers,
  stops the run with a RewardError. With `on_error="skip"` it costs rewards instead, in the same
  way; after `MOST_IN_A_ROW` such errors in a row the rest of the batch is not tried.

  Use it as a context manager, or call `close`. The worker processes also end with this process,
  however it ends.

  Args:
    make: returns the task. It is called in every worker and therefore has to be picklable, as
      `functools.partial(make_task, name, **settings)` is.
    workers: number of processes. One scores a batch; more find failing completions faster.
    timeout: time limit in seconds for one call of all functions, on any number of completions.
    here: further rewards, name -> (function, weight), that are called in this process because they
      need its device. They have no time limit.
    isolate: take network, writing, starting programs and the environment away from the workers
      once they have built the task. A machine that cannot do it gets a warning.
    on_error: "raise", or "skip": completions on which a function raises have no reward.

  Raises:
    ValueError: an argument is out of range, or `make` cannot be pickled.
  """

  def __init__(
    self,
    make: Callable[[], Task],
    workers: int = 1,
    timeout: float = 30.0,
    *,
    here: Rewards | None = None,
    isolate: bool = True,
    on_error: str = "raise",
  ) -> None:
    Errors((0, 0), on_error)  # checks the name
    check_limits(workers, timeout)
    pickled = pickled_settings((make, isolate), REMEDY)
    self._timeout = timeout
    self._here, self._on_error = dict(here or {}), on_error
    self._whole_batches = True  # False once a batch was too slow as a whole
    self._workers = [WorkerProcess(pickled, isolate) for _ in range(workers)]
    for worker in self._workers:
      worker.start()

  def __enter__(self) -> RewardWorkers:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the processes. A later call starts new ones."""
    for worker in self._workers:
      worker.kill()

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    columns: Columns,
    lengths: Sequence[Sequence[int]] | None = None,
    *,
    ids: Sequence[Sequence[Sequence[int]]] | None = None,
    state: TrainerState | None = None,
    rewards: bool = True,
  ) -> Scores:
    shape = check_batch(prompts, completions, columns, lengths, ids)
    batch = (prompts, completions, columns, lengths, ids)

    def payload(unit: Unit) -> bytes:
      try:
        return pickle.dumps((self._timeout, rewards, *part_of(batch, unit), state))
      except Exception as error:
        raise RewardError(
          f"the columns {', '.join(columns)} cannot be sent to another process: {error}. Leave out "
          "what is not plain data, or have rewards called in this process: rewards.workers=0"
        ) from error

    def show(p: int, g: int) -> str:
      return show_completion(prompts[p], completions[p][g])

    errors = Errors(shape, self._on_error)
    try:
      results, missing = self._score_units(shape, payload, show, errors)
    finally:
      for worker in self._workers:
        if worker.unit:  # interrupted by an error or Ctrl-C
          worker.kill()
    if not rewards or not self._here:
      errors.warn()
      return joined(results, self._weights() if rewards else {}, shape, errors, missing)

    def call_here(unit: Unit) -> UnitResult:
      prompts, completions, columns, lengths, ids = part_of(batch, unit)
      values = score(self._here, prompts, completions, columns, lengths, ids=ids, state=state)[1]
      of_unit = next(iter(values.values())).shape
      return values, np.full(of_unit, np.nan), Logs(math.prod(of_unit))

    errors.in_a_row = 0
    own = call_units(call_here, shape, errors)
    errors.warn()
    scores = joined(results, self._weights(), shape, errors, missing)
    weights = {name: weight for name, (_, weight) in self._here.items()}
    values = scores.per_name | joined(own, weights, shape, errors).per_name
    total = weighted_sum(values, self._weights() | weights)
    total = np.where(missing | errors.raised, np.nan, total)
    return replace(scores, total=total, per_name=values)

  def _score_units(
    self,
    shape: tuple[int, int],
    payload: Callable[[Unit], bytes],
    show: Callable[[int, int], str],
    errors: Errors,
  ) -> tuple[list[tuple[Unit, UnitResult]], Bool[np.ndarray, "P G"]]:
    """Returns the results of units that cover the batch, and the mask of missing completions."""
    whole = whole_of(shape)
    pending = deque([whole] if self._whole_batches else split(whole) or [whole])
    results: list[tuple[Unit, UnitResult]] = []
    missing, too_slow = np.zeros(shape, bool), False
    while pending or any(worker.unit for worker in self._workers):
      if errors.gives_up(pending) and not any(worker.unit for worker in self._workers):
        break
      for worker in self._workers:
        if pending and worker.connection is None:
          worker.start()
        if pending and worker.idle:
          unit = pending.popleft()
          worker.assign(unit, payload(unit), self._timeout)
      for worker, kind, value in _events([w for w in self._workers if w.connection and not w.idle]):
        unit, worker.unit = worker.unit, None
        if kind == "done":
          errors.in_a_row = 0
          results.append((unit, value))
        elif kind == "raised":
          pending.extend(errors.handle(unit, RewardError(value)))
        elif kind == "broken":
          raise RewardError(value)
        else:  # "late" or "died"
          called = worker.called
          worker.kill()
          too_slow |= unit == whole and kind == "late"
          parts = split(unit)
          pending.extend(parts)
          if not parts:
            missing[unit] = True
            why = f"took more than {self._timeout:g} s" if kind == "late" else f"ended its {value}"
            where = show(unit[0].start, unit[1].start)
            warnings.warn(
              f"no reward for a completion: {called} {why}\n{where}", RuntimeWarning, stacklevel=3
            )
    if too_slow and not missing.any():
      self._whole_batches = False
    return results, missing

  def _weights(self) -> dict[str, float]:
    return dict(next(worker.weights for worker in self._workers if worker.weights is not None))


def check_limits(workers: int, timeout: float) -> None:
  """Raises ValueError for a number of workers or a time limit in seconds that is out of range."""
  if workers < 1 or not 0 < timeout < math.inf:
    raise ValueError(
      f"workers is {workers} and timeout {timeout}: need at least 1, and a positive number of "
      "seconds"
    )


def pickled_settings(settings: tuple[Any, ...], remedy: str) -> bytes:
  """Returns the first message to a worker: the factory of the task, and further settings.

  Raises:
    ValueError: they cannot be pickled; the message ends with the remedy.
  """
  try:
    return pickle.dumps(settings)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise ValueError(f"the task cannot be built in another process: {error}. {remedy}") from error


# --- the parent's side of a worker ----------------------------------------------------------------


class WorkerProcess:
  """Controls a worker process: absent, starting (it builds the task), idle, or busy with a unit."""

  module = "grpo_jax.tasks.rewards.worker_process"  # which the process serves

  def __init__(self, make: bytes, isolate: bool) -> None:
    self._make, self._isolate = make, isolate
    self.connection: Connection | None = None
    self.weights: Mapping[str, float] | None = None
    self.unit: Unit | None = None
    self.deadline = 0.0
    self.called = ""  # the function it called last
    self._logs = Logs(0)
    self._ready = False

  @property
  def idle(self) -> bool:
    """Tells whether it has built the task and waits for a unit."""
    return self.connection is not None and self._ready and self.unit is None

  def start(self) -> None:
    """Starts the process and has it build the task."""
    self.deadline, self._ready = time.monotonic() + START_SECONDS, False
    self._process, self.connection = child.start(self.module, _environment(self._isolate))
    self._send(self._make)

  def assign(self, unit: Unit, payload: bytes, timeout: float) -> None:
    """Sends a unit to an idle worker."""
    self.unit, self.deadline = unit, time.monotonic() + timeout
    self.called = "a reward function"
    self._logs = Logs(math.prod(part.stop - part.start for part in unit))
    self._send(payload)

  def _send(self, payload: bytes) -> None:
    with contextlib.suppress(OSError):  # the process has died, as the next `receive` reports
      self.connection.send_bytes(payload)

  def receive(self) -> tuple[str, Any]:
    """Returns ("done", result), ("raised", message) or ("died", reason); ("", None): no event."""
    try:
      kind, value = _message(self.connection.recv_bytes(MESSAGE_BYTES), self.unit)
      if kind == "done" and value[0] and self._ready and value[0].keys() != self.weights.keys():
        raise ValueError(f"the rewards {', '.join(value[0])[:80]}")
    except (EOFError, OSError):
      kind, value = "died", f"process ({self._exit_reason()})"
    except (
      ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
      self.kill()
      raise RewardError(
        f"a reward worker sent something else than rewards ({error}): a completion has changed it"
      ) from error
    if kind == "calling":
      self.called = value
    elif kind == "logged":
      self._logs = value
    elif kind == "ready":
      (self.weights, layers), self._ready = value, True
      if self._isolate and "landlock" not in layers:
        warnings.warn(
          "reward functions are not isolated on this machine: its kernel has no Landlock",
          RuntimeWarning, stacklevel=2,
        )  # fmt: skip
    elif not self._ready:
      self.kill()
      reason = value if kind in ("raised", "broken") else f"it ended its {value}"
      raise RewardError(f"a reward worker could not build the task: {reason}. {REMEDY}")
    else:
      return kind, (*value, self._logs) if kind == "done" else value
    return "", None

  def kill(self) -> None:
    """Ends the process and everything it started; does nothing if there is none."""
    if self.connection is None:
      return
    connection, self.connection, self.unit = self.connection, None, None
    child.end(self._process, connection)

  def _exit_reason(self) -> str:
    """Returns how a process ended that has closed its end of the connection."""
    try:
      code = self._process.wait(timeout=1)
    except subprocess.TimeoutExpired:
      return "still running, but without its connection"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _environment(isolate: bool) -> dict[str, str]:
  """Returns the environment of a worker; an isolated one sees no keys and no tokens."""
  # A function that uses jax gets no accelerator.
  return (child.plain_environment() if isolate else dict(os.environ)) | {"JAX_PLATFORMS": "cpu"}


def _message(payload: bytes, unit: Unit | None) -> tuple[str, Any]:
  """Returns the (kind, value) of a message; everything in it is checked.

  Raises:
    ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError: it is not a
      message of a worker.
  """
  kind, value = json.loads(payload)
  if kind == "done":
    rewards, accuracy = value
    shape = tuple(part.stop - part.start for part in unit)
    arrays = {str(name): np.array(rows, np.float64) for name, rows in rewards.items()}
    # `reshape` raises for any other size; of size 0, the nested lists do not say the shape.
    arrays = {name: array.reshape(shape) for name, array in arrays.items()}
    return kind, (arrays, np.array(accuracy, np.float64).reshape(shape))
  if kind == "logged":
    return kind, _logs(*value, unit)
  if kind == "ready":
    weights, layers = value
    return kind, ({str(name): float(weight) for name, weight in weights.items()}, list(layers))
  if kind not in ("calling", "raised", "broken") or not isinstance(value, str):
    raise ValueError(f"the message {payload[:80]!r}")
  return kind, value


def _logs(extras: Any, metrics: Any, unit: Unit) -> Logs:
  """Returns what a worker says its functions logged, checked like all that a worker sends."""
  logs = Logs(math.prod(part.stop - part.start for part in unit))
  columns = dict.fromkeys(name for row in extras for name in row)
  for name in columns:
    logs.log_extra(name, [row.get(name) for row in extras])
  for name, value, _ in metrics:
    logs.log_metric(name, value)
  return logs


def _events(workers: Sequence[WorkerProcess]) -> Iterator[tuple[WorkerProcess, str, Any]]:
  """Waits for the first worker with an event; ("late", None) is that of a passed deadline."""
  seconds = min(worker.deadline for worker in workers) - time.monotonic()
  ready = wait([worker.connection for worker in workers], timeout=max(seconds, 0.0))
  for worker in workers:
    if worker.connection in ready:
      kind, value = worker.receive()
      if kind:
        yield worker, kind, value
    elif time.monotonic() >= worker.deadline:
      if not worker.unit:
        raise RewardError(f"a reward worker did not build the task in {START_SECONDS:g} s")
      yield worker, "late", None
