"""Builds a task from a user's own data: files, folders or a data set of the hub, and a reward.

    {"prompt": "Name a prime between 20 and 28.", "answer": 23}
    {"prompt": [{"role": "user", "content": "And between 30 and 36?"}], "answer": 31}

Each row has a prompt (text or chat messages). Its other columns are passed to the reward function
by name, with one value per completion:

    def right(prompts, completions, answer, **columns):
      return [float(str(a) in text) for text, a in zip(completions, answer)]

A column is named by its path: `reward_model.ground_truth` is the field `ground_truth` of the column
`reward_model`, and `answers.0` the first entry of the lists in `answers`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from grpo_jax.environments.base import Environment
from grpo_jax.environments.tools import ToolName, with_environment, with_tools
from grpo_jax.tasks import hub
from grpo_jax.tasks.base import Example, Prompt, RewardFunction, Task, unknown_name
from grpo_jax.tasks.files import Row, Rows, find_files, open_rows
from grpo_jax.tasks.indexed import Indexed
from grpo_jax.tasks.messages import plain_messages
from grpo_jax.tasks.rewards.golds import check_answer, graders_of
from grpo_jax.tasks.rewards.loading import (
  Reward,
  accuracy_of,
  check_columns,
  files_of,
  load_object,
  weighted,
)
from grpo_jax.tasks.rewards.scoring import RESERVED

T = TypeVar("T", covariant=True)
# Share of the problems that is held out where no data for the evaluation are named.
EVAL_FRACTION = 0.1


def table_task(
  path: str | Sequence[str],
  reward: Reward | Sequence[Reward],
  *,
  weights: Sequence[float] | None = None,
  accuracy: Reward | None = None,
  completions: str = "text",
  prompt: str = "prompt",
  answer: str | None = None,
  rename: Mapping[str, str] | None = None,
  eval_path: str | Sequence[str] | None = None,
  eval_fraction: float | None = None,
  split: str | None = None,
  eval_split: str | None = None,
  subset: str | None = None,
  revision: str | None = None,
  key: str | None = None,
  stop: Sequence[str] = (),
  tools: Sequence[ToolName] = (),
  tool_settings: Mapping[str, Any] | None = None,
  environment: str | Callable[[], Environment] | None = None,
  seed: int = 0,
) -> Task:
  """Builds a task from data and one or more reward functions.

  Every row is checked once, here, and built-in graders read its answer. Afterwards a row is read
  when its example is accessed.

  Args:
    path: a file: Parquet if it ends in .parquet or .pq, CSV with a line of names if it ends in .csv
      (every value is text), a JSON list if it ends in .json and is one, otherwise UTF-8 text with
      one JSON object per line (blank lines are skipped). Or a list of files; a folder of them; or
      a data set of the Hugging Face hub, "owner/name". Files are read one after another, those of a
      folder in the order of their names.
    reward: one reward or a list of them. A reward is the name of a built-in one ("math",
      "numeric", "exact", "format"), {"name": ...} with its settings, 'path/to/file.py:function',
      'module:function', or a function.
    weights: one weight per reward; None: 1.0 each.
    accuracy: the function that returns exactly 1.0 for a correct answer, given like `reward`.
      None: the first reward.
    completions: form of the completions that functions get which are not built in: "text", or
      "messages", `[{"role": "assistant", "content": text}]`, as TRL passes them for chat data.
    prompt: path of the column with the prompt: text, or chat messages.
    answer: path of the column that reward functions get as `answer`; None: `answer`, if there is
      one. Built-in graders need it.
    rename: {path in the file: name for the reward function}, for other columns.
    eval_path: data for evaluation, given like `path`. Training problems with the key of a problem
      in it are left out, with a warning.
    eval_fraction: fraction of the distinct keys that is held out for evaluation, in [0, 1). None:
      `EVAL_FRACTION`, or 0 if there are data for evaluation.
    split, eval_split: splits of a folder or a data set, by the names of its files; None: "train"
      for training, and the data of `eval_path` for evaluation. With an `eval_split` alone, the
      evaluation data are that split of `path`.
    subset: config of a data set of the hub that has several.
    revision: branch, tag or commit of a data set of the hub; None: the newest state.
    key: path of the column that identifies a problem. Rows with the same key are in the same
      split. None: the prompt.
    stop: strings that end the generation.
    tools: what the model may call: "calculator", "calc", "python", 'path/to/file.py:function',
      'module:function', or functions.
    tool_settings: `format` ("hermes", "llama3", "inline", "bracket", "line"), `max_calls` and
      `result`, as in `grpo_jax.environments.tools.ToolEpisodes`.
    environment: makes the environment of an episode: 'path/to/file.py:Class', 'module:Class', or a
      class or function without arguments. Not together with `tools`.
    seed: selects the keys that are held out.

  Raises:
    ValueError: a setting or a row is invalid; the message has the number of the line or row.
    RewardError: a reward function requires a column that the file does not have.
    FileNotFoundError: a file does not exist, or a data set cannot be reached.
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
  rewards = weighted(reward, weights, completions)
  accuracy_function, extract_answer = accuracy_of(rewards, accuracy, completions)
  functions = {name: function for name, (function, _) in rewards.items()}
  names = dict(rename or {}) | ({answer: "answer"} if answer is not None else {})

  def read(files: list[str]) -> tuple[_Rows, list[bytes]]:
    rows = _Rows(open_rows(files), prompt, key, names)
    return rows, _scan(rows, seed, {**functions, "accuracy": accuracy_function}, _named(files))

  splits, files = make_splits(
    read, path, eval_path=eval_path, eval_fraction=eval_fraction, split=split,
    eval_split=eval_split, subset=subset, revision=revision,
  )  # fmt: skip
  task = Task(
    name=f"table:{title(path)}",
    splits=splits,
    rewards=rewards,
    accuracy=accuracy_function,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=extract_answer,
    files=tuple(dict.fromkeys((*files, *files_of([reward, accuracy, environment])))),
  )
  if environment is not None:
    task = with_environment(task, load_object(environment, "environment"))
  return with_tools(task, tools, tool_settings)


