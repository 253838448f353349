"""A benchmark's engine in a process of its own: it waits for a command, works, and reports.

Standard library only, so that engines run in environments where grpo_jax is not installed. The
parent (`alternate.py`) sends one JSON line with the settings, and then one line per measured piece
of work; the engine answers each with one JSON line. What an engine prints goes to its log.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any


class Channel:
  """The engine's end of the pipe.

  Attributes:
    settings: what the parent wants measured.
  """

  def __init__(self) -> None:
    self._out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries' own prints must not mix with the answers
    self.settings: dict[str, Any] = json.loads(sys.stdin.readline())

  def reply(self, record: dict[str, Any]) -> None:
    print(json.dumps(record), file=self._out)

  def ready(self, about: dict[str, Any]) -> None:
    """Says that settings are read and everything is loaded; `about` holds versions."""
    self.reply(about | {"ready_bytes": peak_bytes()})

  def wait(self) -> bool:
    """Blocks until the next piece of work is asked for; False when there is no more."""
    return bool(sys.stdin.readline().strip())

  @contextlib.contextmanager
  def measure(self) -> Iterator[dict[str, Any]]:
    """Times the block and replies; what the block puts into the dict goes along."""
    record: dict[str, Any] = {}
    before = clock()
    yield record
    self.reply(since(before) | {"peak_bytes": peak_bytes()} | record)


def clock() -> tuple[float, float]:
  """(wall, CPU) seconds of this process and all its threads, from an arbitrary start."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return time.perf_counter(), used.ru_utime + used.ru_stime


def since(before: tuple[float, float], prefix: str = "") -> dict[str, float]:
  """Wall and CPU seconds since `clock()` gave `before`."""
  wall, cpu = clock()
  return {f"{prefix}seconds": wall - before[0], f"{prefix}cpu_seconds": cpu - before[1]}


def peak_bytes() -> int:
  """The most memory that this process has held so far, resident."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
