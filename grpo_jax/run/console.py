"""Keeps the console from ending a command, and a copy of what is shown in a file.

Text that cannot be shown is replaced or dropped.
"""

import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LOG = "console.log"  # in a work directory
EARLY_LINES = 1000  # lines shown before there is a file to copy them to; earlier ones are dropped
LINE_LENGTH = 100_000  # characters of a line of the copy
# Colours, movements of the cursor and titles of windows, as terminals take them.
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")


class ConsoleLog:
  """Collects the lines that are shown: in memory, and in a file from `open` on.

  No method raises: a full device must not end a command.
  """

  def __init__(self) -> None:
    self._early: deque[str] = deque(maxlen=EARLY_LINES)
    self._file: int | None = None

  def open(self, path: str | Path) -> None:
    """Appends the lines that were collected so far, and all later ones, to a file."""
    with contextlib.suppress(OSError):
      self.close()
      self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
      while self._early:
        self.add(self._early.popleft())

  def add(self, line: str) -> None:
    """Adds a line without its line break."""
    if self._file is None:
      self._early.append(line)
      return
    with contextlib.suppress(OSError):
      # Not buffered: a signal handler may print while the main program does.
      os.write(self._file, f"{line}\n".encode("utf-8", "backslashreplace"))

  def close(self) -> None:
    """Closes the file, if there is one."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        os.close(self._file)
      self._file = None


class GuardedStream:
  """Wraps a text stream so that writing to it never raises.

  A character that the encoding lacks becomes an escape, such as `\\u221a`. Text that a closed or
  broken stream does not accept is dropped.

  Args:
    stream: the stream; None (there is no console) drops everything.
    log: gets a copy of each line, as a terminal shows it at the end: without control sequences, and
      a progress bar once.
  """

  def __init__(self, stream: TextIO | None, log: ConsoleLog | None = None) -> None:
    self._stream, self.log, self._line = stream, log, ""

  def write(self, text: str) -> int:
    """Writes the text, as far as possible; returns its length."""
    if self._stream is not None:
      # RuntimeError: a signal handler prints while the main program does.
      with contextlib.suppress(OSError, ValueError, RuntimeError):
        try:
          self._stream.write(text)
        except UnicodeError:
          encoding = getattr(self._stream, "encoding", None) or "ascii"
          self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    if self.log:
      *lines, self._line = (self._line + text).split("\n")
      for line in lines:
        self.log.add(_last_shown(line))
      self._line = _after_returns(self._line)[-LINE_LENGTH:]
    return len(text)

  def end_line(self) -> None:
    """Adds a last line without a line break to the log."""
    if self.log and (line := _last_shown(self._line)):
      self.log.add(line)
    self._line = ""

  def flush(self) -> None:
    """Flushes the stream; does nothing if it is closed or broken."""
    if self._stream is not None:
      with contextlib.suppress(OSError, ValueError, RuntimeError):
        self._stream.flush()

  def isatty(self) -> bool:
    """Tells whether the stream is a terminal."""
    try:
      return self._stream is not None and self._stream.isatty()
    except ValueError:  # closed
      return False

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def keep(path: str | Path) -> None:
  """Appends all that is shown inside `guarded`, from its beginning to its end, to a file."""
  if isinstance(sys.stdout, GuardedStream) and sys.stdout.log:
    sys.stdout.log.open(path)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Guards standard output and standard error while the body runs; inside itself, does nothing.

  Where a stream is closed (`>&-`), its descriptor leads to the null device: otherwise the next file
  that is opened would get its number, and with it what libraries write to the console.
  """
  if isinstance(sys.stdout, GuardedStream):
    yield
    return
  for descriptor in (0, 1, 2):
    with contextlib.suppress(OSError):
      _fill(descriptor)
  before, log = (sys.stdout, sys.stderr), ConsoleLog()
  sys.stdout, sys.stderr = streams = [GuardedStream(stream, log) for stream in before]
  try:
    yield
  finally:
    for stream in streams:
      stream.end_line()
    log.close()
    for stream in before:
      _drop_unwritten(stream)
    sys.stdout, sys.stderr = before


def _fill(descriptor: int) -> None:
  """Opens the null device under a descriptor that is closed."""
  try:
    os.fstat(descriptor)
  except OSError:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
      os.dup2(nowhere, descriptor)
      os.close(nowhere)


def _last_shown(line: str) -> str:
  """Returns what a terminal shows of a line at the end."""
  return _CONTROL.sub("", _after_returns(line)).rstrip("\r")


def _after_returns(line: str) -> str:
  """Returns a line from its last carriage return on, after which it was written again."""
  text = line.rstrip("\r")
  return text.rpartition("\r")[2] + line[len(text) :]


def _drop_unwritten(stream: TextIO | None) -> None:
  """Redirects a broken stream to the null device, as Python would fail to flush it at exit."""
  try:
    if stream is not None:
      stream.flush()
  except (OSError, ValueError):
    with contextlib.suppress(OSError, ValueError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())
      os.close(nowhere)
