"""Stops a run after the current step on Ctrl-C or SIGTERM."""

import contextlib
import signal
import time
from types import FrameType
from typing import Any

from grpo_jax.distributed import hosts

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(KeyboardInterrupt):
  """Reports that the run was stopped after a step that is saved.

  Args:
    text: message for the user.
    number: number of the signal.
    at: time in seconds, by `time.monotonic`, of the signal; None on hosts that did not get it.

  Attributes:
    exit_code: 128 + number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM.
  """

  def __init__(self, text: str, number: int, at: float | None = None) -> None:
    super().__init__(text)
    self.exit_code, self._at = 128 + number, at

  def since(self) -> str:
    """Returns a phrase with the seconds since the signal: call it when the state is written."""
    if self._at is None:
      return ""
    return f" (saved {time.monotonic() - self._at:.1f} s after the signal)"


class Signals:
  """Turns Ctrl-C and SIGTERM (preemption) into a request to stop after the current step.

  A second Ctrl-C stops at once. A second SIGTERM does not: schedulers may send several. Outside the
  main thread nothing changes, since only the main thread may set signal handlers.

  On several hosts, JAX's preemption service takes a SIGTERM that comes before this is entered,
  while a run reads its files. It counts like one that comes later.
  """

  def __init__(self) -> None:
    self._received = 0
    self._at: float | None = None
    self._asked: float | None = None  # time of the last `of_any_host`
    self._pace = ""
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    with contextlib.suppress(ValueError):  # raised outside the main thread
      for number in _NAMES:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def of_any_host(self, step: int) -> int:
    """Returns the signal that any host received, the same number on all hosts; 0 if there is none.

    All hosts have to call it after every step. SIGTERM takes precedence over Ctrl-C.

    Args:
      step: number of the step that ends.
    """
    now = time.monotonic()
    if self._asked is not None:
      self._pace = f"; the last one took {now - self._asked:.1f} s"
    self._asked = now
    if hosts.reached_preemption(step):
      return signal.SIGTERM
    if not hosts.any_host(self._received > 0):
      return 0
    return signal.SIGTERM if hosts.any_host(self._received == signal.SIGTERM) else signal.SIGINT

  def check(self, steps: int, number: int) -> None:
    """Raises an error if there was a signal: call it after a step that is saved.

    Args:
      steps: number of saved steps.
      number: number of the signal, from `of_any_host`; 0 is none.

    Raises:
      Stopped: `number` is not 0.
    """
    if number:
      raise Stopped(f"stopped after step {steps}, which is saved", number, self._at)

  def _handle(self, number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    self._received = max(self._received, int(number))
    self._at = self._at or time.monotonic()
    again = " (again: stop at once)" if number == signal.SIGINT else ""
    print(f"\n{_NAMES[number]}: finishing this step, then saving{again}{self._pace}", flush=True)

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