# --- splits ---------------------------------------------------------------------------------------


class Examples(Protocol[T]):
  """Makes examples of the rows of some files."""

  def example(self, i: int) -> T:
    """Returns the example of row i."""
    ...


def make_splits(
  read: Callable[[list[str]], tuple[Examples[T], list[bytes]]],
  path: str | Sequence[str],
  *,
  eval_path: str | Sequence[str] | None = None,
  eval_fraction: float | None = None,
  split: str | None = None,
  eval_split: str | None = None,
  subset: str | None = None,
  revision: str | None = None,
) -> tuple[dict[str, Sequence[T]], list[str]]:
  """Returns the splits "train" and "eval" of data, and the files they are from.

  Args:
    read: reads files and returns their examples, and a digest of the key of each row.
    path: as in `table_task`, like all further arguments.
  """
  has_eval = eval_path is not None or eval_split is not None
  if eval_fraction is None:
    eval_fraction = 0.0 if has_eval else EVAL_FRACTION
  if not 0 <= eval_fraction < 1:
    raise ValueError(f"eval_fraction is {eval_fraction}: it must be in [0, 1)")
  if has_eval and eval_fraction:
    raise ValueError(
      f"eval_fraction is {eval_fraction}, and eval_path or eval_split names the problems of the "
      "evaluation: leave one of them out"
    )
  files = _files(path, split, subset, revision)
  rows, digests = read(files)
  held_out = _held_out(digests, eval_fraction)
  eval_rows, eval_digests, eval_files = rows, digests, []
  if has_eval:
    eval_files = _files(path if eval_path is None else eval_path, eval_split, subset, revision)
    eval_rows, eval_digests = read(eval_files)
    held_out = set(eval_digests)
    _warn_of_overlap(sum(digest in held_out for digest in digests), len(digests), eval_files)
  train = [i for i, digest in enumerate(digests) if digest not in held_out]
  if not train:
    raise ValueError(f"{_named(files)}: every problem is in the evaluation, none is left to train")
  held = [i for i, digest in enumerate(eval_digests) if digest in held_out]
  splits = {
    "train": Indexed(rows.example, np.array(train)),
    "eval": Indexed(eval_rows.example, np.array(held, int)),
  }
  return splits, [*files, *eval_files]


def _files(
  path: str | Sequence[str], split: str | None, subset: str | None, revision: str | None
) -> list[str]:
  """Returns the files that a path, a list of paths, a folder or a hub id stands for."""
  if isinstance(path, list | tuple):
    if not path:
      raise ValueError("path is an empty list: name at least one file")
    return [file for item in path for file in _files(item, split, subset, revision)]
  if not isinstance(path, str | Path) or not str(path).strip():
    raise ValueError(
      f"path is {path!r}: it must be a file, a folder, a hub id 'owner/name' or a list of files"
    )
  path = str(path)
  place = Path(path).expanduser()
  if place.is_dir():
    return find_files(str(place), split)
  if not place.exists() and hub.is_hub_id(path):
    return hub.download(path, split=split, subset=subset, revision=revision)
  for name, value in (("split", split), ("subset", subset), ("revision", revision)):
    if value is not None:
      raise ValueError(f"{name} is {value!r}, but {path} is a file: it has one split")
  return [str(place)]


def _named(files: Sequence[str]) -> str:
  return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def title(path: str | Sequence[str]) -> str:
  """Returns a short name for the data."""
  paths = list(path) if isinstance(path, list | tuple) else [path]
  more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
  return f"{Path(str(paths[0])).name}{more}"


