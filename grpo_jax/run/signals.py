"""Ctrl-C and SIGTERM end a run after the step it is in."""

import contextlib
import signal
from typing import Any

from grpo_jax.distributed.hosts import any_host

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(KeyboardInterrupt):
  """The run was stopped by a signal, after a step that is saved."""

  def __init__(self, text: str, number: int) -> None:
    super().__init__(text)
    self.exit_code = 128 + number  # as shells have it: 130 after Ctrl-C, 143 after SIGTERM


class Signals:
  """Turns Ctrl-C and SIGTERM (preemption) into a request to stop after the step.

  The second Ctrl-C stops at once; schedulers that send SIGTERM twice mean the same by both.
  """

  def __init__(self) -> None:
    self._got = 0
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    with contextlib.suppress(ValueError):  # not in the main thread: somebody else's business
      for number in _NAMES:
        self._before[number] = signal.signal(number, self._note)
    return self

  def of_any_host(self) -> int:
    """The signal that this or another host got, the same number on all; 0 is none."""
    if not any_host(self._got > 0):
      return 0
    return signal.SIGTERM if any_host(self._got == signal.SIGTERM) else signal.SIGINT

  def check(self, steps: int, number: int) -> None:
    """Raises Stopped after `steps` saved steps if there was a signal; 0 is none."""
    if number:
      raise Stopped(f"stopped after step {steps}, which is saved", number)

  def _note(self, number: int, _: object) -> None:
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    self._got = max(self._got, int(number))
    again = " (again: stop at once)" if number == signal.SIGINT else ""
    print(f"\n{_NAMES[number]}: finishing this step, then saving{again}", flush=True)

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
