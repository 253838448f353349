"""Proves the judge of programs on HumanEval: solutions pass, and changed solutions do not.

    python -m tools.human_eval HumanEval.jsonl > docs/human_eval.md

Of each solution it takes the first five changes that change what the function does, in an order
that a hash fixes. A change that the tests do not catch counts if some input, one of the tests or a
variation of it, shows a difference; it is then listed. Each verdict is compared with that of the
tests run in the program's own process, which an honest program cannot tell apart.
"""

import ast
import copy
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.environments import sandbox
from grpo_jax.environments.tester import Limits, judge
from tools import mutations

CHANGES = 5  # of each solution
HEAD = """\
# The judge on HumanEval

`make human-eval HUMAN_EVAL=HumanEval.jsonl` wrote this page (`tools/human_eval.py`) on the problems
of HumanEval (Chen et al. 2021, arXiv 2107.03374; MIT license, github.com/openai/human-eval). Every
published solution must pass its tests. Of each solution, five changes that change what it does are
judged: other operators, constants, conditions or results. A change that the tests do not catch is a
gap of the tests; it is listed with an input that shows the difference. Every verdict is compared
with that of the same tests in the program's own process, which is right where nobody cheats.
"""
LIMITS = Limits(seconds=3.0)

# Runs the tests with a function that records its arguments, varies these, and compares both.
COMPARE = """
import copy, itertools, json
first, second, seen = {first}, {second}, []
def load(source):
  namespace = {{"__name__": "compared"}}
  exec(source, namespace)
  return namespace
one, two = load(first), load(second)
def record(*args):
  seen.append(copy.deepcopy(args))
  return one[{name!r}](*args)
tests = dict(one)
exec({tests}, tests)
tests["check"](record)
def vary(x):
  if type(x) is bool: return [not x]
  if type(x) is int: return [x + 1, x - 1, -x, 0, 2 * x, x + 7]
  if type(x) is float: return [x + 0.5, -x, 0.0, x * 3]
  if type(x) is str: return [x[1:], x[:-1], x[::-1], x + x, x.swapcase(), "", x + " a", "1" + x]
  if type(x) in (list, tuple):
    more = [x[1:], x[:-1], x[::-1], x + x, x[:0]]
    for i, item in enumerate(x[:4]):
      more += [x[:i] + type(x)([new]) + x[i + 1:] for new in vary(item)[:4]]
    return more
  return []
def outcome(function, args):
  try:
    return repr(function(*copy.deepcopy(args)))
  except Exception as error:
    return type(error).__name__
inputs = list(seen)
for args in seen[:12]:
  for i, x in enumerate(args):
    inputs += [args[:i] + (new,) + args[i + 1:] for new in vary(x)]
for args in inputs:
  a = outcome(one[{name!r}], args)
  print("?", repr(args)[:60], flush=True)
  if a != outcome(two[{name!r}], args):
    print("DIFFERS")
    break
"""


@dataclasses.dataclass(frozen=True)
class Change:
  """Records one change of a solution, and what became of it.

  Attributes:
    task: name of the problem.
    text: the change.
    caught: whether the tests fail.
    agrees: whether they also fail in the program's own process.
    example: arguments for which the results differ, of a change that is not caught.
  """

  task: str
  text: str
  caught: bool
  agrees: bool
  example: str = ""


def changed(program: str, entry_point: str) -> Iterator[tuple[str, str]]:
  """Yields (description, changed program) in a fixed order, changes of every return last."""
  tree = ast.parse(program)
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "solution.py"
    file.write_text(program)
    mutants = [m for m in mutations.find_mutants(file) if m.function.startswith(entry_point)]
  for mutant in sorted(mutants, key=lambda m: hashlib.sha256(repr(m).encode()).digest()):
    new = mutations.Apply(mutant).visit(copy.deepcopy(tree))
    yield f"{mutant.before} -> {mutant.after}", ast.unparse(ast.fix_missing_locations(new))
  for template in ("None", "[{}]", "not {}", "({}, 0)", "str({}) + ' '"):
    new = copy.deepcopy(tree)
    for node in ast.walk(new):
      if isinstance(node, ast.FunctionDef) and node.name == entry_point:
        for inner in ast.walk(node):
          if isinstance(inner, ast.Return) and inner.value is not None:
            value = f"({ast.unparse(inner.value)})"
            inner.value = ast.parse(template.format(value), mode="eval").body
    yield f"return {template.format('...')}", ast.unparse(ast.fix_missing_locations(new))


def passes_in_process(program: str, row: dict[str, str]) -> bool:
  """Returns whether the tests, run in the program's own process, come to their end."""
  code = f"{program}\n{row['test']}\ncheck({row['entry_point']})\n"
  ran = sandbox.run_python(code, seconds=LIMITS.seconds)
  return ran.returncode == 0 and ran.killed is None


def difference(program: str, other: str, row: dict[str, str]) -> str:
  """Returns arguments for which two programs differ; "" if none was found."""
  code = COMPARE.format(
    first=repr(program), second=repr(other), name=row["entry_point"], tests=repr(row["test"])
  )
  ran = sandbox.run_python(code, seconds=LIMITS.seconds)
  lines = ran.stdout.splitlines()
  if "DIFFERS" in lines or ran.killed == "time":
    return next(line for line in reversed(lines) if line.startswith("? "))[2:]
  return ""


def examine(row: dict[str, str]) -> tuple[bool, list[Change]]:
  """Returns whether the solution of a problem passes, and its first changes that matter."""
  name, solution = row["entry_point"], row["prompt"] + row["canonical_solution"]
  tests = {"setup": row["prompt"], "tests": row["test"], "entry_point": name}
  right = judge(solution, tests, LIMITS).complete and passes_in_process(solution, row)
  changes: list[Change] = []
  for text, program in changed(solution, name):
    if len(changes) == CHANGES:
      break
    caught = not judge(program, tests, LIMITS).complete
    agrees = caught != passes_in_process(program, row)
    example = "" if caught else difference(solution, program, row)
    if caught or example:
      changes.append(Change(row["task_id"], text, caught, agrees, example))
  return right, changes


def main(arguments: list[str]) -> int:
  """Prints the page; the exit code says whether a solution failed or a verdict was doubted."""
  if len(arguments) != 1:
    print(__doc__, file=sys.stderr)
    return 2
  rows = [json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]
  with ThreadPoolExecutor(2) as pool:
    results = list(pool.map(examine, rows))
  right = sum(passed for passed, _ in results)
  changes = [change for _, of_one in results for change in of_one]
  missed = [change for change in changes if not change.caught]
  agree = sum(change.agrees for change in changes)
  fewer = [row["task_id"] for row, (_, c) in zip(rows, results) if len(c) < CHANGES]
  print(HEAD)
  print(
    f"| | |\n|---|---|\n| problems | {len(rows)} |\n| solutions that pass | {right} |\n"
    f"| changed solutions | {len(changes)} |\n| caught by the tests | {len(changes) - len(missed)} "
    f"|\n| same verdict as in the program's own process | {agree} |\n"
    f"| problems with fewer than {CHANGES} changes that matter | {', '.join(fewer) or 'none'} |\n"
  )
  print("| problem | change that its tests do not catch | input that shows it |\n|---|---|---|")
  for change in missed:
    text, example = (value.replace("|", "\\|") for value in (change.text, change.example))
    print(f"| {change.task} | `{text}` | `{example}` |")
  doubted = [change for change in changes if not change.agrees]
  for change in doubted:
    print(f"{change.task}: the verdicts differ: {change.text}", file=sys.stderr)
  return int(right < len(rows) or bool(doubted))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
