"""Sweeps the scorers of all reasoning-gym data sets with wrong answers, and writes the page of it.

python -m tools.scorers > docs/scorers.md
"""

import contextlib
import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.tasks.rewards import foreign

SECONDS = 60  # for all problems of a data set
PROBLEMS = 4
WRONG = (
  "", " ", "\n", "banana", "None", "null", "nan", "inf", "-inf", "1e400", "True", "[]", "[[]]",
  "{}", "()", '{"a": 1}', "0", "1", "-1", "[1]", "0/0", "?", ",", "x", "a b c",
)  # fmt: skip
HEAD = """# What the scorers of reasoning-gym take for right

Each data set of reasoning-gym brings its own scorer. Each was given wrong answers: empty text,
words, numbers that are not, other types, the answers of other problems, and the right answer with a
word before or after it, repeated, or cut. The table has every data set whose scorer gave the full
score to one of them, or evaluates the answer; the other {others} of {count} gave it to none. Some
full scores are right: a problem may have several solutions, and a number may be rounded.

What is done: an answer that a scorer would evaluate reaches it as checked text only (`CLEAN`); a
full score is held to a rule (`CONFIRM`); a scorer that misjudges right answers is replaced
(`REPLACED`). All three are in `grpo_jax/tasks/rewards/foreign.py`, and all rewards run in isolated
processes. Empty answers score 0 everywhere. Written by `python -m tools.scorers > docs/scorers.md`.

| data set | wrong answers with full score, of {per_set} | with the guard | guard | example |
|---|---|---|---|---|"""


def main() -> None:
  """Prints the page."""
  warnings.simplefilter("ignore")
  from reasoning_gym.factory import DATASETS

  names = sorted(set(DATASETS) - {"composite"})
  rows, per_set = [], 0
  for name in names:
    result = _sweep(name)
    print(f"{name}: {result[:2]}", file=sys.stderr)
    before, after, tried, example = result
    per_set = max(per_set, tried)
    guard = next(
      (
        f"{kind}: `{getattr(table[name], '__name__', 'same_number')}`"
        for kind, table in (("replaced", foreign.REPLACED), ("confirmed", foreign.CONFIRM))
        if name in table
      ),
      "",
    )
    if name in foreign.CLEAN:
      guard = ", ".join(filter(None, [f"cleaned: `{foreign.CLEAN[name].__name__}`", guard]))
    if before or guard:
      rows.append(f"| `{name}` | {before} | {after} | {guard or '—'} | {_cell(example)} |")
  print(HEAD.format(others=len(names) - len(rows), count=len(names), per_set=per_set))
  print("\n".join(rows))


def _sweep(name: str) -> tuple[int, int, int, str]:
  """Returns (full scores, full scores with the guard, answers tried, one of the former)."""
  from reasoning_gym.factory import create_dataset

  before = after = tried = 0
  example = ""
  with _limited(SECONDS), contextlib.redirect_stdout(io.StringIO()):
    dataset = create_dataset(name, seed=11, size=PROBLEMS + 2)
    entries = [dataset[i] for i in range(PROBLEMS + 2)]
    for entry in entries[:PROBLEMS]:
      for answer in _wrong_answers(entry, entries):
        tried += 1
        if _full(
          lambda a, e: 0.0 if _evaluates(name, a) else dataset.score_answer(a, e), answer, entry
        ):
          before, example = before + 1, example or answer
        after += _full(
          lambda a, e: foreign.guarded_score(name, dataset.score_answer, a, e), answer, entry
        )
  return before, after, tried, example


def _wrong_answers(entry: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[str]:
  gold = entry["answer"]
  others = [str(other["answer"]) for other in entries if other["answer"] != gold][:2]
  around = (
    [] if gold is None else [f"{gold} banana", f"banana {gold}", f"{gold}{gold}", f"{gold}"[:-1]]
  )
  for answer in (*WRONG, *others, *around):
    if gold is None or answer.strip() != str(gold).strip():
      yield answer


def _evaluates(name: str, answer: str) -> bool:
  """Returns whether the sweep itself would run the answer: those are left out."""
  return (
    name in foreign.CLEAN and "(" in answer and not foreign.CLEAN[name](answer, {"metadata": {}})
  )


def _full(score: Callable, answer: str, entry: dict[str, Any]) -> bool:
  try:
    return score(answer, entry) >= 1.0
  except TimeoutError:
    raise
  except Exception:
    return False


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
  """Ends the block after some seconds; what was counted until then stays."""

  def stop(*_: object) -> None:
    raise TimeoutError

  signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    with contextlib.suppress(TimeoutError):
      yield
  finally:
    signal.alarm(0)


def _cell(text: str) -> str:
  """Returns text for a cell of a Markdown table."""
  shown = repr(text[:40] + ("..." if len(text) > 40 else "")).replace("|", "\\|")
  return f"`{shown}`" if text else ""


if __name__ == "__main__":
  main()
