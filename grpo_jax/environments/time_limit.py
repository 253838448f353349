"""Interrupts a call that takes too long. It imports the standard library only."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any


class OutOfTime(BaseException):
  """Interrupts a call at its time limit. No `except Exception` in the call catches it."""


def call_within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns `function(*arguments)`; raises `OutOfTime` in it after so many seconds.

  It interrupts Python code and waiting, and only in the main thread of the process. None: no limit.
  Calls may be nested: the limit of the outer one goes on.

  Example:
    >>> call_within(1.0, max, 3, 4)
    4
  """
  if seconds is None:
    return function(*arguments)
  running = False  # an alarm that rings before or after the call is ignored

  def interrupt(*_: object) -> None:
    if running:
      raise OutOfTime

  began, (outer, interval) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
  before = signal.signal(signal.SIGALRM, interrupt)
  try:
    first = min(seconds, outer) if outer else seconds
    # Again and again: a loop with a bare `except` swallows the first.
    signal.setitimer(signal.ITIMER_REAL, first, min(max(seconds / 4, 0.05), 0.25))
    running = True
    try:
      return function(*arguments)
    finally:
      running = False
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    if outer:
      signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 1e-3), interval)
