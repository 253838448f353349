"""Runs environments in worker processes, so that a hang or crash costs a single episode.

A worker holds many episodes, and a turn of all of them is one message. If a call exceeds its time
limit, a signal interrupts it and its episode is lost. If that does not help, or the process dies,
the episode of that call is lost with the process; the others are restored in a new process, by
playing their texts again.
"""

from __future__ import annotations

import json
import math
import pickle
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from grpo_jax.environments import worker_process
from grpo_jax.environments.base import (
  EnvironmentFault,
  EnvironmentRunner,
  Key,
  Outcome,
  failed,
)
from grpo_jax.environments.worker_process import Answer, Job, Session, from_json
from grpo_jax.tasks.base import Example, Prompt, Task
from grpo_jax.tasks.rewards.worker_process import START_SECONDS
from grpo_jax.tasks.rewards.workers import (
  MESSAGE_BYTES,
  WorkerProcess,
  check_limits,
  pickled_settings,
)

GRACE = 2.0  # seconds beyond its time limit that a call may take until its process is killed
PAUSE = 30.0  # longest time in seconds between two jobs of a worker, on a machine that is busy
REMEDY = (
  "Name environments and tools as 'path/to/file.py:name', or have them called in this process: "
  "rewards.workers=0"
)


class WorkerError(RuntimeError):
  """Reports that an environment worker could not be started."""


@dataclass
class _Episode:
  """Records what an environment was given and has answered, so that it can be played again.

  Attributes:
    place: how many episodes were begun before it. It chooses the worker.
    lost: why the environment failed; None while it has not.
  """

  example: Example
  seed: int
  place: int
  texts: list[str] = field(default_factory=list)
  answers: list[Answer] = field(default_factory=list)
  over: bool = False
  lost: str | None = None

  def record(self, job: Job, answer: Answer) -> None:
    """Takes the answer to a job."""
    if isinstance(answer, Outcome) and answer.done:
      self.over, self.lost = True, answer.failure
    elif job.kind != "restore":
      self.texts += job.texts
      self.answers.append(answer)


