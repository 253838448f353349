"""Runs tests against a changed `grpo_jax/core`, with one fork per change, for `mutants.py`."""

import ast
import builtins
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.mutations import Apply, Mutant

ROOT = Path(__file__).resolve().parent.parent
CORE = Path("grpo_jax/core")  # relative to the copy that `prepare` makes


def prepare(folder: str) -> None:
  """Imports the modules that all forks need, and enters a copy so that files can be edited."""
  for name in ("grpo_jax", "tests", "docs", "tools"):
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


class _Record(ast.NodeTransformer):
  """Inserts `__hit__(file, line)` before every statement of every function."""

  def __init__(self, file: str):
    self.file = file

  def generic_visit(self, node):
    super().generic_visit(node)
    docstring = []
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
      docstring = [node.body.pop(0)]  # stays first, or the function has no docstring
    if not isinstance(node, ast.Module | ast.ClassDef):
      for field in ("body", "orelse"):
        if isinstance(getattr(node, field, None), list):
          setattr(node, field, self._recorded(getattr(node, field)))
    if isinstance(node, ast.FunctionDef):  # defaults are evaluated at import
      node.body[:0] = [*docstring, self._hit(node.lineno)]
    return node

  def _recorded(self, body):
    return [x for statement in body for x in (self._hit(statement.lineno), statement)]

  def _hit(self, line):
    return ast.parse(f"__hit__({self.file!r}, {line})").body[0]


class _Hook:
  """Serves the modules of core from a changed syntax tree."""

  def __init__(self, change: Callable[[str, ast.Module], ast.Module]):
    self.change = change

  def find_spec(self, name, path=None, target=None):
    package, _, module = name.rpartition(".")
    file = (CORE / f"{module}.py").resolve()
    if package != "grpo_jax.core" or not file.exists():
      return None
    change = self.change

    class Loader(importlib.machinery.SourceFileLoader):
      def get_code(self, fullname):
        tree = change(file.name, ast.parse(file.read_text()))
        return compile(ast.fix_missing_locations(tree), str(file), "exec")

    return importlib.util.spec_from_file_location(name, file, loader=Loader(name, str(file)))


def _fork(work: Callable[[], int]) -> int:
  """Runs `work` in a fork without output; returns the process id."""
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
  """Imports core through the hook, before pytest: its import hook takes precedence later."""
  sys.meta_path.insert(0, _Hook(change))
  import grpo_jax.core.losses  # noqa: F401  (and with it all of core)


def _pytest(arguments: list[str], plugins=()) -> int:
  """Runs pytest and returns its exit status."""
  import pytest

  options = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--tb=no"]
  return pytest.main([*options, *arguments], plugins=list(plugins))


class _Baseline:
  """Records the statements that each test executes, and its duration in seconds."""

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
  """Runs the tests without changes; returns hits and seconds by test.

  Raises:
    SystemExit: if a test fails.
  """

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
    raise SystemExit(f"these tests fail without a change: {', '.join(baseline['failed'])}")
  return baseline


class _Selected:
  """Runs the tests in this order and writes the name of a failing test to a file.

  A mutant can rename the cases of a table. Tests that do not exist under their name are skipped.
  """

  def __init__(self, tests: list[str]):
    self.order = {test: i for i, test in enumerate(tests)}

  def pytest_collection_modifyitems(self, items):
    items[:] = [item for item in items if item.nodeid in self.order]
    items.sort(key=lambda item: self.order[item.nodeid])

  def pytest_runtest_logreport(self, report):
    if report.failed:
      Path(f"noticed-{os.getpid()}").write_text(report.nodeid)


def run_mutant(mutant: Mutant, tests: list[str]) -> int:
  """Starts the tests of a mutant; an exit status of 0 means that no test noticed it."""

  def change(file, tree):
    return Apply(mutant).visit(tree) if file == mutant.file else tree

  def work():
    _import_changed(change)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    return 0 if _pytest(["-x", *files], [_Selected(tests)]) in (0, 5) else 1  # 5: no tests

  return _fork(work)


def run_all(todo: Iterator[tuple[Mutant, list[str]]], jobs: int, limit: float) -> Iterator[tuple]:
  """Yields (mutant, verdict, noticing test) as the mutants finish.

  The verdict is "survived", "noticed", "import" or "time limit".
  """
  running, more = {}, True
  while more or running:
    while more and len(running) < jobs:
      mutant, tests = next(todo, (None, None))
      more = mutant is not None
      if more:
        running[run_mutant(mutant, tests)] = (mutant, time.monotonic())
    time.sleep(0.02)
    for pid, (mutant, start) in list(running.items()):
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        del running[pid]
        test = Path(f"noticed-{pid}")
        by = test.read_text() if test.exists() else ""
        test.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
          raise SystemExit(f"signal {-code} killed the fork of {mutant}; out of memory?")
        yield mutant, "survived" if code == 0 else "noticed" if by else "import", by
      elif time.monotonic() - start > limit:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del running[pid]
        yield mutant, "time limit", ""
