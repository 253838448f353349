"""Your own task: a file of JSON lines and a reward function.

    {"prompt": "Name a prime between 20 and 28.", "answer": 23}
    {"prompt": [{"role": "user", "content": "And between 30 and 36?"}], "answer": 31}

Each line has a `prompt` (text, or chat messages); its other columns reach the reward function
under their own names, one value per completion:

    def right(prompts, completions, answer, **columns):
      return [float(str(a) in text) for text, a in zip(completions, answer)]
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.tasks.base import Example, RewardFunction, Task, unknown

Reward = str | RewardFunction


def jsonl_task(
  path: str,
  reward: Reward | Sequence[Reward],
  *,
  weights: Sequence[float] | None = None,
  accuracy: Reward | None = None,
  eval_fraction: float = 0.1,
  key: str | None = None,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> Task:
  """A task made of a JSONL file and one or more reward functions.

  Args:
    path: the file; UTF-8, one JSON object per line, blank lines are skipped.
    reward: 'path/to/file.py:function', 'module:function' or a function; or several of them.
    weights: one per reward, 1.0 each when not given.
    accuracy: when an answer counts as right, as a function giving 1.0 then; the default takes the
      answers to which the first reward gives exactly 1.0.
    eval_fraction: share of the distinct keys held out for evaluation, in [0, 1).
    key: the column that says which problem a line is. Lines of one key stay on one side of the
      split. Default: the prompt.
    stop: strings at which generation ends.
    seed: which keys are held out.

  Raises ValueError (with the line number) for a line that is not as described, and
  FileNotFoundError for a missing file.
  """
  if not 0 <= eval_fraction < 1:
    raise ValueError(f"eval_fraction is {eval_fraction}: it must be in [0, 1)")
  given = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
  if not given:
    raise ValueError("reward is empty: give a function or 'path/to/file.py:function'")
  weights = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
  if len(weights) != len(given):
    raise ValueError(f"{len(weights)} weights for {len(given)} rewards: give one weight each")
  functions = [load_function(item) for item in given]
  names = [_name(function) for function in functions]
  if len(set(names)) < len(names):
    raise ValueError(f"two rewards have one name in {names}: metrics are told apart by the name")
  examples = read_examples(path, key=key)
  held_out = _held_out({example.key for example in examples}, eval_fraction, seed)
  return Task(
    name=f"jsonl:{Path(path).name}",
    splits={
      "train": [example for example in examples if example.key not in held_out],
      "eval": [example for example in examples if example.key in held_out],
    },
    rewards={name: (f, weight) for name, f, weight in zip(names, functions, weights)},
    accuracy=load_function(accuracy) if accuracy is not None else _is_one(functions[0]),
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
  )


def read_examples(path: str, key: str | None = None) -> list[Example]:
  """The examples of a JSONL file, in its order; see `jsonl_task`."""
  if not Path(path).is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  examples: list[Example] = []
  first: tuple[int, set[str]] | None = None  # where the columns were first seen, and which
  for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
    where = f"{path}, line {number}"
    row = _row(line, where)
    if row is None:
      continue
    prompt = _prompt(row, where)
    columns = {name: value for name, value in row.items() if name != "prompt"}
    first = first or (number, set(columns))
    if set(columns) != first[1]:
      differing = ", ".join(sorted(set(columns) ^ first[1]))
      raise ValueError(
        f"{where}: has not the columns of line {first[0]}; they differ in: {differing}. Give every "
        "line the same columns (null where there is no value)"
      )
    for name in ("prompts", "completions"):
      if name in columns:
        raise ValueError(f"{where}: a column may not be called {name!r}: rewards get that already")
    if key is not None and key not in row:
      raise unknown(f"key column (in {where})", key, row)
    identity = prompt if key is None else row[key]
    text = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True)
    examples.append(Example(prompt, columns, " ".join(text.split())))
  if not examples:
    raise ValueError(f"{path} holds no examples: it needs one JSON object per line")
  return examples


def load_function(reward: Reward) -> RewardFunction:
  """The function itself, or what 'path/to/file.py:function' or 'module:function' names."""
  if callable(reward):
    return reward
  source, colon, name = str(reward).rpartition(":")
  if not colon or not source or not name:
    raise ValueError(
      f"{reward!r} does not name a function: write 'path/to/file.py:function' or 'module:function'"
    )
  try:
    module = _module_of_file(source) if source.endswith(".py") else importlib.import_module(source)
  except FileNotFoundError:
    raise
  except Exception as error:
    raise ValueError(f"{reward!r}: loading {source} raised {type(error).__name__}: {error}") from (
      error
    )
  function = getattr(module, name, None)
  if function is None:
    functions = [n for n, value in vars(module).items() if inspect.isroutine(value)]
    raise unknown(f"function in {source}", name, functions)
  if not callable(function):
    raise ValueError(f"{reward!r} is a {type(function).__name__}, not a function")
  return function


def _module_of_file(path: str) -> Any:
  file = Path(path).resolve()
  if not file.is_file():
    raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
  # The hash keeps two files of one name apart, and the module findable for pickle and dataclasses.
  name = f"_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def _name(function: RewardFunction) -> str:
  inner = getattr(function, "func", function)  # functools.partial keeps its function there
  return getattr(inner, "__name__", type(inner).__name__)


def _row(line: bytes, where: str) -> dict[str, Any] | None:
  try:
    text = line.decode("utf-8-sig").strip()  # some editors put a mark before the first line
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: not UTF-8 text: {error.reason} in {line[:80]!r}") from error
  if not text:
    return None
  try:
    row = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON: {error.msg} (column {error.colno}): {text[:80]!r}") from (
      error
    )
  if not isinstance(row, dict):
    raise ValueError(f"{where}: must be a JSON object with a prompt, got {text[:80]!r}")
  return row


def _prompt(row: Mapping[str, Any], where: str) -> str | list[dict[str, str]]:
  if "prompt" not in row:
    raise ValueError(f"{where}: no column 'prompt'; it has: {', '.join(row) or 'none'}")
  prompt = row["prompt"]
  if isinstance(prompt, str) and prompt.strip():
    return prompt
  if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
    return prompt
  raise ValueError(
    f"{where}: 'prompt' must be text that is not empty, or a list of chat messages such as "
    f'{{"role": "user", "content": "..."}}, got {json.dumps(prompt)[:80]}'
  )


def _is_message(message: Any) -> bool:
  return isinstance(message, dict) and all(
    isinstance(message.get(field), str) for field in ("role", "content")
  )


def _held_out(keys: set[str], fraction: float, seed: int) -> set[str]:
  """A seeded choice of about `fraction` of the keys that does not depend on the lines' order."""
  if fraction == 0:
    return set()
  if len(keys) < 2:
    raise ValueError(
      f"cannot hold out eval_fraction={fraction}: all lines are one problem. Add lines, set `key` "
      "to a column that tells problems apart, or set eval_fraction=0"
    )
  ranked = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
  return set(ranked[: min(max(round(fraction * len(keys)), 1), len(keys) - 1)])


def _is_one(function: RewardFunction) -> Callable[..., Any]:
  """1.0 where `function` gives exactly 1.0, else 0.0; asynchronous where `function` is."""

  def accuracy(prompts: Any, completions: Any, **columns: Any) -> Any:
    values = function(prompts=prompts, completions=completions, **columns)
    if not inspect.isawaitable(values):
      return [float(value == 1) for value in values]

    async def later() -> list[float]:
      return [float(value == 1) for value in await values]

    return later()

  return accuracy
