"""Ends a run early: after a time, or when a metric passes a limit."""

import dataclasses
import math
import operator
import re
import time
from collections.abc import Mapping

from grpo_jax.distributed import hosts

_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_CONDITION = re.compile(
  r"\s*(?P<metric>[A-Za-z][^\s<>=!]*)\s*(?P<relation>[<>]=?)\s*"
  r"(?P<limit>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)\s*",
  re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class Condition:
  """Compares one metric with a number.

  Attributes:
    metric: its name.
    relation: `>`, `>=`, `<` or `<=`.
    limit: the number.
  """

  metric: str
  relation: str
  limit: float

  @classmethod
  def parse(cls, text: str) -> "Condition":
    """Reads `METRIC > NUMBER`, with any of the four relations; nothing else is evaluated.

    Raises:
      ValueError: the text is something else, or the number is not finite.

    Example:
      >>> Condition.parse("eval/accuracy>0.9")
      Condition(metric='eval/accuracy', relation='>', limit=0.9)
    """
    match = _CONDITION.fullmatch(text)
    if match is None or not math.isfinite(float(match["limit"])):
      raise ValueError(
        f"stop.when is {text!r}, it must be a metric, one of {' '.join(_OPERATORS)}, and a finite "
        "number, such as 'eval/accuracy>0.9'; or empty"
      )
    return cls(match["metric"], match["relation"], float(match["limit"]))

  def holds(self, value: float | None) -> bool:
    """Tells whether a value of the metric passes the limit; None and NaN do not."""
    return value is not None and _OPERATORS[self.relation](value, self.limit)


class Ending:
  """Decides after each step whether a run ends before its last step.

  Args:
    after_hours: hours after which the run ends; 0 is never.
    when: text of a `Condition`; empty is never.
    begun: time in seconds, by `time.monotonic`, from which hours are counted; None is now.

  Attributes:
    reason: why the run ends early; empty as long as it does not.
  """

  def __init__(self, after_hours: float, when: str, begun: float | None = None) -> None:
    self._hours = after_hours
    self._condition = Condition.parse(when) if when else None
    self._begun = time.monotonic() if begun is None else begun
    self.reason = ""

  def reached(self, latest: Mapping[str, tuple[int, float | None]]) -> bool:
    """Tells whether the run ends now. All hosts have to call it, and get the same answer.

    Args:
      latest: step and value of the newest record of each metric.
    """
    if self._hours or self._condition:
      reasons = hosts.gathered_json([self._own_reason(latest)])
      self.reason = next(filter(None, reasons), "")
    return bool(self.reason)

  def _own_reason(self, latest: Mapping[str, tuple[int, float | None]]) -> str:
    hours = (time.monotonic() - self._begun) / 3600
    if self._hours and hours >= self._hours:
      return f"stop.after_hours is {self._hours:g}, and it has run for {hours:.3g} hours"
    if self._condition is None or self._condition.metric not in latest:
      return ""
    step, value = latest[self._condition.metric]
    if not self._condition.holds(value):
      return ""
    c = self._condition
    return f"stop.when is {c.metric}{c.relation}{c.limit:g}, and it is {value:.6g} (step {step})"
