"""GSM8K: grade-school math word problems, read through tensorflow-datasets without TensorFlow.

There are 7,473 training and 1,319 test problems. They are prepared once, as ArrayRecord files with
random access: from `train.jsonl` and `test.jsonl` in the folder `jsonl`, or by a download. Later
runs read the prepared files.

References:
  Cobbe et al. 2021, arXiv 2110.14168.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from grpo_jax import extras
from grpo_jax.environments.tools import ToolName, with_tools
from grpo_jax.tasks.base import Example, Prompt, Task, unknown_name
from grpo_jax.tasks.files import JsonLines
from grpo_jax.tasks.indexed import Indexed, shuffled
from grpo_jax.tasks.rewards.golds import check_answer, graders_of
from grpo_jax.tasks.rewards.loading import Reward, accuracy_of, check_columns, files_of, weighted

DATA_DIR = "~/.cache/grpo_jax/tensorflow_datasets"
VERSION = "1.0.0"  # of the data set in tensorflow-datasets
SPLITS = ("train", "test")
DIGEST = "jsonl.sha256"  # file beside the prepared ones: SHA-256 of their JSON lines
# Ways to write the answer: name -> (instruction for the prompt, template of a solved example).
ANSWERS = {
  "boxed": (
    "Solve the problem step by step. Put the final answer, as a number alone, in \\boxed{}.",
    "{solution}\nThe answer is \\boxed{{{answer}}}.",
  ),
  "tags": (
    "Think about the problem step by step between <think> and </think>. Then give the final "
    "answer, as a number alone, between <answer> and </answer>.",
    "<think>{solution}</think><answer>{answer}</answer>",
  ),
  "hash": (
    "Solve the problem step by step. End with a line of #### and the final answer, as a number "
    "alone.",
    "{solution}\n#### {answer}",
  ),
}
FORMATS = ("chat", "completion")
SHOT_LENGTH = 260  # characters of question and solution; a tenth of the problems are that short
COLUMNS = ("question", "solution", "answer")
# A row of the prepared set: its text columns as UTF-8 bytes.
PreparedRow: TypeAlias = Mapping[str, bytes]


def gsm8k_task(
  *,
  jsonl: str | None = None,
  data_dir: str = DATA_DIR,
  format: str = "chat",
  shots: int | None = None,
  answer: str | None = None,
  system: str | None = None,
  reward: Reward | Sequence[Reward] = "numeric",
  weights: Sequence[float] | None = None,
  accuracy: Reward | None = None,
  completions: str = "text",
  eval_size: int | None = None,
  stop: Sequence[str] | None = None,
  tools: Sequence[ToolName] = (),
  tool_settings: Mapping[str, Any] | None = None,
  seed: int = 0,
) -> Task:
  """Builds the task that trains on the training problems and evaluates on the test problems.

  Reward functions get the columns `question`, `solution` (the text before "####", without the
  <<...>> calculator annotations) and `answer` (the number after "####", without commas).

  Args:
    jsonl: folder with `train.jsonl` and `test.jsonl`, lines of {"question": ..., "answer": ...};
      read if `data_dir` does not contain the prepared set. None downloads the set instead.
    data_dir: folder of the prepared set.
    format: "chat", messages for a chat template, or "completion", text for a base model that ends
      in `Q: ...` and a line `A:`.
    shots: number of solved examples before each problem. All problems have the same ones, short
      training problems that are then not trained on. None: 4 for "completion", 0 for "chat", where
      each example is a turn.
    answer: how the answer is to be written, a key of `ANSWERS`. None: "boxed" for "chat", "hash"
      (as in the data) for "completion".
    system: instruction, as the system message or the first paragraph. None: the one in `ANSWERS`,
      except that "completion" with shots needs no instruction. "": no instruction.
    reward: as in `table_task`; the default compares the last number of the answer.
    weights: as in `table_task`.
    accuracy: as in `table_task`.
    completions: as in `table_task`.
    eval_size: number of evaluation problems, the first of a shuffle by `seed`. None: all.
    stop: strings that end the generation. None: the blank line or the "Q:" after a solution for
      "completion", none for "chat".
    tools: as in `table_task`, like `tool_settings`.
    tool_settings: settings of the tools.
    seed: selects the solved examples and the evaluation problems.

  Raises:
    ValueError: a setting or a line is invalid, or a built-in grader cannot read an answer.
    FileNotFoundError: a file is missing, or the download failed.
    ImportError: tensorflow-datasets is not installed.
  """
  if format not in FORMATS:
    raise unknown_name("format", format, FORMATS)
  chat = format == "chat"
  answer = ("boxed" if chat else "hash") if answer is None else answer
  if answer not in ANSWERS:
    raise unknown_name("way to write the answer", answer, ANSWERS)
  shots = (0 if chat else 4) if shots is None else shots
  if shots < 0 or (eval_size is not None and eval_size < 0):
    raise ValueError(f"shots is {shots} and eval_size {eval_size}: neither may be negative")
  if system is None:
    system = ANSWERS[answer][0] if chat or not shots else ""
  if stop is None:
    stop = () if chat else ("\n\n",) if shots else ("\nQ:",)
  rewards = weighted(reward, weights, completions)
  accuracy_function, extract_answer = accuracy_of(rewards, accuracy, completions)
  functions = {name: function for name, (function, _) in rewards.items()}
  check_columns({**functions, "accuracy": accuracy_function}, COLUMNS, "gsm8k")

  train, test = prepared(data_dir, jsonl)
  if eval_size is not None and eval_size > len(test):
    raise ValueError(f"eval_size is {eval_size}, but there are only {len(test)} test problems")
  for split, source in {"training": train, "test": test}.items():
    _check_answers(split, source, graders_of([*functions.values(), accuracy_function]))
  order = shuffled(len(train), seed)
  shot_indices = _short_problems(train, order, shots)
  render = _Render(chat, answer, system, tuple(_columns(train, i) for i in shot_indices))
  eval_indices = range(len(test)) if eval_size is None else shuffled(len(test), seed)[:eval_size]
  task = Task(
    name="gsm8k",
    splits={
      "train": Indexed(partial(_example, train, render), sorted(set(order) - set(shot_indices))),
      "eval": Indexed(partial(_example, test, render), eval_indices),
    },
    rewards=rewards,
    accuracy=accuracy_function,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=extract_answer,
    files=(*([str(jsonl)] if jsonl else []), *files_of([reward, accuracy])),
  )
  return with_tools(task, tools, tool_settings)


# --- the prepared set -----------------------------------------------------------------------------


def prepared(
  data_dir: str, jsonl: str | None = None
) -> tuple[Sequence[PreparedRow], Sequence[PreparedRow]]:
  """Returns the training and the test rows by index, and prepares them first if necessary.

  Raises:
    ValueError: the files in `data_dir` were prepared from other lines than those in `jsonl`, or
      cannot be read by index.
    FileNotFoundError: a file is missing, or the download failed.
    ImportError: tensorflow-datasets is not installed.
  """
  # tensorflow-datasets imports the last two as well, but declares one for Linux only and the other
  # for old versions of Python only.
  modules = ("tensorflow_datasets", "array_record", "importlib_resources")
  extras.require("tasks", "the task gsm8k", *modules)
  import tensorflow_datasets as tfds

  folder = Path(data_dir).expanduser() / "gsm8k" / VERSION
  if not folder.is_dir():
    _prepare(folder.parents[1], jsonl)
  elif (
    jsonl is not None
    and Path(jsonl).is_dir()
    and _digest_of_prepared(folder) not in (None, _digest(jsonl))
  ):
    raise ValueError(
      f"{folder} was prepared from other lines than those in jsonl={jsonl}: set data_dir to "
      "another folder, or remove that one to prepare it again"
    )
  try:
    train, test = tfds.builder_from_directory(folder).as_data_source(split=["train", "test"])
  except NotImplementedError as error:  # prepared as TFRecord, which has no random access
    raise ValueError(
      f"{folder} was not prepared as ArrayRecord files and cannot be read by index: set data_dir "
      "to another folder"
    ) from error
  return train, test


def _prepare(data_dir: Path, jsonl: str | None) -> None:
  """Writes `data_dir`/gsm8k/VERSION as tensorflow-datasets does: all of it or nothing."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.text import gsm8k  # without TensorFlow it is not registered by name

  class FromLines(gsm8k.Gsm8k, skip_registration=True):
    name = "gsm8k"

    def _split_generators(
      self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, enumerate[dict[str, str]]]:
      (self.data_path / DIGEST).write_text(_digest(jsonl))
      return {split: enumerate(rows) for split, rows in rows_by_split.items()}

  rows_by_split = _read_lines(jsonl) if jsonl is not None else {}
  tfds.disable_progress_bar()
  # The prepared copy in the cloud consists of TFRecord files, and looking for it needs a network.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  builder_class = FromLines if jsonl is not None else gsm8k.Gsm8k
  try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
      builder = builder_class(data_dir=data_dir, file_format="array_record")
      builder.download_and_prepare(download_config=config)
  except Exception as error:
    if (data_dir / "gsm8k" / VERSION).is_dir():
      return  # another process has prepared it in the meantime
    if jsonl is not None:
      raise
    raise FileNotFoundError(
      f"GSM8K is not in {data_dir}, and downloading it failed: {type(error).__name__}: {error}. "
      "Without a network: set `jsonl` to a folder with train.jsonl and test.jsonl"
    ) from error


