"""Judges a run by its newest completions: what metrics cannot show.

`CHECKS` takes completions of a few steps, as `samples/` holds them. `python -m grpo_jax.doctor` and
the report show what they find, beside what `health` finds in the metrics.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.core.diagnosis import Finding, by_confidence
from grpo_jax.run.metrics import SAMPLES, read_samples
from grpo_jax.run.progress import groups_of

Rows = Sequence[dict[str, Any]]

STEPS = 3  # the newest ones
FEWEST = 16  # completions below which no share is a finding
LEARNED = 0.9  # accuracy from which groups of equal texts, and few mixed groups, are no illness
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SHOWN = 60  # characters of a completion in a finding


def examine(workdir: str | Path) -> list[Finding]:
  """Returns what is wrong with the newest completions of a run, the surest findings first."""
  files = sorted((Path(workdir) / SAMPLES).glob("step_*.jsonl"))[-STEPS:]
  steps = [[row for row in read_samples(file)[0] if "completion" in row] for file in files]
  return by_confidence(check(steps) for check in CHECKS)


def files_of(names: Sequence[str]) -> list[str]:
  """Chooses from the files of a work directory those that `examine` and the doctor read.

  Example:
    >>> files_of(["metrics.jsonl", "tensorboard/x", *(f"samples/step_{i}.jsonl" for i in range(5))])
    ['metrics.jsonl', 'samples/step_2.jsonl', 'samples/step_3.jsonl', 'samples/step_4.jsonl']
  """
  samples = sorted(name for name in names if name.startswith(f"{SAMPLES}/step_"))
  return [*(name for name in names if "/" not in name), *samples[-STEPS:]]


def read_leniently(text: str, answer: Any) -> bool:
  """Returns whether a text ends with an answer, to a reader who is not strict about its form.

  A number counts if it is the last number of the text, other answers if they are its last line.

  Example:
    >>> read_leniently("The answer is **1,024.00**!", "1024"), read_leniently("12 or 13", 12)
    (True, False)
    >>> read_leniently("so it is\\n B.", "b")
    True
  """
  wanted = str(answer).strip()
  if NUMBER.fullmatch(wanted):
    numbers = NUMBER.findall(text)
    return bool(numbers) and _number(numbers[-1]) == _number(wanted)
  lines = text.strip().splitlines()
  return bool(wanted and lines) and _plain(lines[-1]) == _plain(wanted)


def _number(text: str) -> float:
  return float(text.replace(",", ""))


def _plain(text: str) -> str:
  return re.sub(r"\W+", " ", text).strip().casefold()


# --- the checks -----------------------------------------------------------------------------------


def not_extracted(steps: Sequence[Rows]) -> Finding | None:
  """Finds answers that a lenient reader takes as right, and the reward does not."""
  judged = [row for rows in steps for row in rows if row.get("accuracy") is not None]
  lost = [
    row
    for row in judged
    if row["accuracy"] < 1 and "answer" in row and read_leniently(row["completion"], row["answer"])
  ]
  share = len(lost) / max(len(judged), 1)
  if len(judged) < FEWEST or share < 0.1:
    return None
  row = min(lost, key=lambda row: len(row["completion"]))
  return Finding(
    "not_extracted",
    f"{share:.0%} of the completions end with the right answer and count as wrong, such as "
    f"{row['completion'][-SHOWN:]!r} for {row['answer']!r}",
    "the reward does not find the answer in the form that the model gives it",
    "a reward that reads more forms (numeric, math), a stop string (rollout.stop), or an example "
    "of the form in the prompt",
    "likely" if share > 0.3 else "possible",
    {"share": share},
  )


def same_texts(steps: Sequence[Rows]) -> Finding | None:
  """Finds groups that hold the same wrong text again and again."""
  groups = [group for rows in steps for group in groups_of(rows)]
  count = sum(map(len, groups))
  again = sum(len(group) - len({row["completion"] for row in group}) for group in groups)
  share, accuracy = again / max(count - len(groups), 1), _accuracy(steps)
  if count < FEWEST or share < 0.8 or not accuracy < 0.3:
    return None
  return Finding(
    "same_texts",
    f"{share:.0%} of the completions that could repeat another one of their group do, and "
    f"{accuracy:.0%} are right",
    "a group of equal texts explores nothing, and its rewards are equal",
    "a higher rollout.temperature, or harder or other problems",
    "likely",
    {"repeated": share, "accuracy": accuracy},
  )


def one_prompt(steps: Sequence[Rows]) -> Finding | None:
  """Finds steps whose advantages are mostly those of one prompt of many."""
  shares = []
  for rows in steps:
    sums = [sum(abs(row.get("advantage") or 0.0) for row in group) for group in groups_of(rows)]
    if len(sums) >= 8 and sum(sums) > 0:
      shares.append(max(sums) / sum(sums))
  if not shares or min(shares) < 0.6 or _accuracy(steps) > LEARNED:
    return None
  return Finding(
    "one_prompt",
    f"one prompt has {np.mean(shares):.0%} of the advantages of a step",
    "the others have no variance, so that a step follows a single group",
    "data.curriculum=learnability, rollout.max_resamples, or a larger rollout.group_size",
    "likely",
    {"share": float(np.mean(shares))},
  )


def long_and_right(steps: Sequence[Rows]) -> Finding | None:
  """Finds a budget that cuts off completions that were about to be right.

  Right ones that nearly fill the budget say so: those a little longer are cut off.
  """
  rows = [row for rows in steps for row in rows if row.get("length") and "ended" in row]
  budget = max((row["length"] for row in rows), default=0)
  cut = [row for row in rows if row["length"] == budget and not row["ended"]]
  right = [row["length"] for row in rows if row.get("accuracy") == 1 and row["length"] < budget]
  if budget < FEWEST or len(right) < FEWEST or len(cut) < 0.1 * len(rows):
    return None
  if _accuracy([cut]) > 0.5 * _accuracy([rows]):
    return None  # to be cut off does little harm here
  near = float(np.mean(np.array(right) > 0.8 * budget))
  if near < 0.2:
    return None
  return Finding(
    "long_and_right",
    f"{near:.0%} of the right completions fill four fifths of {budget} tokens, and {len(cut)} of "
    f"{len(rows)} are cut off there",
    "longer right answers are cut off and count as wrong",
    "a larger rollout.completion_length",
    "likely",
    {"near": near, "cut": len(cut) / len(rows)},
  )


CHECKS: tuple[Callable[[Sequence[Rows]], Finding | None], ...] = (
  not_extracted,
  same_texts,
  one_prompt,
  long_and_right,
)


def _accuracy(steps: Sequence[Rows]) -> float:
  """Returns the mean accuracy of completions that were judged; NaN without one."""
  known = [row["accuracy"] for rows in steps for row in rows if row.get("accuracy") is not None]
  return sum(known) / len(known) if known else float("nan")
