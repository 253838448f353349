"""Does a test notice when a line of `grpo_jax/core` is wrong?

    python tests/mutants.py                    # all files; `--only terms.py`, `--jobs 2`
    python tests/mutants.py > docs/mutants.md  # and record the result

Each mutant is one small change of one expression: an operator, a constant, an argument, a
`stop_gradient` left out. jax and pytest are imported once; every mutant gets a fork in which an
import hook serves the changed module. A first run without changes records which tests execute which
statement and how long each takes: a mutant meets the tests of its module first, then all that
execute it, then all there are, and is done with when one of them fails. One that runs into the
time limit counts as noticed.

Survivors that cannot be noticed are listed with the reason in `mutants_explained.py`; the command
fails when there are others.
"""

import argparse
import ast
import builtins
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mutants_explained import EXPLAINED
from mutations import Apply, Mutant, find_mutants

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "grpo_jax" / "core"
_TESTED = (
  *("advantages", "masks", "terms", "logprobs", "losses", "algorithms", "golden", "signatures"),
  *("testing", "core_more", "unbiased"),
)
TESTS = [*[f"tests/test_{name}.py" for name in _TESTED], "grpo_jax/core"]


class _Record(ast.NodeTransformer):
  """Puts `__hit__(file, line)` before every statement of every function."""

  def __init__(self, file: str):
    self.file = file

  def generic_visit(self, node):
    super().generic_visit(node)
    if not isinstance(node, ast.Module | ast.ClassDef):
      for field in ("body", "orelse"):
        if isinstance(getattr(node, field, None), list):
          setattr(node, field, self._recorded(getattr(node, field)))
    if isinstance(node, ast.FunctionDef):  # its defaults were computed at import
      node.body.insert(0, self._hit(node.lineno))
    return node

  def _recorded(self, body):
    return [x for statement in body for x in (self._hit(statement.lineno), statement)]

  def _hit(self, line):
    return ast.parse(f"__hit__({self.file!r}, {line})").body[0]


# --- running -------------------------------------------------------------------------------------


class _Hook:
  """Serves modules of core from a changed syntax tree."""

  def __init__(self, change: Callable[[str, ast.Module], ast.Module]):
    self.change = change

  def find_spec(self, name, path=None, target=None):
    package, _, module = name.rpartition(".")
    file = Path("grpo_jax", "core", f"{module}.py").resolve()  # of the copy
    if package != "grpo_jax.core" or not file.exists():
      return None
    change = self.change

    class Loader(importlib.machinery.SourceFileLoader):
      def get_code(self, fullname):
        tree = change(file.name, ast.parse(file.read_text()))
        return compile(ast.fix_missing_locations(tree), str(file), "exec")

    return importlib.util.spec_from_file_location(name, file, loader=Loader(name, str(file)))


def _fork(work: Callable[[], int]) -> int:
  pid = os.fork()
  if pid:
    return pid
  code = 70
  try:
    os.setpgid(0, 0)
    silent = os.open(os.devnull, os.O_WRONLY)
    if not os.environ.get("MUTANTS_SHOW"):
      os.dup2(silent, 1)
      os.dup2(silent, 2)
    code = int(work())
  finally:
    os._exit(code)


def _import_changed(change: Callable[[str, ast.Module], ast.Module]) -> None:
  """Before pytest, whose own import hook would come first for the files it is given."""
  sys.meta_path.insert(0, _Hook(change))
  import grpo_jax.core.losses  # noqa: F401  (and with it all of core)


def _pytest(arguments: list[str], plugins=()) -> int:
  import pytest

  options = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--tb=no"]
  return pytest.main([*options, *arguments], plugins=list(plugins))


class _Baseline:
  """Which test executes which statements, and how long it takes."""

  def __init__(self):
    self.hits, self.seconds, self.lines, self.failed = {}, {}, set(), []

  def pytest_runtest_logstart(self, nodeid):
    self.lines.clear()
    self.start = time.monotonic()

  def pytest_runtest_logreport(self, report):
    if report.failed:
      self.failed.append(report.nodeid)

  def pytest_runtest_logfinish(self, nodeid):
    self.hits[nodeid] = sorted(self.lines)
    self.seconds[nodeid] = time.monotonic() - self.start


def record_baseline(tests: list[str], out: Path) -> dict:
  def work():
    plugin = _Baseline()
    builtins.__hit__ = lambda file, line: plugin.lines.add((file, line))
    _import_changed(lambda file, tree: _Record(file).visit(tree))
    _pytest(tests, [plugin])
    out.write_text(json.dumps({k: getattr(plugin, k) for k in ("hits", "seconds", "failed")}))
    return 0

  os.waitpid(_fork(work), 0)
  baseline = json.loads(out.read_text())
  if baseline["failed"]:
    raise SystemExit(f"these fail without any change: {', '.join(baseline['failed'])}")
  return baseline


def run_mutant(mutant: Mutant, tests: list[str]) -> int:
  """Starts it; exit status 0 means that no test noticed."""

  def change(file, tree):
    return Apply(mutant).visit(tree) if file == mutant.file else tree

  def work():
    _import_changed(change)
    return 0 if _pytest(["-x", *tests]) == 0 else 1

  return _fork(work)