def _digest_of_prepared(folder: Path) -> str | None:
  """Returns the digest of the lines that a set was prepared from, None if it was downloaded."""
  return (folder / DIGEST).read_text() if (folder / DIGEST).is_file() else None


def _digest(jsonl: str) -> str:
  files = [(Path(jsonl) / f"{split}.jsonl").read_bytes() for split in SPLITS]
  return hashlib.sha256(b"\0".join(files)).hexdigest()


def _read_lines(jsonl: str) -> dict[str, list[dict[str, str]]]:
  """Returns the rows of both files, with the features that tensorflow-datasets gives GSM8K."""
  rows_by_split: dict[str, list[dict[str, str]]] = {}
  test_keys: set[str] = set()
  for split in reversed(SPLITS):  # test first: no training problem may be one of them
    path = Path(jsonl) / f"{split}.jsonl"
    if not path.is_file():
      raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
    source, rows_by_split[split] = JsonLines(str(path)), []
    for i in range(len(source)):
      row = source[i]
      for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
          raise ValueError(f"{source.where(i)}: {name!r} must be non-empty text")
      solution, mark, number = row["answer"].rpartition("####")
      if not mark or not number.strip():
        raise ValueError(f"{source.where(i)}: 'answer' must end in '#### ' and the number")
      if split == "train" and _key(row["question"]) in test_keys:
        raise ValueError(f"{source.where(i)}: this problem is also in test.jsonl; remove the line")
      if split == "test":
        test_keys.add(_key(row["question"]))
      features = {name: row[name] for name in ("question", "answer")}
      features |= {"annotation": solution, "short_answer": number.strip()}
      rows_by_split[split].append(features)
  return rows_by_split


