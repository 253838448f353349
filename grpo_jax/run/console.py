"""Keeps the console from ending a command: text that cannot be shown is replaced or dropped."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class GuardedStream:
  """Wraps a text stream so that writing to it never raises.

  A character that the encoding lacks becomes an escape, such as `\\u221a`. Text that a closed or
  broken stream does not accept is dropped.

  Args:
    stream: the stream; None (there is no console) drops everything.
  """

  def __init__(self, stream: TextIO | None) -> None:
    self._stream = stream

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
    return len(text)

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


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Guards standard output and standard error while the body runs."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = map(GuardedStream, before)
  try:
    yield
  finally:
    for stream in before:
      _drop_unwritten(stream)
    sys.stdout, sys.stderr = before


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