def run_all(todo: list[tuple[Mutant, list[str]]], jobs: int, limit: float) -> Iterator[tuple]:
  """(mutant, "survived" | "noticed" | "time limit") as they finish."""
  todo, running = list(todo)[::-1], {}
  while todo or running:
    while todo and len(running) < jobs:
      mutant, tests = todo.pop()
      running[run_mutant(mutant, tests)] = (mutant, time.monotonic())
    time.sleep(0.02)
    for pid, (mutant, start) in list(running.items()):
      done, status = os.waitpid(pid, os.WNOHANG)
      if done:
        del running[pid]
        yield mutant, "survived" if os.waitstatus_to_exitcode(status) == 0 else "noticed"
      elif time.monotonic() - start > limit:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del running[pid]
        yield mutant, "time limit"


def rounds(mutant: Mutant, baseline: dict) -> list[list[str]]:
  """Which tests to try, quick ones first: the module's own, those that execute it, then all."""
  every = sorted(baseline["seconds"], key=baseline["seconds"].get)
  hit = [mutant.file, mutant.statement]
  executing = [t for t in every if not mutant.function or hit in baseline["hits"][t]]
  homes = (f"tests/test_{mutant.file}", f"grpo_jax/core/{mutant.file}")
  own = [t for t in executing if t.startswith(homes)]
  return [tests for tests in (own, executing, every if mutant.function else []) if tests]


def judge(mutants: list[Mutant], baseline: dict, jobs: int, limit: float) -> dict[Mutant, str]:
  """What became of each."""
  verdicts, left = {}, {m: rounds(m, baseline) for m in mutants}
  while left:
    this_round = [(m, tests.pop(0)) for m, tests in left.items()]
    for mutant, verdict in run_all(this_round, jobs, limit):
      verdicts[mutant] = verdict
      _progress(f"{mutant.file}:{mutant.line} {verdict}: {mutant.before} -> {mutant.after}")
    left = {m: tests for m, tests in left.items() if tests and verdicts[m] == "survived"}
    _progress(f"{len(left)} left for the next round")
  return verdicts


def _progress(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def report(verdicts: dict[Mutant, str]) -> str:
  """The page `docs/mutants.md`."""
  lines = [
    "# Mutants of `grpo_jax/core`",
    "",
    "Written by `python tests/mutants.py > docs/mutants.md` (what it does stands at its top).",
    "",
    "| file | mutants | noticed | by the time limit | survived, explained | survived |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for file in [*sorted({m.file for m in verdicts}), "all"]:
    mine = {m: v for m, v in verdicts.items() if file in (m.file, "all")}
    survived = [m for m, v in mine.items() if v == "survived"]
    explained = sum(m.key in EXPLAINED for m in survived)
    found = [sum(v == verdict for v in mine.values()) for verdict in ("noticed", "time limit")]
    counts = [len(mine), *found, explained, len(survived) - explained]
    lines.append(f"| {' | '.join(map(str, [file, *counts]))} |")
  for title, known in (("Survivors without an explanation", False), ("Explained survivors", True)):
    rows = [m for m, v in verdicts.items() if v == "survived" and (m.key in EXPLAINED) == known]
    if rows:
      lines += ["", f"## {title}", "", "| place | change | reason |", "| --- | --- | --- |"]
    for m in rows:
      change = f"`{m.before}` → `{m.after}`".replace("|", "\\|")
      lines.append(f"| {m.file}:{m.line} {m.function} | {change} | {EXPLAINED.get(m.key, '')} |")
  return "\n".join(lines)


def prepare(folder: str) -> None:
  """Loads what every fork needs; works on a copy, so that files may change meanwhile."""
  for name in ("grpo_jax", "tests", "docs"):
    shutil.copytree(ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "setup.cfg", folder)
  os.chdir(folder)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/jax"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{folder}/hypothesis"
  warnings.filterwarnings("ignore", message="os.fork")
  sys.path[:0] = [folder, f"{folder}/tests"]
  import hypothesis
  import jax.numpy  # noqa: F401
  import pytest  # noqa: F401

  phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
  hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, deadline=None)
  hypothesis.settings.load_profile("mutants")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", help="one file of grpo_jax/core, by name")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--limit", type=float, default=240.0, help="seconds per mutant")
  parser.add_argument("--tests", nargs="*", default=TESTS)
  parser.add_argument("--every", type=int, default=1, help="take every n-th mutant only")
  args = parser.parse_args()
  files = [CORE / args.only] if args.only else sorted(CORE.glob("*.py"))
  mutants = [m for file in files for m in find_mutants(file)][:: args.every]
  _progress(f"{len(mutants)} mutants")
  with tempfile.TemporaryDirectory() as folder:
    prepare(folder)
    baseline = record_baseline(args.tests, Path(folder) / "baseline.json")
    _progress(f"{len(baseline['seconds'])} tests, {sum(baseline['seconds'].values()):.0f} s")
    verdicts = judge(mutants, baseline, args.jobs, args.limit)
  print(report(verdicts))
  return int(any(v == "survived" and m.key not in EXPLAINED for m, v in verdicts.items()))


if __name__ == "__main__":
  raise SystemExit(main())