class _Runner:
  """Holds the part of both runners that does not depend on where environments are called."""

  def __init__(self) -> None:
    self._episodes: dict[Key, _Episode] = {}
    self._arrived: dict[Key, Answer] = {}  # answers that nobody has fetched
    self._begun = 0  # number of episodes

  def _post(self, jobs: Sequence[Job]) -> None:
    """Begins at most one job for each episode."""
    raise NotImplementedError

  def _fetch(self, timeout: float | None) -> None:
    """Waits for an answer, at most for `timeout` seconds, and takes those that are there."""
    raise NotImplementedError

  def _is_busy(self) -> bool:
    """Returns whether any job has no answer yet."""
    raise NotImplementedError

  def _clear(self) -> None:
    """Closes all environments."""
    raise NotImplementedError

  def _take(self, job: Job, answer: Answer) -> None:
    """Records the answer to a job."""
    episode = self._episodes[job.key]
    if episode.lost is not None:  # when it was restored: the reason of that is the reason
      answer = failed(episode.lost)
    episode.record(job, answer)
    if job.kind != "restore":
      self._arrived[job.key] = answer

  def reset(
    self, examples: Sequence[Example], group: int, seeds: Sequence[int]
  ) -> list[Prompt | None]:
    """See `EnvironmentRunner.reset`."""
    self._episodes, self._arrived, self._begun = {}, {}, 0
    self._clear()
    return self.begin(examples, group, seeds, range(len(examples)))

  def begin(
    self, examples: Sequence[Example], group: int, seeds: Sequence[int], numbers: Sequence[int]
  ) -> list[Prompt | None]:
    """See `EnvironmentRunner.begin`."""
    if len(seeds) != len(examples):
      raise ValueError(f"{len(examples)} examples but {len(seeds)} seeds: give one seed each")
    jobs = [
      Job((int(p), g), "reset", example, int(seed))
      for p, example, seed in zip(numbers, examples, seeds)
      for g in range(group)
    ]
    for job in jobs:
      self._episodes[job.key] = _Episode(job.example, job.seed, self._begun)
      self._begun += 1
    self._post(jobs)
    answers = self._await([job.key for job in jobs])
    return [_agreed(p, [answers[p, g] for g in range(group)]) for p in numbers]

  def forget(self, prompts: Collection[int]) -> None:
    """See `EnvironmentRunner.forget`."""
    for key in [key for key in self._episodes if key[0] in prompts]:
      del self._episodes[key]

  def submit(self, texts: Mapping[Key, str], finish: Collection[Key] = ()) -> None:
    """See `EnvironmentRunner.submit`."""
    jobs = []
    for key, text in texts.items():
      episode = self._episode(key)
      if episode.lost is not None:  # by `reset`, or with its process, which is told only now
        self._arrived[key] = failed(episode.lost)
      elif episode.over:
        raise ValueError(f"episode {key} is over: it takes no further text")
      else:
        jobs.append(Job(key, "step", texts=(text,)))
    for key in finish:
      if self._episode(key).over:
        self._arrived[key] = Outcome("", None, True)
      else:
        jobs.append(Job(key, "finish"))
    self._post(jobs)

  def answers(self, timeout: float | None = None) -> dict[Key, Outcome]:
    """See `EnvironmentRunner.answers`."""
    if not self._arrived and self._is_busy():
      self._fetch(timeout)
    arrived, self._arrived = self._arrived, {}
    return arrived

  def step(self, texts: Mapping[Key, str]) -> dict[Key, Outcome]:
    """Passes on the text of one turn of each of these episodes, and waits for all outcomes."""
    self.submit(texts)
    outcomes = self._await(texts)
    warn_of_failures(outcomes.values())
    return outcomes

  def finish(self, keys: Collection[Key]) -> dict[Key, float | None]:
    """Ends episodes that ran out of their budget; waits for the last reward of each."""
    self.submit({}, keys)
    outcomes = self._await(keys)
    warn_of_failures(outcomes.values())
    return {key: outcome.reward for key, outcome in outcomes.items()}

  def close(self) -> None:
    """Ends all episodes."""
    self._episodes, self._arrived = {}, {}
    self._clear()

  def _await(self, keys: Collection[Key]) -> dict[Key, Answer]:
    """Returns the answers to the jobs of these episodes, once all are there."""
    while not self._arrived.keys() >= set(keys):
      self._fetch(None)
    return {key: self._arrived.pop(key) for key in keys}

  def _episode(self, key: Key) -> _Episode:
    if key not in self._episodes:
      raise ValueError(f"there is no episode {key}: `reset` started {len(self._episodes)}")
    return self._episodes[key]

  def __enter__(self) -> EnvironmentRunner:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _agreed(p: int, answers: Sequence[Answer]) -> Prompt | None:
  """Returns the prompt of a group; EnvironmentFault if its episodes differ."""
  prompts = [answer for answer in answers if not isinstance(answer, Outcome)]
  for prompt in prompts:
    if prompt != prompts[0]:
      raise EnvironmentFault(
        f"reset returned different prompts for the group of prompt {p}: {prompts[0]!r:.200} and "
        f"{prompt!r:.200}. All completions of a group get the same example and the same seed, and "
        "must return the same prompt"
      )
  return prompts[0] if prompts else None


def warn_of_failures(outcomes: Collection[Outcome]) -> None:
  """Warns of the episodes that were lost, once for each reason."""
  reasons = [outcome.failure for outcome in outcomes if outcome.failure]
  for reason in dict.fromkeys(reasons):
    count = f"{reasons.count(reason)} of {len(outcomes)}"
    warnings.warn(
      f"lost {count} episodes, which are not scored: the environment's {reason}",
      RuntimeWarning, stacklevel=3,
    )  # fmt: skip


# --- in this process ------------------------------------------------------------------------------


class _InProcess(_Runner):
  def __init__(self, task: Task) -> None:
    super().__init__()
    if task.environment is None:
      raise ValueError(f"task {task.name!r} has no environment")
    self._session = Session(task.environment, timeout=None)

  def _post(self, jobs: Sequence[Job]) -> None:
    for job in jobs:
      self._take(job, self._session.run(job))

  def _fetch(self, timeout: float | None) -> None:
    pass  # all answers are there when `_post` returns

  def _is_busy(self) -> bool:
    return False

  def _clear(self) -> None:
    self._session.close()


