"""Does a test notice when a line of `grpo_jax/core` is wrong?

    python -m tools.mutants                    # all files; `--only terms.py`, `--jobs 2`
    python -m tools.mutants > docs/mutants.md  # and record the result

Each mutant is one small change of one expression: an operator, a constant, an argument, a
`stop_gradient` left out. jax and pytest are imported once; every mutant gets a fork in which an
import hook serves the changed module. A first run without changes records which tests execute which
statement and how long each takes: a mutant meets the tests of its module first, then all that
execute it, then all there are, and is done with when one of them fails. One that runs into the
time limit counts as noticed.

Survivors that cannot be noticed are listed with the reason in `mutants_explained.py`, and meet the
tests of their module only. The command fails when there are others, or a reason without a survivor.

`--record FILE` appends each verdict to FILE as it comes, and takes those over that stand there, as
long as the mutated file and the test file that noticed are unchanged; if not, that test is the
first one tried.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.mutants_explained import EXPLAINED
from tools.mutants_forks import CORE, prepare, record_baseline, run_all
from tools.mutants_page import reason, report
from tools.mutations import Mutant, find_mutants

_TESTED = (
  *("advantages", "masks", "terms", "logprobs", "losses", "algorithms", "golden", "signatures"),
  *("testing", "core_more", "unbiased"),
)
TESTS = [*[f"tests/test_{name}.py" for name in _TESTED], "grpo_jax/core"]


def rounds(mutant: Mutant, baseline: dict, first: str) -> list[list[str]]:
  """Which tests to try, quick ones first: the module's own, those that execute it, all others."""
  every = sorted(baseline["seconds"], key=lambda t: (t != first, baseline["seconds"][t]))
  hit = [mutant.file, mutant.statement]
  executing = [t for t in every if not mutant.function or hit in baseline["hits"][t]]
  homes = (f"tests/test_{mutant.file}", "tests/test_core_more", f"grpo_jax/core/{mutant.file}")
  own = [t for t in executing if t.startswith(homes) or t == first]
  if reason(mutant):
    return [own or executing]
  parts = (own, [t for t in executing if t not in own], [t for t in every if t not in executing])
  return [tests for tests in parts if tests]


def judge(todo: dict[Mutant, list[list[str]]], jobs: int, limit: float) -> Iterator[tuple]:
  """(mutant, verdict, by which test), with the rounds of each."""
  kills: dict[str, int] = {}
  while todo:
    left = {}

    def this_round(todo=todo):
      for m, (now, *_) in todo.items():  # what noticed much already comes first
        yield m, now[:1] + sorted(now[1:], key=lambda t: -kills.get(f"{m.file} {t}", 0))

    for mutant, verdict, by in run_all(this_round(), jobs, limit):
      kills[f"{mutant.file} {by}"] = kills.get(f"{mutant.file} {by}", 0) + 1
      progress(f"{mutant.file}:{mutant.line} {verdict} {by}: {mutant.before} -> {mutant.after}")
      later = todo[mutant][1:]
      if later and verdict == "survived":
        left[mutant] = later
      else:
        yield mutant, verdict, by
    progress(f"{len(left)} left for the next round")
    todo = left


class Record:
  """Verdicts in a file of JSON lines; the last one of a mutant counts."""

  def __init__(self, path: str | None):
    self.path, self.rows = path, {}
    if path and Path(path).exists():
      rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
      self.rows = {" ".join(row["mutant"]): row for row in rows}

  def verdict(self, mutant: Mutant) -> str | None:
    """What is known and still holds. Unexplained survivors are tried again: tests may be new."""
    row = self.rows.get(" ".join(mutant.key))
    if not row or row["digests"] != self._digests(mutant, row["by"]):
      return None
    return None if row["verdict"] == "survived" and not reason(mutant) else row["verdict"]

  def first(self, mutant: Mutant) -> str:
    return self.rows.get(" ".join(mutant.key), {"by": ""})["by"]

  def add(self, mutant: Mutant, verdict: str, by: str) -> None:
    if self.path:
      row = {"mutant": mutant.key, "verdict": verdict, "by": by}
      with open(self.path, "a") as file:
        print(json.dumps(row | {"digests": self._digests(mutant, by)}), file=file)

  def _digests(self, mutant: Mutant, by: str) -> list[str]:
    files = [CORE / mutant.file, *([Path(by.partition("::")[0])] if by else [])]
    return [hashlib.sha256(f.read_bytes()).hexdigest() if f.exists() else "" for f in files]


def judge_all(mutants: list[Mutant], args: argparse.Namespace) -> dict[Mutant, str]:
  """The verdicts, in the order of `mutants`; runs in the copy that `prepare` made."""
  record = Record(args.record)
  verdicts = {m: record.verdict(m) for m in mutants}
  todo = [m for m in mutants if not verdicts[m]]
  progress(f"{len(mutants)} mutants, {len(todo)} to try")
  if todo:
    baseline = record_baseline(args.tests, Path("baseline.json"))
    progress(f"{len(baseline['seconds'])} tests, {sum(baseline['seconds'].values()):.0f} s")
    parts = {m: rounds(m, baseline, record.first(m))[: 1 if args.own else None] for m in todo}
    parts = {m: tests for m, tests in parts.items() if tests}
    for mutant, verdict, by in judge(parts, args.jobs, args.limit):
      verdicts[mutant] = verdict
      record.add(mutant, verdict, by)
  return {m: v or "survived" for m, v in verdicts.items()}


def progress(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", help="one file of grpo_jax/core, by name")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--limit", type=float, default=240.0, help="seconds per mutant and round")
  parser.add_argument("--tests", nargs="*", default=TESTS)
  parser.add_argument("--own", action="store_true", help="only the tests of the mutated module")
  parser.add_argument("--record", type=os.path.abspath, help="file of verdicts, read and appended")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    prepare(folder)
    files = [CORE / args.only] if args.only else sorted(CORE.glob("*.py"))
    mutants = [m for file in files for m in find_mutants(file)]
    verdicts = judge_all(mutants, args)
  print(report(verdicts))
  survived = {m.key for m, verdict in verdicts.items() if verdict == "survived"}
  names = tuple(file.name for file in files)
  explained = {(p, c) for p, known in EXPLAINED.items() for c in known if p.startswith(names)}
  for place, change in sorted(explained - survived):
    progress(f"explained, but it does not survive: {place}: {change}")
  return int(survived != explained)


if __name__ == "__main__":
  raise SystemExit(main())
