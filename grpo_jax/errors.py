"""Quotes an error inside the message of another; imports the standard library only."""

import os
import sysconfig
import traceback

LIMIT = 400  # characters
MAX_FRAMES = 10
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = tuple(
  os.path.join(path, "")
  for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def first_line(error: BaseException) -> str:
  """Returns the type and the first line of an error, at most `LIMIT` characters.

  Example:
    >>> first_line(OSError("no network\\nand ten more lines"))
    'OSError: no network'
  """
  text = str(error).strip().split("\n")[0].rstrip()
  return f"{type(error).__name__}: {text}"[:LIMIT]


def with_frames(error: BaseException, width: int = 2000) -> str:
  """Returns the type and the text of an error, and below them the lines of the user's own files.

  Frames of this package, of the standard library and of installed packages are left out. If there
  are no others, the innermost one is shown.

  Args:
    width: number of characters after which the text is cut.
  """
  try:
    text = str(error)
  except Exception:
    text = "an error that cannot be shown"
  text = text if len(text) <= width else f"{text[:width]} ..."
  return "\n".join([f"{type(error).__name__}: {text}", *_frames(error)])


def _frames(error: BaseException) -> list[str]:
  """Returns the lines of a traceback that show the user's own files, the innermost last."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_frozen(f.filename)]
  shown = [frame for frame in frames if not _is_library(frame.filename)]
  if not shown and isinstance(error, SyntaxError) and error.filename and error.lineno:
    line = (error.text or "").strip()
    where = f'  File "{error.filename}", line {error.lineno}'
    return [where, f"    {line}"] if line else [where]
  shown = shown[-MAX_FRAMES:] or frames[-1:]
  return "".join(traceback.format_list(shown)).rstrip().splitlines()


def _is_frozen(filename: str) -> bool:
  return filename.startswith("<frozen ")


def _is_library(filename: str) -> bool:
  path = os.path.abspath(filename)
  return path.startswith((os.path.join(_PACKAGE, ""), *_LIBRARIES)) or any(
    part in ("site-packages", "dist-packages") for part in path.split(os.sep)
  )
