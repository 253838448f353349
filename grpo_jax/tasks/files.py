"""Reads rows of data files by number: JSON lines, JSON, CSV and Parquet, in one file or in many."""

from __future__ import annotations

import csv
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from grpo_jax import extras
from grpo_jax.errors import first_line

Row: TypeAlias = dict[str, Any]
# Words for splits in the names of files, as the hub understands them.
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")


class Rows(Protocol):
  """The rows of some files."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Row: ...

  def where(self, i: int) -> str:
    """Returns the file and the place of row i."""
    ...


class JsonLines:
  """The rows of a JSONL file. It stores the offsets of the lines and parses a row on access."""

  def __init__(self, path: str) -> None:
    self.path = path
    self._lines: list[tuple[int, int]] = []  # (offset in bytes, line number from 1)
    offset = 0
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        # Some editors write a byte order mark before the first line.
        if line.removeprefix(b"\xef\xbb\xbf").strip():
          self._lines.append((offset, number))
        offset += len(line)
    if not self._lines:
      raise ValueError(f"{path} contains no examples: it needs one JSON object per line")

  def __len__(self) -> int:
    return len(self._lines)

  def where(self, i: int) -> str:
    """Returns the file and line of row i."""
    return f"{self.path}, line {self._lines[i][1]}"

  def __getitem__(self, i: int) -> Row:
    with open(self.path, "rb") as file:
      file.seek(self._lines[i][0])
      line = file.readline()
    try:
      text = line.decode("utf-8-sig").strip()
      row = _parse(text)
    except UnicodeDecodeError as error:
      raise ValueError(f"{self.where(i)}: not UTF-8 text: {error.reason} in {line[:80]!r}") from (
        error
      )
    except UnicodeEncodeError as error:
      raise ValueError(f"{self.where(i)}: {half_a_pair(error)}") from error
    except (ValueError, RecursionError) as error:
      if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} (column {error.colno})"
      else:  # an integer of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
      raise ValueError(f"{self.where(i)}: not JSON: {reason}: {text[:80]!r}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{self.where(i)}: must be a JSON object with a prompt, got {text[:80]!r}")
    return row


def _parse(text: str) -> Any:
  """Returns the value of a JSON text.

  Raises:
    ValueError: it is not JSON.
    UnicodeEncodeError: a string in it holds half of a surrogate pair.
    RecursionError: it is nested too deeply.
  """
  value = json.loads(text)
  if "\\ud" in text.lower():  # the only way to half a surrogate pair
    json.dumps(value, ensure_ascii=False).encode("utf-8")
  return value


def half_a_pair(error: UnicodeEncodeError) -> str:
  """Returns the words for text that holds half of a surrogate pair, as of a cut emoji."""
  return (
    f"text with {error.object[error.start]!r}, half of a surrogate pair, which no tokenizer takes; "
    "cut the text between characters"
  )


class Parquet:
  """The rows of a Parquet file. It stores Arrow columns and converts a row on access.

  The file is read as a whole: its smallest readable piece is a row group, and in a shuffled order
  nearly every row would decode another row group.
  """

  def __init__(self, path: str) -> None:
    extras.require("tasks", f"{path}: reading Parquet files", "pyarrow")
    from pyarrow import parquet

    try:
      self._table = parquet.read_table(path).combine_chunks()
    except Exception as error:  # a damaged page raises many unrelated types
      raise ValueError(f"{path}: not a Parquet file: {first_line(error)}") from error
    self.path = path
    if not len(self):
      raise ValueError(f"{path} contains no examples: it has no rows")

  def __len__(self) -> int:
    return self._table.num_rows

  def where(self, i: int) -> str:
    """Returns the file and row number of row i."""
    return f"{self.path}, row {i + 1}"

  def __getitem__(self, i: int) -> Row:
    try:
      return self._table.slice(i, 1).to_pylist()[0]
    except Exception as error:  # such as text that is not UTF-8
      raise ValueError(f"{self.where(i)}: cannot be read: {first_line(error)}") from error


class InMemory:
  """Rows that were read as a whole, with the place of each in words ("line 3")."""

  def __init__(self, path: str, rows: Sequence[Row], places: Sequence[str]) -> None:
    self.path, self._rows, self._places = path, rows, places
    if not rows:
      raise ValueError(f"{path} contains no examples: it has no rows")

  def __len__(self) -> int:
    return len(self._rows)

  def where(self, i: int) -> str:
    """Returns the file and the place of row i."""
    return f"{self.path}, {self._places[i]}"

  def __getitem__(self, i: int) -> Row:
    return self._rows[i]


class Joined:
  """The rows of several files, one after another."""

  def __init__(self, parts: Sequence[Rows]) -> None:
    self._parts = parts
    self._ends = list(accumulate(map(len, parts)))

  def __len__(self) -> int:
    return self._ends[-1]

  def _place(self, i: int) -> tuple[Rows, int]:
    number = bisect_right(self._ends, i)
    return self._parts[number], i - (self._ends[number - 1] if number else 0)

  def where(self, i: int) -> str:
    """Returns the file and the place of row i."""
    part, index = self._place(i)
    return part.where(index)

  def __getitem__(self, i: int) -> Row:
    part, index = self._place(i)
    return part[index]


def read_csv(path: str) -> InMemory:
  """Reads a CSV file whose first line names the columns. Every value is text.

  Raises:
    ValueError: the file is not CSV in UTF-8, or a row has another number of cells than the first.
  """
  rows, places, line = [], [], 1
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      reader = csv.reader(file, strict=True)
      names = next(reader, [])
      if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ValueError(f"{path}, line 1: the columns need different names, got {names}")
      for cells in reader:
        place, line = f"line {line + 1}", reader.line_num
        if cells and len(cells) != len(names):
          raise ValueError(f"{path}, {place}: {len(cells)} cells for the {len(names)} columns")
        if cells:
          rows.append(dict(zip(names, cells)))
          places.append(place)
  except (csv.Error, UnicodeDecodeError) as error:
    raise ValueError(f"{path}, after line {line}: not CSV in UTF-8: {error}") from error
  return InMemory(path, rows, places)


def read_json(path: str) -> Rows:
  """Reads a JSON file with a list of objects, or one object per line.

  Raises:
    ValueError: the file holds something else.
  """
  with open(path, "rb") as file:
    start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
      return JsonLines(path)
    file.seek(0)
    try:
      rows = _parse(file.read().decode("utf-8-sig"))
    except UnicodeEncodeError as error:
      raise ValueError(f"{path}: {half_a_pair(error)}") from error
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path}: not a list in JSON: {error}") from error
  for number, row in enumerate(rows, start=1):
    if not isinstance(row, dict):
      raise ValueError(f"{path}, entry {number}: must be a JSON object, got {str(row)[:80]!r}")
  return InMemory(path, rows, [f"entry {number}" for number in range(1, len(rows) + 1)])


KINDS: dict[str, Callable[[str], Rows]] = {
  ".jsonl": JsonLines,
  ".ndjson": JsonLines,
  ".json": read_json,
  ".csv": read_csv,
  ".parquet": Parquet,
  ".pq": Parquet,
}


def open_rows(paths: Sequence[str]) -> Rows:
  """Opens files, each by the ending of its name; JSON lines if that says nothing.

  Raises:
    ValueError: a file is not what its name says, or is compressed.
    FileNotFoundError: a file does not exist.
    ImportError: a file is a Parquet file, and pyarrow is not installed.
  """
  parts = [_open(path) for path in paths]
  return parts[0] if len(parts) == 1 else Joined(parts)


def _open(path: str) -> Rows:
  if not Path(path).is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  suffix = Path(path).suffix.lower()
  if suffix in _COMPRESSED:
    raise ValueError(f"{path} is compressed: unpack it first")
  return KINDS.get(suffix, JsonLines)(path)


def find_files(folder: str, split: str | None = None) -> list[str]:
  """Returns the data files of a split in a folder and the folders below it, sorted by name.

  Args:
    folder: the folder.
    split: see `choose`.

  Raises:
    ValueError: there are none, or files of several kinds.
  """
  root = Path(folder)
  names = [
    str(path.relative_to(root))
    for path in root.rglob("*")
    if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
  ]
  return [str(root / name) for name in choose(names, split, folder)]


def choose(names: Iterable[str], split: str | None, where: str) -> list[str]:
  """Returns the names of the data files of a split, sorted.

  Where names hold words for splits ("train-00000-of-00002.parquet", "test/0.csv"), only those of
  the split count. Where no name does, all of them are the split "train".

  Args:
    names: of all files, relative to a folder.
    split: None is "train".
    where: the folder or the data set, for messages.

  Raises:
    ValueError: there are none, or files of several kinds.

  Example:
    >>> choose(["README.md", "data/train-1.csv", "data/train-0.csv", "data/test-0.csv"], None, "x")
    ['data/train-0.csv', 'data/train-1.csv']
    >>> choose(["b.jsonl", "a.jsonl"], None, "x")
    ['a.jsonl', 'b.jsonl']
  """
  data, split = _data_files(names), split or "train"
  chosen = [name for name in data if _names_split(name, split)]
  if not chosen and split == "train" and not any(_names_split(n, s) for n in data for s in SPLITS):
    chosen = data
  if not chosen:
    known = f"its data files are {_some(data)}" if data else "it has no data files"
    raise ValueError(
      f"{where} has no files of the split {split!r}: {known} (of the kinds {', '.join(KINDS)})"
    )
  return of_one_kind(chosen, where)


def of_one_kind(names: Iterable[str], where: str) -> list[str]:
  """Returns the names of the data files among some files, sorted.

  Raises:
    ValueError: there are none, or they are of several kinds, which may hold the same rows.
  """
  data = _data_files(names)
  kinds = {KINDS[Path(name).suffix.lower()] for name in data}
  if not data:
    raise ValueError(f"{where} has no data files (of the kinds {', '.join(KINDS)})")
  if len(kinds) > 1:
    raise ValueError(
      f"{where} has files of several kinds, which may hold the same rows: {_some(data)}. Name the "
      "files: path=[...]"
    )
  return data


def _data_files(names: Iterable[str]) -> list[str]:
  """Returns the names that end like data; a .json file beside other data only describes it."""
  names = sorted(name for name in names if Path(name).suffix.lower() in KINDS)
  return [name for name in names if not name.lower().endswith(".json")] or names


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _names_split(name: str, split: str) -> bool:
  """Tells whether a file's name or a folder of its is the split, or has it as a word."""
  return bool(re.search(rf"(^|[^A-Za-z0-9]){re.escape(split)}([^A-Za-z]|$)", name))