# --- from rows to examples ------------------------------------------------------------------------


def _key(question: str) -> str:
  return " ".join(question.split())


def _columns(source: Sequence[PreparedRow], i: int) -> dict[str, str]:
  """Returns the columns of problem i."""
  row = source[i]
  return {
    "question": row["question"].decode("utf-8").strip(),
    "solution": re.sub(r"<<.*?>>", "", row["annotation"].decode("utf-8")).strip(),
    "answer": _answer(row),
  }


def _answer(row: PreparedRow) -> str:
  return row["short_answer"].decode("utf-8").strip().replace(",", "")


def _check_answers(split: str, source: Sequence[PreparedRow], graders: Sequence[str]) -> None:
  """Lets the built-in graders read every answer; ValueError if one of them cannot."""
  for i in range(len(source)) if graders else ():
    row = source[i]
    where = f"gsm8k, {split} problem {row['question'].decode()!r:.80}"
    check_answer(graders, _answer(row), where)


def _short_problems(source: Sequence[PreparedRow], order: Sequence[int], count: int) -> list[int]:
  """Returns the first `count` problems of `order` whose question and solution are short."""
  indices: list[int] = []
  for i in order:
    if len(indices) == count:
      break
    columns = _columns(source, i)
    if len(columns["question"]) + len(columns["solution"]) <= SHOT_LENGTH:
      indices.append(i)
  if len(indices) < count:
    raise ValueError(
      f"shots is {count}, but only {len(indices)} training problems have at most {SHOT_LENGTH} "
      "characters: lower it"
    )
  return indices


@dataclass(frozen=True)
class _Render:
  """Turns a question into a prompt."""

  chat: bool
  answer: str
  system: str
  shots: tuple[Mapping[str, str], ...]

  def __call__(self, question: str) -> Prompt:
    replies = [ANSWERS[self.answer][1].format(**shot) for shot in self.shots]
    if not self.chat:
      solved = [f"Q: {shot['question']}\nA: {reply}" for shot, reply in zip(self.shots, replies)]
      return "\n\n".join([*filter(None, [self.system]), *solved, f"Q: {question}\nA:"])
    turns = [("system", self.system)] if self.system else []
    for shot, reply in zip(self.shots, replies):
      turns += [("user", shot["question"]), ("assistant", reply)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]


def _example(source: Sequence[PreparedRow], render: _Render, i: int) -> Example:
  columns = _columns(source, i)
  return Example(render(columns["question"]), columns, _key(columns["question"]))