def run_in_process(task: Task) -> EnvironmentRunner:
  """Returns a runner that calls a task's environments in this process, without a time limit.

  Raises:
    ValueError: the task has no environment.

  Example:
    >>> from grpo_jax.tasks.guess_number import guess_number_task
    >>> task = guess_number_task(low=1, high=9)
    >>> runner = run_in_process(task)
    >>> example = task.splits["train"][0]
    >>> prompts = runner.reset([example], group=2, seeds=[0])
    >>> secret = example.columns["secret"]
    >>> outcomes = runner.step({(0, 0): f" {secret}", (0, 1): " 10"})
    >>> outcomes[0, 0].done, outcomes[0, 1].done
    (True, False)
  """
  return _InProcess(task)


# --- in worker processes --------------------------------------------------------------------------


class EnvironmentWorkers(_Runner):
  """Runs a task's environments in worker processes, under a time limit.

  Use it as a context manager, or call `close`. The worker processes also end with this process,
  however it ends.

  Args:
    make: returns the task. It is called in every worker and therefore has to be picklable, as
      `functools.partial(make_task, name, **settings)` is.
    workers: number of processes.
    timeout: time limit in seconds of each call of an environment.
    isolate: take network, writing, starting programs and the variables of this process away from
      the workers once they have built the task. A machine that cannot do it gets a warning.

  Raises:
    ValueError: an argument is out of range, or `make` cannot be pickled.
  """

  def __init__(
    self,
    make: Callable[[], Task],
    workers: int = 1,
    timeout: float = 30.0,
    *,
    isolate: bool = True,
  ) -> None:
    super().__init__()
    check_limits(workers, timeout)
    settings = pickled_settings((make, timeout, isolate), REMEDY)
    self._timeout = timeout
    self._workers = [_Worker(settings, timeout, isolate) for _ in range(workers)]
    for worker in self._workers:
      worker.start()

  def close(self) -> None:
    """Ends the processes. A later `reset` starts new ones."""
    self._episodes, self._arrived = {}, {}
    for worker in self._workers:
      worker.kill()

  def _clear(self) -> None:
    for worker in self._workers:
      worker.clear()

  def _post(self, jobs: Sequence[Job]) -> None:
    try:
      for n, worker in enumerate(self._workers):
        worker.assign([job for job in jobs if self._number(job.key) == n])
    except BaseException:
      self.close()
      raise

  def _fetch(self, timeout: float | None) -> None:
    end = math.inf if timeout is None else time.monotonic() + timeout
    try:
      while busy := [n for n, worker in enumerate(self._workers) if worker.pending]:
        _wait([self._workers[n] for n in busy], end)
        for n in busy:
          for job, answer in self._workers[n].receive():
            self._take(job, answer)
          if self._workers[n].connection is None:
            self._restart(n)
        if self._arrived or time.monotonic() >= end:
          break
    except BaseException:
      self.close()  # interrupted in the middle: later answers would belong to nothing
      raise

  def _is_busy(self) -> bool:
    return any(worker.pending for worker in self._workers)

  def _number(self, key: Key) -> int:
    """Returns the number of the worker that has an episode; a group is spread over the workers."""
    return self._episodes[key].place % len(self._workers)

  def _restart(self, n: int) -> None:
    """Starts a worker that ended, with the episodes that it had."""
    restored = [
      Job(key, "restore", episode.example, episode.seed, (*episode.texts,), (*episode.answers,))
      for key, episode in self._episodes.items()
      if self._number(key) == n and episode.answers and not episode.over
    ]
    worker = self._workers[n]
    pending = [job for job in worker.pending if job.kind != "restore"]
    worker.pending = []
    worker.assign([*restored, *pending])


