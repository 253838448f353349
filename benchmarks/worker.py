"""Runs a benchmark's engine in a process of its own: it waits for a command, works, and reports.

It uses the standard library only, so that engines run in environments without grpo_jax. The parent
(`alternate.py`) sends one JSON line with the settings, then one line per unit of work. The engine
answers each line with one JSON line. The engine's own prints go to its log.
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
  """Talks to the parent over the engine's end of the pipe.

  Attributes:
    settings: settings of the measurement, from the parent.
  """

  def __init__(self) -> None:
    self._out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep prints of libraries out of the replies
    self.settings: dict[str, Any] = json.loads(sys.stdin.readline())

  def reply(self, record: dict[str, Any]) -> None:
    """Sends one JSON line to the parent."""
    print(json.dumps(record), file=self._out)

  def ready(self, about: dict[str, Any]) -> None:
    """Reports that everything is loaded; `about` holds versions."""
    self.reply(about | {"ready_bytes": peak_bytes()})

  def wait(self) -> bool:
    """Waits for the next request for a unit of work; returns False after the last one."""
    return bool(sys.stdin.readline().strip())

  @contextlib.contextmanager
  def measure(self) -> Iterator[dict[str, Any]]:
    """Times the block and replies, with the fields that the block puts into the dict."""
    record: dict[str, Any] = {}
    before = clock()
    yield record
    self.reply(since(before) | {"peak_bytes": peak_bytes()} | record)


def clock() -> tuple[float, float]:
  """Returns (wall, CPU) seconds of this process and all its threads, from an arbitrary start."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return time.perf_counter(), used.ru_utime + used.ru_stime


def since(before: tuple[float, float], prefix: str = "") -> dict[str, float]:
  """Returns the wall and CPU seconds since `clock()` returned `before`."""
  wall, cpu = clock()
  return {f"{prefix}seconds": wall - before[0], f"{prefix}cpu_seconds": cpu - before[1]}


def peak_bytes() -> int:
  """Returns the peak resident memory of this process in bytes."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
