"""GSM8K, grade-school mathematics in words, through tensorflow-datasets (without TensorFlow).

7,473 problems to train on and 1,319 to evaluate on (Cobbe et al. 2021, arXiv 2110.14168). They are
prepared once, as ArrayRecord files with random access: from `train.jsonl` and `test.jsonl` where
`jsonl` names their folder, else downloaded by tensorflow-datasets. Later runs read what was
prepared.
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
from typing import Any

from grpo_jax import extras
from grpo_jax.tasks.base import Example, Prompt, Task, unknown
from grpo_jax.tasks.indexed import Indexed, shuffled
from grpo_jax.tasks.rewards.loading import Reward, accuracy_of, check_columns, weighted
from grpo_jax.tasks.table import JsonLines

DATA_DIR = "~/.cache/grpo_jax/tensorflow_datasets"
VERSION = "1.0.0"  # of the set in tensorflow-datasets
SPLITS = ("train", "test")
DIGEST = "jsonl.sha256"  # beside the prepared files: of the lines they were made of
# How the answer is written: what the prompt asks for, and what a solved example looks like.
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
  eval_size: int | None = None,
  stop: Sequence[str] | None = None,
  seed: int = 0,
) -> Task:
  """The published training problems to train on, the test problems to evaluate on.

  Rewards get the columns `question`, `solution` (the text before "####", without its <<...>>
  calculator notes) and `answer` (the number after "####", without commas).

  Args:
    jsonl: folder with `train.jsonl` and `test.jsonl`, lines of {"question": ..., "answer": ...};
      used if `data_dir` has not the set yet. None: what is not there is downloaded.
    data_dir: where the prepared set is kept.
    format: "chat", messages for a chat template; or "completion", text for a base model, which
      ends in `Q: ...` and a line `A:`.
    shots: solved examples shown before each problem, the same for all, short ones of the training
      problems and then not trained on. None: 4 in "completion", 0 in "chat" (each is a turn).
    answer: how the answer is to be written, a key of `ANSWERS`. None: "boxed" in "chat", "hash" (as
      in the data) in "completion".
    system: text that says what to do: the system message, or the first paragraph. None: the one of
      `ANSWERS`, but in "completion" with shots, which show it, nothing. "": nothing.
    reward, weights, accuracy: as in `table_task`; the default asks for the right number.
    eval_size: problems to evaluate on, the first of a shuffle by `seed`. None: all.
    stop: strings at which generation ends. None: the blank line or the "Q:" after a solution in
      "completion", nothing in "chat".
    seed: which examples are shown, and which are evaluated on.

  Raises ValueError for a setting or line that is not as described, FileNotFoundError for missing
  files, and ImportError where tensorflow-datasets is not installed.
  """
  if format not in FORMATS:
    raise unknown("format", format, FORMATS)
  chat = format == "chat"
  answer = ("boxed" if chat else "hash") if answer is None else answer
  if answer not in ANSWERS:
    raise unknown("way to write the answer", answer, ANSWERS)
  shots = (0 if chat else 4) if shots is None else shots
  if shots < 0 or (eval_size is not None and eval_size < 0):
    raise ValueError(f"shots is {shots} and eval_size {eval_size}: neither may be negative")
  if system is None:
    system = ANSWERS[answer][0] if chat or not shots else ""
  if stop is None:
    stop = () if chat else ("\n\n",) if shots else ("\nQ:",)
  rewards = weighted(reward, weights)
  right, vote = accuracy_of(rewards, accuracy)
  called = {name: function for name, (function, _) in rewards.items()}
  check_columns({**called, "accuracy": right}, COLUMNS, "gsm8k")

  train, test = prepared(data_dir, jsonl)
  if eval_size is not None and eval_size > len(test):
    raise ValueError(f"eval_size is {eval_size}, but there are only {len(test)} test problems")
  order = shuffled(len(train), seed)
  shown = _short(train, order, shots)
  render = _Render(chat, answer, system, tuple(_row(train, i) for i in shown))
  held_out = range(len(test)) if eval_size is None else shuffled(len(test), seed)[:eval_size]
  return Task(
    name="gsm8k",
    splits={
      "train": Indexed(partial(_example, train, render), sorted(set(order) - set(shown))),
      "eval": Indexed(partial(_example, test, render), held_out),
    },
    rewards=rewards,
    accuracy=right,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    answer=vote,
  )


# --- the prepared set -----------------------------------------------------------------------------


def prepared(data_dir: str, jsonl: str | None = None) -> tuple[Sequence[Any], Sequence[Any]]:
  """The rows of "train" and "test" by index, each a dict of bytes; prepared if they are not there.

  Files already in `data_dir` that came from other lines than those in `jsonl` are an error.
  """
  # The last two it imports too, but declares one for Linux only and the other for old Pythons.
  needed = ("tensorflow_datasets", "array_record", "importlib_resources")
  extras.require("tasks", "the task gsm8k", *needed)
  import tensorflow_datasets as tfds

  folder = Path(data_dir).expanduser() / "gsm8k" / VERSION
  if not folder.is_dir():
    _prepare(folder.parents[1], jsonl)
  elif (
    jsonl is not None and Path(jsonl).is_dir() and _made_of(folder) not in (None, _digest(jsonl))
  ):
    raise ValueError(
      f"{folder} was prepared from other lines than those in jsonl={jsonl}: set data_dir to "
      "another folder, or remove that one to prepare it anew"
    )
  try:
    train, test = tfds.builder_from_directory(folder).as_data_source(split=["train", "test"])
  except NotImplementedError as error:  # prepared as TFRecord, which has no random access
    raise ValueError(
      f"{folder} was not prepared as ArrayRecord files, and cannot be read by index: set data_dir "
      "to another folder"
    ) from error
  return train, test


def _prepare(data_dir: Path, jsonl: str | None) -> None:
  """Writes `data_dir`/gsm8k/VERSION, as tensorflow-datasets does: all of it or nothing."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.text import gsm8k  # without TensorFlow it is not registered by name

  class FromLines(gsm8k.Gsm8k, skip_registration=True):
    name = "gsm8k"

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      (self.data_path / DIGEST).write_text(_digest(jsonl))
      return {split: enumerate(rows) for split, rows in lines.items()}

  lines = _lines(jsonl) if jsonl is not None else {}
  tfds.disable_progress_bar()
  # A prepared copy in the cloud would be TFRecord files, and asking for it takes a network.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  kind = FromLines if jsonl is not None else gsm8k.Gsm8k
  try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
      builder = kind(data_dir=data_dir, file_format="array_record")
      builder.download_and_prepare(download_config=config)
  except Exception as error:
    if (data_dir / "gsm8k" / VERSION).is_dir():
      return  # another process has prepared it meanwhile
    if jsonl is not None:
      raise
    raise FileNotFoundError(
      f"GSM8K is not in {data_dir}, and downloading it failed: {type(error).__name__}: {error}. "
      "Without a network: set `jsonl` to a folder with train.jsonl and test.jsonl"
    ) from error


