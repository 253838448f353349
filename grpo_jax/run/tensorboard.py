"""Writes metrics as TensorBoard events.

The caller's own thread writes them, at once. tensorboardX's `FileWriter` writes in a thread that
ends at the first error, a full disk for instance; `close` would then wait for it forever.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 30.0  # how far TensorBoard may lag behind the run


class TensorBoardWriter:
  """Appends metrics to a new event file.

  Args:
    folder: of the event files; made if it is missing. If it exists, TensorBoard is told to hide
      what earlier files hold for `start_step` and later steps.
    start_step: first step that will be written.
  """

  def __init__(self, folder: Path, start_step: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    resumed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Names hold the time in seconds only: without the suffix, a restart within the same second
    # would overwrite the file before.
    suffix = f".{start_step:06d}.{os.getpid()}"
    self._file, self._last_flush = EventsWriter(str(folder / "events"), suffix), 0.0
    if resumed:
      log = SessionLog(status=SessionLog.START)
      self._file.write_event(Event(wall_time=time.time(), step=start_step, session_log=log))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of a step; flushes every `FLUSH_SECONDS`."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    now = time.time()
    self._file.write_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
    if now > self._last_flush + FLUSH_SECONDS:
      self.flush()

  def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Does nothing: event files have no tables."""

  def flush(self) -> None:
    """Writes all buffered events to the file."""
    self._file.flush()
    self._last_flush = time.time()

  def close(self) -> None:
    """Flushes and closes the file. A second call does nothing."""
    file, self._file = self._file, None
    if file:
      file.close()
