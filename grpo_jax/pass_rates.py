"""Measures the pass rate of each problem, and writes the problems whose rate lies in a range.

The counts are kept in a file beside the result, one line a batch. An interrupted command therefore
continues with the next batch, and another range takes no new completions.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from grpo_jax.config import differences
from grpo_jax.evaluate import Answers
from grpo_jax.run.workdir import write_whole
from grpo_jax.tasks.base import Example, unknown_name
from grpo_jax.tasks.rewards.logs import as_json

SUFFIX = ".rates"  # of the file with the counts, after the name of the result
_BAR = 40  # width of the longest bar of the histogram in characters


@dataclass(frozen=True)
class Selection:
  """A range of pass rates, both ends included, and where the problems in it are written.

  Attributes:
    low, high: of the share of right completions.
    samples: completions per problem.
    path: the result, JSON lines.
    split: of the problems.
  """

  low: Fraction
  high: Fraction
  samples: int
  path: Path
  split: str = "train"

  @classmethod
  def parse(cls, keep: str, samples: int, out: str | None, split: str | None) -> "Selection":
    """Returns the selection that the flags of a command describe.

    Raises:
      ValueError: the range is not one, no pass rate of so many samples lies in it, or the file
        cannot be the result.

    Example:
      >>> selection = Selection.parse("0.2:0.8", 5, "kept.jsonl", None)
      >>> [selection.holds(right) for right in range(6)]
      [False, True, True, True, True, False]
    """
    try:
      low, high = map(Fraction, keep.split(":"))
    except (ValueError, ZeroDivisionError):
      raise ValueError(f"--keep is {keep!r}: write LOW:HIGH, such as 0.2:0.8") from None
    if not 0 <= low <= high <= 1:
      raise ValueError(f"--keep is {keep!r}: it must be LOW:HIGH with 0 <= LOW <= HIGH <= 1")
    if samples < 1:
      raise ValueError(f"--samples is {samples}: a pass rate needs at least 1 completion")
    if not out:
      raise ValueError("--keep needs --out FILE.jsonl, the file for the problems")
    path = Path(out).expanduser()
    if path.suffix != ".jsonl" or path.is_dir():
      raise ValueError(
        f"--out is {out!r}: with --keep it is a file of JSON lines; name it so that it ends in "
        ".jsonl"
      )
    if path.exists() and not rates_of(path).exists():
      raise ValueError(
        f"--out is {out!r}, which exists, and not {rates_of(path).name} beside it: another program "
        "has written it. Name another file"
      )
    selection = cls(low, high, samples, path, split or "train")
    if not any(map(selection.holds, range(samples + 1))):
      raise ValueError(
        f"--keep is {keep!r}, but a pass rate of {samples} completions is a multiple of "
        f"1/{samples}, and none of them lies in this range: widen it, or raise --samples"
      )
    return selection

  def holds(self, right: int) -> bool:
    """Tells whether a problem with so many right completions is kept."""
    return self.low <= Fraction(right, self.samples) <= self.high

  def problems(self, splits: Mapping[str, Sequence[Example]]) -> Sequence[Example]:
    """Returns the problems to choose from.

    Raises:
      ValueError: there is no such split, or it is empty.
    """
    if self.split not in splits:
      raise unknown_name("--split", self.split, splits)
    if not splits[self.split]:
      raise ValueError(f"the split {self.split!r} is empty: there are no problems to choose from")
    return splits[self.split]


def rates_of(path: Path) -> Path:
  """Returns the file with the counts that belongs to a result."""
  return path.with_name(path.name + SUFFIX)


class Rates:
  """Counts of right completions in a file: a line that says of what, then a line a batch.

  Args:
    path: the file; it is continued if it exists. A line that was written in part is removed.
    about: everything that the completions depend on. A file about something else is refused.
    samples: completions per problem.

  Attributes:
    right: right completions of each problem so far, in the order of the problems.
    missing: completions that could not be judged, among those counted as wrong.

  Raises:
    ValueError: the file is about something else, or damaged.
  """

  def __init__(self, path: Path, about: Mapping[str, Any], samples: int) -> None:
    self._path, self._samples = path, samples
    self.right: list[int] = []
    self.missing = 0
    about = json.loads(json.dumps(as_json(about)))
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    head, *lines = whole.splitlines() or [b""]
    if not whole:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_whole(path, json.dumps({"about": about}) + "\n")
      return
    try:
      before = json.loads(head)["about"]
      for line in lines:
        self._take(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} is damaged ({type(error).__name__}: {error}): remove it, and all problems are "
        "measured again"
      ) from error
    if changes := differences(before, about):
      raise ValueError(
        f"{path} holds pass rates of other completions ({'; '.join(changes)}): remove it, or name "
        "another --out"
      )
    os.truncate(path, len(whole))

  def add(self, right: Sequence[int], missing: int) -> None:
    """Appends a batch, which is on the disk when this returns."""
    row = {"first": len(self.right), "right": list(right), "missing": missing}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())
    self._take(row)

  def _take(self, row: Mapping[str, Any]) -> None:
    if row["first"] != len(self.right):
      raise ValueError(f"a line begins at problem {row['first']} and not at {len(self.right)}")
    right, missing = row["right"], row["missing"]
    if not all(type(n) is int and 0 <= n <= self._samples for n in (*right, missing and 0)):
      raise ValueError(f"a line counts more than {self._samples} or less than 0 completions")
    self.right += right
    self.missing += missing


def measure(
  answers: Callable[[int], Iterator[Answers]],
  rates: Rates,
  size: int,
  log: Callable[[str], object] = print,
) -> None:
  """Counts the right completions of the problems that have not been counted yet.

  Args:
    answers: index of the first problem -> batches of judged completions, from that problem on.
    rates: the counts so far.
    size: number of problems.
    log: called with a line about the progress after each batch.
  """
  if len(rates.right) >= size:
    return
  if rates.right:
    log(f"continuing after {len(rates.right)} of {size} problems")
  for batch in answers(len(rates.right)):
    rates.add([int(n) for n in (batch.right == 1).sum(-1)], batch.missing)
    log(f"{len(rates.right)} of {size} problems")


def row_of(example: Example, rate: Fraction, system: str = "") -> dict[str, Any]:
  """Returns the row of a problem, with its `pass_rate`.

  It is the row of the data that the example is made of. Without one, it holds the prompt, the
  columns and the key, and the task `table` reads it.

  Args:
    system: text of a system turn that was put before the messages, and is left out of the row.

  Example:
    >>> row_of(Example("2 + 2 =", {"answer": 4}, "2 + 2"), Fraction(1, 4))
    {'prompt': '2 + 2 =', 'answer': 4, 'key': '2 + 2', 'pass_rate': 0.25}
  """
  if example.row is not None:
    return {**as_json(example.row), "pass_rate": float(rate)}
  prompt = example.prompt
  if system and not isinstance(prompt, str) and prompt[0]["content"] == system:
    prompt = prompt[1:]
  row = {"prompt": prompt, **as_json(example.columns)}
  row.setdefault("key", example.key)
  return {**row, "prompt": prompt, "pass_rate": float(rate)}


def write(
  selection: Selection, right: Sequence[int], examples: Sequence[Example], system: str = ""
) -> int:
  """Writes the selected problems in their order, and returns their number.

  Args:
    right: right completions of each problem.
    examples: the problems.
    system: as in `row_of`.

  Raises:
    ValueError: none is selected; nothing is written.
  """
  rows = [
    row_of(examples[i], Fraction(n, selection.samples), system)
    for i, n in enumerate(right)
    if selection.holds(n)
  ]
  if not rows:
    raise ValueError(
      f"none of the {len(right)} problems has a pass rate from {float(selection.low):g} to "
      f"{float(selection.high):g}, so {selection.path} is not written. The same command with "
      "another --keep takes no new completions"
    )
  write_whole(selection.path, "".join(json.dumps(row) + "\n" for row in rows))
  return len(rows)


def histogram(selection: Selection, right: Sequence[int]) -> str:
  """Formats the number of problems of each pass rate; those that are kept have a mark.

  Example:
    >>> selection = Selection.parse("0.5:1", 2, "kept.jsonl", None)
    >>> print(histogram(selection, [0, 0, 1]))
      0/2       2  ########################################
    * 1/2       1  ####################
    * 2/2       0
  """
  counts, n = Counter(right), selection.samples
  longest = max(counts.values())
  lines = []
  for k in range(n + 1):
    mark, bar = "*" if selection.holds(k) else " ", "#" * round(_BAR * counts[k] / longest)
    lines.append(f"{mark} {f'{k}/{n}':<5} {counts[k]:>5}  {bar}".rstrip())
  return "\n".join(lines)
