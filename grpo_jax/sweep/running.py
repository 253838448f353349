"""Runs commands one after another, and hands signals on to the one that is running."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any


class Runner:
  """Runs commands, and passes Ctrl-C and SIGTERM on to the running one.

  The command gets a process group of its own, so that a Ctrl-C reaches it once, from here. A run of
  `grpo_jax.train` then finishes its step, saves and ends; a second Ctrl-C ends it at once.

  Use it as a context manager, in the main thread.

  Attributes:
    received: number of the first signal; 0 as long as there was none.
  """

  def __init__(self) -> None:
    self.received = 0
    self._process: subprocess.Popen | None = None
    self._previous: dict[int, Any] = {}

  def run(self, command: Sequence[str]) -> int:
    """Runs a command to its end and returns its exit code; -number if a signal ended it."""
    self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    if self.received:  # it came while the process was being made
      self._process.send_signal(self.received)
    try:
      return self._process.wait()
    finally:
      self._process = None

  def __enter__(self) -> "Runner":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    self.received = self.received or number
    process = self._process
    if process is not None and process.poll() is None:
      process.send_signal(number)


def reason_of(code: int) -> str:
  """Returns what an exit code says, for a run that left no other reason.

  Example:
    >>> reason_of(-9), reason_of(2)
    ('ended by SIGKILL', 'exit code 2, see its message above')
  """
  if code < 0:
    return f"ended by {signal.Signals(-code).name}"
  return f"exit code {code}, see its message above"