def _made_of(folder: Path) -> str | None:
  """Digest of the lines that a prepared set was made of, None where it was downloaded."""
  return (folder / DIGEST).read_text() if (folder / DIGEST).is_file() else None


def _digest(jsonl: str) -> str:
  files = [(Path(jsonl) / f"{split}.jsonl").read_bytes() for split in SPLITS]
  return hashlib.sha256(b"\0".join(files)).hexdigest()


def _lines(jsonl: str) -> dict[str, list[dict[str, str]]]:
  """Rows of both files with the features that tensorflow-datasets gives GSM8K."""
  rows: dict[str, list[dict[str, str]]] = {}
  tested: set[str] = set()
  for split in reversed(SPLITS):  # test first: no training problem may be one of them
    path = Path(jsonl) / f"{split}.jsonl"
    if not path.is_file():
      raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
    source, rows[split] = JsonLines(str(path)), []
    for i in range(len(source)):
      row = source[i]
      for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
          raise ValueError(f"{source.where(i)}: {name!r} must be text that is not empty")
      solution, mark, number = row["answer"].rpartition("####")
      if not mark or not number.strip():
        raise ValueError(f"{source.where(i)}: 'answer' must end in '#### ' and the number")
      if split == "train" and _key(row["question"]) in tested:
        raise ValueError(f"{source.where(i)}: this problem is in test.jsonl too; remove the line")
      if split == "test":
        tested.add(_key(row["question"]))
      texts = {"annotation": solution, "short_answer": number.strip()}
      rows[split].append({name: row[name] for name in ("question", "answer")} | texts)
  return rows


# --- from rows to examples ------------------------------------------------------------------------


def _key(question: str) -> str:
  return " ".join(question.split())


def _row(source: Sequence[Any], i: int) -> dict[str, str]:
  """The columns of problem i."""
  row = {name: value.decode("utf-8") for name, value in source[i].items()}
  return {
    "question": row["question"].strip(),
    "solution": re.sub(r"<<.*?>>", "", row["annotation"]).strip(),
    "answer": row["short_answer"].strip().replace(",", ""),
  }


def _short(source: Sequence[Any], order: Sequence[int], count: int) -> list[int]:
  """The first `count` problems in that order whose question and solution are short."""
  found: list[int] = []
  for i in order:
    if len(found) == count:
      break
    row = _row(source, i)
    if len(row["question"]) + len(row["solution"]) <= SHOT_LENGTH:
      found.append(i)
  if len(found) < count:
    raise ValueError(
      f"shots is {count}, but only {len(found)} training problems have at most {SHOT_LENGTH} "
      "characters: lower it"
    )
  return found


@dataclass(frozen=True)
class _Render:
  """Prompts from questions."""

  chat: bool
  answer: str
  system: str
  shots: tuple[Mapping[str, str], ...]

  def __call__(self, question: str) -> Prompt:
    replies = [ANSWERS[self.answer][1].format(**shot) for shot in self.shots]
    if not self.chat:
      asked = [f"Q: {shot['question']}\nA: {reply}" for shot, reply in zip(self.shots, replies)]
      return "\n\n".join([*filter(None, [self.system]), *asked, f"Q: {question}\nA:"])
    turns = [("system", self.system)] if self.system else []
    for shot, reply in zip(self.shots, replies):
      turns += [("user", shot["question"]), ("assistant", reply)]
    return [{"role": r, "content": text} for r, text in [*turns, ("user", question)]]


def _example(source: Sequence[Any], render: _Render, i: int) -> Example:
  row = _row(source, i)
  return Example(render(row["question"]), row, _key(row["question"]))
