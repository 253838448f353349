"""Scores batches in this process, and defines what scorers take and return."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from grpo_jax.errors import with_frames
from grpo_jax.tasks.base import Columns, Prompt, RewardFunction, Task
from grpo_jax.tasks.rewards.logs import Logs, TrainerState
from grpo_jax.tasks.rewards.scoring import RewardError, check_batch, weighted_sum
from grpo_jax.tasks.rewards.worker_process import score_task

ON_ERROR = ("raise", "skip")
MOST_IN_A_ROW = 20  # calls that raise one after another, after which a batch is not tried further
Unit: TypeAlias = tuple[slice, slice]  # of prompts, and of the completions of each
# (rewards by name, accuracy) of a unit, as `score_task` returns them, and what it logged.
UnitResult: TypeAlias = tuple[dict[str, Float[np.ndarray, "P G"]], Float[np.ndarray, "P G"], Logs]


@dataclass(frozen=True)
class Scores:
  """The rewards of a batch of completions.

  Attributes:
    total: weighted sum of the rewards, [P, G]; NaN: not scored.
    per_name: rewards of each function, [P, G]; NaN where it does not apply.
    accuracy: [P, G], 1.0 for correct answers.
    missing: number of completions on which a function hung or crashed. Their total is NaN.
    raised: number of completions on which a function raised, where that does not end the run. Their
      total is NaN.
    extras: [P][G], columns that functions logged, by name; empty: none of them.
    logged: metrics that functions logged, as in `logs.Logs`.
  """

  total: Float[np.ndarray, "P G"]
  per_name: dict[str, Float[np.ndarray, "P G"]]
  accuracy: Float[np.ndarray, "P G"]
  missing: int
  raised: int = 0
  extras: list[list[dict[str, Any]]] = field(default_factory=list)
  logged: list[tuple[str, float, int]] = field(default_factory=list)


class Scorer(Protocol):
  """Scores completions with the reward functions of a task."""

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
    """Returns the scores of a batch.

    Args:
      prompts: as in `scoring.score`, like the arguments up to `state`.
      rewards: whether to compute the rewards. If not, only the accuracy is computed; `total` is
        NaN and `per_name` empty.
    """


def score_in_process(task: Task, on_error: str = "raise") -> Scorer:
  """Returns a scorer that calls a task's functions in this process, without a time limit.

  Args:
    on_error: as in `RewardWorkers`.

  Example:
    >>> from grpo_jax.tasks.letters import letters_task
    >>> score_in_process(letters_task())(["1:"], [["ab", "a1"]], {}).total
    array([[1. , 0.5]])
  """
  Errors((0, 0), on_error)  # checks the name

  def scorer(
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

    def call(unit: Unit) -> UnitResult:
      part = part_of(batch, unit)
      logs = Logs(sum(len(texts) for texts in part[1]))
      try:
        return *score_task(task, rewards, *part, state, logs=logs), logs
      except SystemExit as error:
        raise RewardError(f"a reward function raised {with_frames(error)}") from error

    errors = Errors(shape, on_error)
    results = call_units(call, shape, errors)
    errors.warn()
    weights = {name: weight for name, (_, weight) in task.rewards.items()}
    return joined(results, weights if rewards else {}, shape, errors)

  return scorer


def score_with(reward: RewardFunction, accuracy: RewardFunction | None = None) -> Scorer:
  """Returns a scorer that calls one reward function in this process, without a time limit.

  Args:
    reward: `f(prompts, completions, **columns) -> list[float | None]`.
    accuracy: function of the same form that returns 1.0 for a correct answer; None: the reward.

  Example:
    >>> def short(prompts, completions, **columns):
    ...   return [float(len(text) < 3) for text in completions]
    >>> score_with(short)(["5 - 9 ="], [["-4", "minus four"]], {}).total.tolist()
    [[1.0, 0.0]]
  """
  name = getattr(reward, "__name__", "reward")
  return score_in_process(Task(name, {}, {name: (reward, 1.0)}, accuracy or reward))


# --- parts of a batch ----------------------------------------------------------------------------


def call_units(
  call: Callable[[Unit], UnitResult], shape: tuple[int, int], errors: Errors
) -> list[tuple[Unit, UnitResult]]:
  """Calls a batch as a whole, and in parts where that raises; returns the results of the parts."""
  pending, results = deque([whole_of(shape)]), []
  while pending and not errors.gives_up(pending):
    unit = pending.popleft()
    try:
      results.append((unit, call(unit)))
      errors.in_a_row = 0
    except RewardError as error:
      pending.extend(errors.handle(unit, error))
  return results


class Errors:
  """Decides what the error of a reward function costs: the run, or the rewards of completions.

  Args:
    shape: (P, G) of the batch.
    on_error: "raise" or "skip".

  Attributes:
    raised: true for completions without a reward.
    in_a_row: number of calls that raised since the last one that did not.
  """

  def __init__(self, shape: tuple[int, int], on_error: str) -> None:
    if on_error not in ON_ERROR:
      raise ValueError(f"on_error is {on_error!r}: it must be one of {', '.join(ON_ERROR)}")
    self._skips = on_error == "skip"
    self._first = ""
    self.raised, self.in_a_row = np.zeros(shape, bool), 0

  def handle(self, unit: Unit, error: RewardError) -> list[Unit]:
    """Returns the parts of a unit to call next; marks a completion that raises alone.

    Raises:
      RewardError: `error`, if errors are not skipped.
    """
    if not self._skips:
      raise error
    self._first, self.in_a_row = self._first or str(error), self.in_a_row + 1
    parts = split(unit)
    if not parts:
      self.raised[unit] = True
    return parts

  def gives_up(self, pending: deque[Unit]) -> bool:
    """Marks all pending units as raised, and removes them, after too many errors in a row."""
    if self.in_a_row < MOST_IN_A_ROW:
      return False
    while pending:
      self.raised[pending.popleft()] = True
    return True

  def warn(self) -> None:
    """Warns of the completions that have no reward, with the first error, if there are some."""
    if self.raised.any():
      warnings.warn(
        f"no reward for {self.raised.sum()} completions (rewards.on_error=skip): {self._first}",
        RuntimeWarning, stacklevel=3,
      )  # fmt: skip


def joined(
  results: Sequence[tuple[Unit, UnitResult]],
  weights: Mapping[str, float],
  shape: tuple[int, int],
  errors: Errors,
  missing: Bool[np.ndarray, "P G"] | None = None,
) -> Scores:
  """Returns the scores of a batch from the results of its units.

  Args:
    weights: of the rewards; none if only the accuracy was computed.
    missing: true for completions on which a function hung or crashed.
  """
  values = {name: np.full(shape, np.nan) for name in weights}
  accuracy = np.full(shape, np.nan)
  extras: list[list[dict[str, Any]]] = [[{} for _ in range(shape[1])] for _ in range(shape[0])]
  logged = []
  for unit, (unit_rewards, unit_accuracy, logs) in results:
    accuracy[unit] = unit_accuracy
    for name, array in unit_rewards.items():
      values[name][unit] = array
    rows = iter(logs.extras)
    for p in range(*unit[0].indices(shape[0])):
      extras[p][unit[1]] = [next(rows) for _ in range(*unit[1].indices(shape[1]))]
    logged += logs.metrics
  total = weighted_sum(values, weights) if weights else np.full(shape, np.nan)
  lost = 0 if missing is None else int(missing.sum())
  return Scores(total, values, accuracy, lost, int(errors.raised.sum()), extras, logged)


def whole_of(shape: tuple[int, int]) -> Unit:
  """Returns the unit that is a whole batch of shape (P, G)."""
  return slice(0, shape[0]), slice(0, shape[1])


def split(unit: Unit) -> list[Unit]:
  """Splits several prompts into prompts, one prompt into completions, one completion into none."""
  rows, within = unit
  if rows.stop - rows.start > 1:
    return [(slice(p, p + 1), within) for p in range(rows.start, rows.stop)]
  if within.stop - within.start > 1:
    return [(rows, slice(g, g + 1)) for g in range(within.start, within.stop)]
  return []


def part_of(batch: tuple[Any, ...], unit: Unit) -> tuple[Any, ...]:
  """Returns (prompts, completions, columns, lengths, ids) of a unit."""
  rows, within = unit
  prompts, completions, columns, *others = batch

  def grid(values: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(row)[within] for row in values[rows]]

  part = {name: values[rows] for name, values in columns.items()}
  rest = [None if values is None else grid(values) for values in others]
  return list(prompts[rows]), grid(completions), part, *rest
