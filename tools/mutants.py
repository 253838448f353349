"""Tests whether the tests notice a wrong line of `grpo_jax/core`.

    python -m tools.mutants                    # all files; `--only kl.py`, `--jobs 2`
    python -m tools.mutants > docs/mutants.md  # writes the page

Each mutant is one small change of one expression: another operator, constant or argument, or a
missing `stop_gradient`. jax and pytest are imported once. Every mutant runs in a fork, in which an
import hook serves the changed module. A first run without changes records the statements that each
test executes and its duration. A mutant runs the tests of its module, then the other tests that
execute its statement, then all others, until one of them fails. A mutant that exceeds the time
limit counts as noticed.

`mutants_explained.py` lists the survivors that no test can notice, with the reason; they run the
tests of their module only. The command fails if there are other survivors, or if a reason has no
survivor.

`--record FILE` appends each verdict to FILE, and reuses the verdicts in it whose mutated file and
noticing test file are unchanged. If they have changed, that test is tried first.
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

TESTS = ["tests/core", "tests/test_testing.py", "grpo_jax/core"]


def rounds(mutant: Mutant, baseline: dict, first: str) -> list[list[str]]:
  """Returns the tests to try, quick ones first: those of the module, those that execute it, all."""
  every = sorted(baseline["seconds"], key=lambda t: (t != first, baseline["seconds"][t]))
  hit = [mutant.file, mutant.statement]
  executing = [t for t in every if not mutant.function or hit in baseline["hits"][t]]
  homes = (f"tests/core/test_{mutant.file}", f"grpo_jax/core/{mutant.file}")
  own = [t for t in executing if t.startswith(homes) or t == first]
  if reason(mutant):
    return [own or executing]
  parts = (own, [t for t in executing if t not in own], [t for t in every if t not in executing])
  return [tests for tests in parts if tests]


def judge(todo: dict[Mutant, list[list[str]]], jobs: int, limit: float) -> Iterator[tuple]:
  """Yields (mutant, verdict, noticing test); `todo` holds the rounds of tests of each mutant."""
  kills: dict[str, int] = {}
  while todo:
    left = {}

    def this_round(todo=todo):
      for m, (now, *_) in todo.items():  # tests that noticed many mutants come first
        yield m, now[:1] + sorted(now[1:], key=lambda t: -kills.get(f"{m.file} {t}", 0))

    for mutant, verdict, by in run_all(this_round(), jobs, limit):
      kills[f"{mutant.file} {by}"] = kills.get(f"{mutant.file} {by}", 0) + 1
      place = f"{mutant.file} {mutant.function}"
      progress(f"{place} {verdict} {by}: {mutant.before} -> {mutant.after}")
      later = todo[mutant][1:]
      if later and verdict == "survived":
        left[mutant] = later
      else:
        yield mutant, verdict, by
    progress(f"{len(left)} left for the next round")
    todo = left


class Record:
  """Keeps verdicts in a file of JSON lines; the last one of each mutant counts."""

  def __init__(self, path: str | None):
    self.path, self.rows = path, {}
    if path and Path(path).exists():
      rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
      self.rows = {" ".join(row["mutant"]): row for row in rows}

  def verdict(self, mutant: Mutant) -> str | None:
    """Returns a verdict that still holds, or None. Unexplained survivors are tried again."""
    row = self.rows.get(" ".join(mutant.key))
    if not row or row["digests"] != self._digests(mutant, row["by"]):
      return None
    return None if row["verdict"] == "survived" and not reason(mutant) else row["verdict"]

  def first(self, mutant: Mutant) -> str:
    """Returns the test that noticed this mutant before, or an empty string."""
    return self.rows.get(" ".join(mutant.key), {"by": ""})["by"]

  def add(self, mutant: Mutant, verdict: str, by: str) -> None:
    """Appends a verdict to the file."""
    if self.path:
      row = {"mutant": mutant.key, "verdict": verdict, "by": by}
      with open(self.path, "a") as file:
        print(json.dumps(row | {"digests": self._digests(mutant, by)}), file=file)

  def _digests(self, mutant: Mutant, by: str) -> list[str]:
    files = [CORE / mutant.file, *([Path(by.partition("::")[0])] if by else [])]
    return [hashlib.sha256(f.read_bytes()).hexdigest() if f.exists() else "" for f in files]


def judge_all(mutants: list[Mutant], args: argparse.Namespace) -> dict[Mutant, str]:
  """Returns the verdicts in the order of `mutants`. Runs in the copy that `prepare` makes."""
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