class _Worker(WorkerProcess):
  """Controls a worker process: absent, starting (it builds the task), idle, or busy with jobs.

  Attributes:
    pending: jobs that it has not answered.
    current: the job that it is at, if any.
  """

  module = worker_process.__name__

  def __init__(self, settings: bytes, timeout: float, isolate: bool) -> None:
    super().__init__(settings, isolate)
    self._timeout = timeout
    self.pending: list[Job] = []
    self.current: Job | None = None
    self._unexplained = 0  # ends of the process between two jobs, while the same jobs are pending

  def assign(self, jobs: Sequence[Job]) -> None:
    """Sends jobs, behind those that are pending; starts the process if there is none."""
    if not jobs:
      return
    if self.connection is None:
      self.start()
    try:
      message = pickle.dumps(jobs)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
      raise EnvironmentFault(
        f"an example cannot be sent to another process: {error}. Leave out columns that are not "
        "plain data, or have environments called in this process: rewards.workers=0"
      ) from error
    self._send(message)
    self.pending += jobs
    if self._ready and self.current is None:
      self.deadline = time.monotonic() + PAUSE

  def clear(self) -> None:
    """Has it close all its environments; ends it if a call is under way."""
    if self.pending:
      self.kill()
    self.pending = []
    if self.connection is not None:
      self._send(pickle.dumps([]))

  def kill(self) -> None:
    """Ends the process; what is pending stays pending."""
    super().kill()
    self.current = None

  def receive(self) -> list[tuple[Job, Answer]]:
    """Returns the jobs that have ended, and their answers; none while it is at work.

    If the process ends, `connection` is None afterwards, and the job that it was at has failed.
    """
    try:
      if self.connection.poll():
        return self._handle(*json.loads(self.connection.recv_bytes(MESSAGE_BYTES)))
      if time.monotonic() < self.deadline:
        return []
      reason = f"took more than {self._timeout:g} s"
    except (EOFError, OSError):
      reason = f"ended its process ({self._exit_reason()})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, EnvironmentFault):
      reason = "sent something that is not an answer: a text has changed its process"
    return self._lose(reason)

  def _handle(self, kind: str, value: Any) -> list[tuple[Job, Answer]]:
    if kind == "ready":
      self._ready = True
      self.deadline = time.monotonic() + PAUSE
      if self._isolate and "landlock" not in value:
        warnings.warn(
          "environments are not isolated on this machine: its kernel has no Landlock",
          RuntimeWarning, stacklevel=6,
        )  # fmt: skip
    elif kind == "raised":
      self.kill()
      raise WorkerError(f"an environment worker could not build the task: {value}. {REMEDY}")
    elif kind == "at" and self.current is None:
      self.current = {job.key: job for job in reversed(self.pending)}[tuple(value)]
      self.deadline = time.monotonic() + self.current.calls * self._timeout + GRACE
    elif kind == "done":
      key, answer_kind, answer = value
      job = self.current
      answer = from_json(answer_kind, answer)
      if list(job.key) != key or (job.kind != "reset" and not isinstance(answer, Outcome)):
        raise ValueError(key)
      self.pending = [other for other in self.pending if other is not job]
      self.current, self._unexplained = None, 0
      self.deadline = time.monotonic() + PAUSE
      return [(job, answer)]
    else:
      raise ValueError(kind)
    return []

  def _lose(self, reason: str) -> list[tuple[Job, Answer]]:
    """Kills the process; returns the failure of the job that it was at."""
    job = self.current
    if not self._ready:
      self.kill()
      raise WorkerError(
        f"an environment worker did not build the task within {START_SECONDS:g} s, or {reason}. "
        f"{REMEDY}"
      )
    self.kill()
    if job is None:  # it ended between two jobs: nobody's fault, the first time
      self._unexplained += 1
      if self._unexplained < 2:
        return []
      job = self.pending[0]
    lost = [other for other in self.pending if other.key == job.key]
    self.pending = [other for other in self.pending if other.key != job.key]
    verb = "replay" if job.kind == "restore" else job.kind
    return [(other, failed(f"{verb} {reason}")) for other in lost]


def _wait(workers: Sequence[_Worker], end: float) -> None:
  """Waits for a message of a worker, or the first deadline, or until `end`."""
  seconds = min(end, *(worker.deadline for worker in workers)) - time.monotonic()
  wait([worker.connection for worker in workers], timeout=max(seconds, 0.0))