def _warn_of_overlap(count: int, size: int, eval_files: Sequence[str]) -> None:
  if count:
    warnings.warn(
      f"left out of training: {count} of {size} rows, whose problems are in {_named(eval_files)}",
      stacklevel=4,
    )


# --- from rows to examples ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
  """The examples of a file by row number."""

  source: Rows
  prompt: str
  key: str | None
  rename: Mapping[str, str]

  def example(self, i: int) -> Example:
    row, where = self.source[i], self.source.where(i)
    prompt = checked_prompt(row, self.prompt, where)
    columns = self._columns({n: v for n, v in row.items() if n != self.prompt}, where)
    return Example(prompt, columns, key_of(row, self.key, prompt, where), row)

  def _columns(self, row: Row, where: str) -> Row:
    columns = {name: value for name, value in row.items() if name not in self.rename}
    for old, new in self.rename.items():
      value = pick(row, old, "column to rename", where)
      if new in columns:
        raise ValueError(f"{where}: rename={dict(self.rename)} gives two columns the same name")
      columns[new] = value
    for name in RESERVED:
      if name in columns:
        raise ValueError(
          f"{where}: a column must not be called {name!r}: reward functions are called with an "
          f"argument of that name. Rename it: rename={{{name!r}: 'data_{name}'}}"
          + (", or set `prompt` if it is the prompt" if name == "prompts" else "")
        )
    return columns


def pick(row: Row, path: str, kind: str, where: str) -> Any:
  """Returns the value at a path of names and indices; a column may itself have dots in its name.

  Raises:
    ValueError: it leads nowhere.
  """
  if path in row:
    return row[path]
  value: Any = row
  done: list[str] = []
  for part in path.split("."):
    if isinstance(value, dict) and part in value:
      value = value[part]
    elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
      value = value[int(part)]
    elif not done:
      raise unknown_name(f"{kind} (in {where})", path, row)
    else:
      held = f"the fields {', '.join(value)}" if isinstance(value, dict) else repr(value)[:80]
      raise ValueError(f"{where}: no {path!r}: {'.'.join(done)!r} holds {held}")
    done.append(part)
  return value


def key_of(row: Row, column: str | None, prompt: Prompt, where: str) -> str:
  """Returns the key of the problem in a row: its key column, or its prompt if that is None."""
  identity = prompt if column is None else pick(row, column, "key column", where)
  if not isinstance(identity, str):
    identity = json.dumps(identity, sort_keys=True, default=str)
  return " ".join(identity.split())


def _scan(
  rows: _Rows, seed: int, functions: Mapping[str, RewardFunction], source: str
) -> list[bytes]:
  """Checks all rows, and that `functions` can read them; returns a digest of each key."""
  digests: list[bytes] = []
  names: set[str] = set()
  graders = graders_of(functions.values())
  answer_column = next((old for old, new in rows.rename.items() if new == "answer"), "answer")
  for i in range(len(rows.source)):
    example = rows.example(i)
    if not i:
      names = set(example.columns)
      check_columns(functions, names, source)
    if set(example.columns) != names:
      differing = ", ".join(sorted(set(example.columns) ^ names))
      first, here = (rows.source.where(n).rpartition(", ") for n in (0, i))
      first = first[2] if first[0] == here[0] else rows.source.where(0)
      raise ValueError(
        f"{rows.source.where(i)}: does not have the columns of {first}; they differ in: "
        f"{differing}. Give every line the same columns (null where there is no value)"
      )
    check_answer(graders, example.columns.get("answer"), rows.source.where(i), answer_column)
    digests.append(digest_of(example.key, seed))
  return digests


def digest_of(key: str, seed: int) -> bytes:
  """Returns what ranks a problem, given by its key, among those that may be held out."""
  return hashlib.sha256(f"{seed}\n{key}".encode()).digest()


def checked_prompt(row: Row, column: str, where: str) -> Prompt:
  """Returns the prompt of a row; ValueError unless it is non-empty text or chat messages."""
  if column not in row and column.split(".")[0] not in row:
    raise ValueError(
      f"{where}: no column {column!r}; it has: {', '.join(row) or 'none'}. Set `prompt` to the "
      "column with the prompt"
    )
  prompt = pick(row, column, "prompt column", where)
  if isinstance(prompt, str) and prompt.strip():
    return prompt
  messages = plain_messages(prompt)
  if messages is not None:
    return messages
  raise ValueError(
    f"{where}: {column!r} must be non-empty text, or a list of chat messages such as "
    f'{{"role": "user", "content": "..."}}, whose content may also be a list of parts such as '
    f'{{"type": "text", "text": "..."}}, got {json.dumps(prompt, default=str)[:200]}'
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
