"""Runs the tests on the oldest and the newest versions: `python -m tools.matrix [PYTHON ...]`.

| environment   | Python | jax                              | tests                          |
|---------------|--------|----------------------------------|--------------------------------|
| core, oldest  | oldest | the lower bound in setup.cfg     | of `core`, with no extra       |
| core, newest  | newest | the newest that can be installed | of `core`, with no extra       |
| whole, newest | newest | the newest that can be installed | all, with the newest libraries |

The interpreters are those named on the command line, or all python3.N on the PATH and below pyenv,
from python_requires on. Environments are kept in `.matrix`. The exit code is 1 if a test fails.
"""

import argparse
import configparser
import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(".matrix")
CORE = ("tests/core", "tests/test_testing.py", "grpo_jax/core", "grpo_jax/testing.py")
# What the tests of `core` import beside what `core` itself needs.
CORE_TOOLS = ("pytest", "beartype")
SHOW = "import jax, platform as p; print('Python', p.python_version(), 'jax', jax.__version__)"

Version = tuple[int, ...]


def find_pythons() -> list[str]:
  """Returns candidates for interpreters: on the PATH, and of pyenv."""
  minors = [f"python3.{minor}" for minor in range(11, 30)]
  root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
  found = [shutil.which(name) for name in minors] + [sys.executable]
  return [path for path in found if path] + sorted(glob.glob(f"{root}/versions/3.*/bin/python"))


def version_of(python: str) -> Version | None:
  """Returns the version of an interpreter; None if it does not start or is a prerelease."""
  code = "import sys; print(*sys.version_info[:3], sys.version_info.releaselevel)"
  try:
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
  except OSError:
    return None
  *numbers, level = ran.stdout.split() or [""]
  return tuple(int(number) for number in numbers) if level == "final" else None


def choose(versions: dict[str, Version], minimum: Version) -> tuple[str, str]:
  """Returns the oldest and the newest interpreter from a minimum on.

  Raises:
    ValueError: no interpreter is new enough.

  Example:
    >>> choose({"a": (3, 12, 1), "b": (3, 9, 18), "c": (3, 11, 7), "d": (3, 13, 0)}, (3, 11))
    ('c', 'd')
  """
  usable = sorted((version, path) for path, version in versions.items() if version >= minimum)
  if not usable:
    raise ValueError(f"no Python from {'.'.join(map(str, minimum))} on among {list(versions)}")
  return usable[0][1], usable[-1][1]


def bounds(text: str) -> tuple[Version, str]:
  """Returns the oldest Python and the oldest jax that setup.cfg allows.

  Example:
    >>> bounds("[options]\\npython_requires = >=3.11\\ninstall_requires =\\n  jax>=0.6\\n  numpy")
    ((3, 11), '0.6')
  """
  parser = configparser.ConfigParser()
  parser.read_string(text)
  python = re.fullmatch(r">=(\d+)\.(\d+)", parser["options"]["python_requires"])
  jax = re.search(r"^jax>=([\d.]+)$", parser["options"]["install_requires"], re.MULTILINE)
  return (int(python[1]), int(python[2])), jax[1]


def make_environment(name: str, python: str, packages: Sequence[str]) -> str:
  """Creates an environment unless it is there, updates its packages, and returns its Python."""
  folder = FOLDER / name
  inside = str(folder / "bin/python")
  if not folder.exists() or version_of(inside) != version_of(python):
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
  subprocess.run([inside, "-m", "pip", "install", "--quiet", "--upgrade", *packages], check=True)
  return inside


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the three rows and prints a line for each."""
  parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
  parser.add_argument("pythons", nargs="*", help="interpreters to choose from")
  parser.add_argument("--core", action="store_true", help="leave out the row with all tests")
  arguments = parser.parse_args(argv)
  minimum, jax = bounds(Path("setup.cfg").read_text(encoding="utf-8"))
  candidates = {path: version_of(path) for path in arguments.pythons or find_pythons()}
  oldest, newest = choose({path: v for path, v in candidates.items() if v}, minimum)
  base = ("numpy", "jaxtyping", *CORE_TOOLS)
  rows = [
    ("core-oldest", oldest, (f"jax=={jax}", *base), CORE),
    ("core-newest", newest, ("jax", *base), CORE),
  ]
  if not arguments.core:
    parallel = ("-n", "2", "--dist", "loadfile")
    rows.append(("whole-newest", newest, ("--editable", ".[test]"), parallel))
  results = []
  for name, python, packages, tests in rows:
    inside = make_environment(name, python, packages)
    ran = subprocess.run([inside, "-c", SHOW], check=True, capture_output=True, text=True)
    versions = ran.stdout.strip()
    print(f"{name}: {versions}", flush=True)
    code = subprocess.run([inside, "-m", "pytest", "--tb=short", *tests]).returncode
    results.append((name, versions, code))
  for name, versions, code in results:
    print(f"{'passed' if code == 0 else 'FAILED'}  {name}: {versions}")
  return 1 if any(code for *_, code in results) else 0


if __name__ == "__main__":
  sys.exit(main())
