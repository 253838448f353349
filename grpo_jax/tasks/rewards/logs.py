"""Collects what reward functions log, and tells them how far the training is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Keys of a row of samples, which a logged column must not replace.
SAMPLE_KEYS = (
  *("prompt", "completion", "key", "answer", "columns", "reward", "rewards", "advantage"),
  *("accuracy", "length", "ended"),
)
MAX_DEPTH = 50  # of nested lists and objects in a row of samples
MAX_BITS = 10_000  # of an integer in a row of samples; Python converts no more than 4300 digits


@dataclass(frozen=True)
class TrainerState:
  """Tells reward functions that have a parameter `trainer_state` how far the training is.

  Attributes:
    global_step: number of finished steps.
    max_steps: number of steps of the whole run.
  """

  global_step: int = 0
  max_steps: int = 1


class Logs:
  """Collects what reward functions log about a batch of completions.

  Its methods are the arguments `log_extra` and `log_metric` of a reward function.

  Args:
    count: number of completions, B.

  Attributes:
    extras: [B], logged columns of each completion by name.
    metrics: name, value and number of completions of each logged metric, in order.

  Example:
    >>> logs = Logs(2)
    >>> logs.log_extra("parsed", ["4", None])
    >>> logs.log_metric("share_parsed", 0.5)
    >>> logs.extras, logs.metrics
    ([{'parsed': '4'}, {'parsed': None}], [('share_parsed', 0.5, 2)])
  """

  def __init__(self, count: int) -> None:
    self.extras: list[dict[str, Any]] = [{} for _ in range(count)]
    self.metrics: list[tuple[str, float, int]] = []

  def log_extra(self, column: str, values: Sequence[Any]) -> None:
    """Adds a column to the rows of samples; what JSON does not have is logged as text.

    Args:
      column: its name.
      values: one value per completion.

    Raises:
      ValueError: the name or the number of the values is wrong.
    """
    if not isinstance(column, str) or not column or column in SAMPLE_KEYS:
      raise ValueError(
        f"log_extra({column!r}, ...): the name must be text, and not one that each row of samples "
        f"has: {', '.join(SAMPLE_KEYS)}"
      )
    if isinstance(values, str | bytes | Mapping | set) or not hasattr(values, "__len__"):
      raise ValueError(
        f"log_extra({column!r}, ...) got a {type(values).__name__}: it needs a list with one value "
        f"per completion, here {len(self.extras)}"
      )
    if len(values) != len(self.extras):
      raise ValueError(
        f"log_extra({column!r}, ...) got {len(values)} values for {len(self.extras)} completions"
      )
    for row, value in zip(self.extras, values):
      row[column] = as_json(value)

  def log_metric(self, name: str, value: float) -> None:
    """Adds a value to a metric of the step, which is the mean of all values; NaN is left out.

    Raises:
      ValueError: the name or the value is wrong.
    """
    if not isinstance(name, str) or not name or name == "step" or name.startswith("eval/"):
      raise ValueError(
        f"log_metric({name!r}, ...): the name must be text, not 'step', and not begin with 'eval/'"
      )
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
      value = value.item()
    if not isinstance(value, numbers.Real) or math.isinf(value):
      raise ValueError(f"log_metric({name!r}, {value!r:.200}): the value must be a finite number")
    if not math.isnan(value):
      self.metrics.append((name, float(value), len(self.extras)))


def mean_metrics(metrics: Sequence[tuple[str, float, int]]) -> dict[str, float]:
  """Returns the mean of each logged metric, weighted by the number of completions of its call.

  Example:
    >>> mean_metrics([("a", 1.0, 3), ("a", 0.0, 1), ("b", 2.0, 4)])
    {'a': 0.75, 'b': 2.0}
  """
  sums: dict[str, tuple[float, int]] = {}
  for name, value, count in metrics:
    total, completions = sums.get(name, (0.0, 0))
    sums[name] = total + value * count, completions + count
  return {name: total / count for name, (total, count) in sums.items() if count}


def as_json(value: Any, depth: int = 0) -> Any:
  """Returns a value as JSON can hold it; what JSON does not have becomes text, NaN becomes None.

  Example:
    >>> import datetime
    >>> as_json({"day": datetime.date(2026, 1, 2), 3: (1, float("nan")), "big": 2**20_000})["day"]
    '2026-01-02'
  """
  if value is None or isinstance(value, bool | str):
    return value
  if isinstance(value, int):
    return int(value) if value.bit_length() <= MAX_BITS else hex(value)
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if depth >= MAX_DEPTH:
    return f"... nested more than {MAX_DEPTH} deep"
  if isinstance(value, Mapping):
    return {str(name): as_json(item, depth + 1) for name, item in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    return [as_json(item, depth + 1) for item in value]
  if hasattr(value, "tolist"):  # arrays and their elements
    return as_json(value.tolist(), depth + 1)
  try:
    return str(value)
  except Exception:
    return f"a {type(value).__name__}"
