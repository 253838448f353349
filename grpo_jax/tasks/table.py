"""Builds a task from a user's own data: a JSONL or Parquet file, and a reward function.

    {"prompt": "Name a prime between 20 and 28.", "answer": 23}
    {"prompt": [{"role": "user", "content": "And between 30 and 36?"}], "answer": 31}

Each row has a prompt (text or chat messages). Its other columns are passed to the reward function
by name, with one value per completion:

    def right(prompts, completions, answer, **columns):
      return [float(str(a) in text) for text, a in zip(completions, answer)]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from grpo_jax import extras
from grpo_jax.tasks.base import Example, Prompt, RewardFunction, Task, unknown_name
from grpo_jax.tasks.indexed import Indexed
from grpo_jax.tasks.rewards.golds import check_answer, graders_of
from grpo_jax.tasks.rewards.loading import Reward, accuracy_of, check_columns, files_of, weighted
from grpo_jax.tasks.rewards.scoring import RESERVED

PARQUET = (".parquet", ".pq")
Row: TypeAlias = dict[str, Any]


def table_task(
  path: str,
  reward: Reward | Sequence[Reward],
  *,
  weights: Sequence[float] | None = None,
  accuracy: Reward | None = None,
  prompt: str = "prompt",
  rename: Mapping[str, str] | None = None,
  eval_fraction: float = 0.1,
  key: str | None = None,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> Task:
  """Builds a task from a file and one or more reward functions.

  Every row is checked once, here, and built-in graders read its answer. Afterwards a row is read
  when its example is accessed.

  Args:
    path: a Parquet file if it ends in .parquet or .pq, otherwise UTF-8 text with one JSON object
      per line (blank lines are skipped).
    reward: one reward or a list of them. A reward is the name of a built-in one ("math",
      "numeric", "exact", "format"), {"name": ...} with its settings, 'path/to/file.py:function',
      'module:function', or a function.
    weights: one weight per reward; None: 1.0 each.
    accuracy: the function that returns exactly 1.0 for a correct answer, given like `reward`.
      None: the first reward.
    prompt: name of the column with the prompt.
    rename: {name in the file: name for the reward function}. A built-in grader needs `answer`.
    eval_fraction: fraction of the distinct keys that is held out for evaluation, in [0, 1).
    key: name in the file of the column that identifies a problem. Rows with the same key are in
      the same split. None: the prompt.
    stop: strings that end the generation.
    seed: selects the keys that are held out.

  Raises:
    ValueError: a setting or a row is invalid; the message has the number of the line or row.
    RewardError: a reward function requires a column that the file does not have.
    FileNotFoundError: the file does not exist.
    ImportError: the file is a Parquet file, and pyarrow is not installed.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...   _ = file.write('{"prompt": "2 + 3 =", "answer": 5}\\n')
    ...   _ = file.write('{"prompt": "2 + 2 =", "answer": 4}\\n')
    ...   file.flush()
    ...   task = table_task(file.name, "numeric", eval_fraction=0.5)
    >>> {split: len(examples) for split, examples in task.splits.items()}
    {'train': 1, 'eval': 1}
  """
  if not 0 <= eval_fraction < 1:
    raise ValueError(f"eval_fraction is {eval_fraction}: it must be in [0, 1)")
  rewards = weighted(reward, weights)
  accuracy_function, extract_answer = accuracy_of(rewards, accuracy)
  rows = _Rows(_open(path), prompt, key, dict(rename or {}))
  functions = {name: function for name, (function, _) in rewards.items()}
  digests = _scan(rows, seed, {**functions, "accuracy": accuracy_function})
  held_out = _held_out(digests, eval_fraction)
  is_eval = np.array([digest in held_out for digest in digests])
  return Task(
    name=f"table:{Path(path).name}",
    splits={
      "train": Indexed(rows.example, np.flatnonzero(~is_eval)),
      "eval": Indexed(rows.example, np.flatnonzero(is_eval)),
    },
    rewards=rewards,
    accuracy=accuracy_function,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=extract_answer,
    files=(str(path), *files_of([reward, accuracy])),
  )


# --- files: row i as a dict, and its position for messages ----------------------------------------


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
      row = json.loads(text)
    except UnicodeDecodeError as error:
      raise ValueError(f"{self.where(i)}: not UTF-8 text: {error.reason} in {line[:80]!r}") from (
        error
      )
    except (json.JSONDecodeError, RecursionError) as error:
      reason = (
        f"{error.msg} (column {error.colno})" if hasattr(error, "msg") else "nested too deeply"
      )
      raise ValueError(f"{self.where(i)}: not JSON: {reason}: {text[:80]!r}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{self.where(i)}: must be a JSON object with a prompt, got {text[:80]!r}")
    return row


class Parquet:
  """The rows of a Parquet file. It stores Arrow columns and converts a row on access.

  The file is read as a whole: its smallest readable piece is a row group, and in a shuffled order
  nearly every row would decode another row group.
  """

  def __init__(self, path: str) -> None:
    extras.require("tasks", f"{path}: reading Parquet files", "pyarrow")
    from pyarrow import ArrowInvalid, parquet

    try:
      self._table = parquet.read_table(path).combine_chunks()
    except ArrowInvalid as error:
      raise ValueError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error
    self.path = path
    if not len(self):
      raise ValueError(f"{path} contains no examples: it has no rows")

  def __len__(self) -> int:
    return self._table.num_rows

  def where(self, i: int) -> str:
    """Returns the file and row number of row i."""
    return f"{self.path}, row {i + 1}"

  def __getitem__(self, i: int) -> Row:
    return self._table.slice(i, 1).to_pylist()[0]


def _open(path: str) -> JsonLines | Parquet:
  if not Path(path).is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  return Parquet(path) if Path(path).suffix.lower() in PARQUET else JsonLines(path)


# --- from rows to examples ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
  """The examples of a file by row number."""

  source: JsonLines | Parquet
  prompt: str
  key: str | None
  rename: Mapping[str, str]

  def example(self, i: int) -> Example:
    row, where = self.source[i], self.source.where(i)
    prompt = _checked_prompt(row, self.prompt, where)
    if self.key is not None and self.key not in row:
      raise unknown_name(f"key column (in {where})", self.key, row)
    identity = prompt if self.key is None else row[self.key]
    if not isinstance(identity, str):
      identity = json.dumps(identity, sort_keys=True, default=str)
    columns = self._columns({n: v for n, v in row.items() if n != self.prompt}, where)
    return Example(prompt, columns, " ".join(identity.split()))

  def _columns(self, row: Row, where: str) -> Row:
    for old in self.rename:
      if old not in row:
        raise unknown_name(f"column to rename (in {where})", old, row)
    columns = {self.rename.get(name, name): value for name, value in row.items()}
    if len(columns) < len(row):
      raise ValueError(f"{where}: rename={dict(self.rename)} gives two columns the same name")
    for name in RESERVED:
      if name in columns:
        raise ValueError(
          f"{where}: a column must not be called {name!r}: reward functions are called with an "
          f"argument of that name. Rename it: rename={{{name!r}: 'data_{name}'}}"
          + (", or set `prompt` if it is the prompt" if name == "prompts" else "")
        )
    return columns


def _scan(rows: _Rows, seed: int, functions: Mapping[str, RewardFunction]) -> list[bytes]:
  """Checks all rows, and that `functions` can read them; returns a digest of each key."""
  digests: list[bytes] = []
  names: set[str] = set()
  graders = graders_of(functions.values())
  answer_column = next((old for old, new in rows.rename.items() if new == "answer"), "answer")
  for i in range(len(rows.source)):
    example = rows.example(i)
    if not i:
      names = set(example.columns)
      check_columns(functions, names, rows.source.path)
    if set(example.columns) != names:
      differing = ", ".join(sorted(set(example.columns) ^ names))
      first = rows.source.where(0).rpartition(", ")[2]
      raise ValueError(
        f"{rows.source.where(i)}: does not have the columns of {first}; they differ in: "
        f"{differing}. Give every line the same columns (null where there is no value)"
      )
    check_answer(graders, example.columns.get("answer"), rows.source.where(i), answer_column)
    digests.append(hashlib.sha256(f"{seed}\n{example.key}".encode()).digest())
  return digests


def _checked_prompt(row: Row, column: str, where: str) -> Prompt:
  """Returns the prompt of a row; ValueError unless it is non-empty text or chat messages."""
  if column not in row:
    raise ValueError(
      f"{where}: no column {column!r}; it has: {', '.join(row) or 'none'}. Set `prompt` to the "
      "column with the prompt"
    )
  prompt = row[column]
  if isinstance(prompt, str) and prompt.strip():
    return prompt
  if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
    return prompt
  raise ValueError(
    f"{where}: {column!r} must be non-empty text, or a list of chat messages such as "
    f'{{"role": "user", "content": "..."}}, got {json.dumps(prompt, default=str)[:80]}'
  )


def _is_message(message: object) -> bool:
  return isinstance(message, dict) and all(
    isinstance(message.get(field), str) for field in ("role", "content")
  )


def _held_out(digests: Sequence[bytes], fraction: float) -> set[bytes]:
  """Returns about `fraction` of the distinct keys, independent of the order of the rows."""
  if fraction == 0:
    return set()
  ranked = sorted(set(digests))
  if len(ranked) < 2:
    raise ValueError(
      f"cannot hold out eval_fraction={fraction}: all lines are the same problem. Add lines, set "
      "`key` to a column that tells problems apart, or set eval_fraction=0"
    )
  return set(ranked[: min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)])
