"""Reads and writes the JSON files of a model folder, such as config.json."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28  # of a file that is read as a whole


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is too large, is not JSON, or does not hold an object. Both errors name the
      file.
  """
  try:
    if (size := path.stat().st_size) > MAX_BYTES:
      raise ValueError(f"it has {size:,} bytes, allowed: {MAX_BYTES:,}")
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"no {path.name} in {path.parent}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
  return value


def write_json(path: Path, content: dict[str, Any]) -> None:
  """Writes an object, indented and with sorted keys."""
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
