"""Quotes an error inside the message of another; imports nothing."""

LIMIT = 400  # characters


def first_line(error: BaseException) -> str:
  """Returns the type and the first line of an error, at most `LIMIT` characters.

  Example:
    >>> first_line(OSError("no network\\nand ten more lines"))
    'OSError: no network'
  """
  text = str(error).strip().split("\n")[0].rstrip()
  return f"{type(error).__name__}: {text}"[:LIMIT]
