"""Metrics as TensorBoard events.

Written at once and by the caller: tensorboardX's own writer does it in a thread, which ends at the
first error, a full disk for instance, after which the run would wait for it for ever.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

FLUSH_SECONDS = 30.0  # that TensorBoard may be behind


class Events:
  """An event file in `folder`, for steps from `start` on; those of earlier files are hidden."""

  def __init__(self, folder: Path, start: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    resumed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Without the suffix a restart within the second would write over the file before.
    suffix = f".{start:06d}.{os.getpid()}"
    self._file, self._flushed = EventsWriter(str(folder / "events"), suffix), 0.0
    if resumed:
      log = SessionLog(status=SessionLog.START)
      self._file.write_event(Event(wall_time=time.time(), step=start, session_log=log))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Append numbers that were measured at a step."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    rows = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    now = time.time()
    self._file.write_event(Event(wall_time=now, step=step, summary=Summary(value=rows)))
    if now > self._flushed + FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Wait until all of it is on the disk."""
    self._file.flush()
    self._flushed = time.time()

  def close(self) -> None:
    """A second call does nothing."""
    file, self._file = self._file, None
    if file:
      file.close()
