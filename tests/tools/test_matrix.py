"""The matrix of versions: which interpreters and which jax it takes."""

import sys
from pathlib import Path

import pytest

from tools import matrix


def test_the_bounds_are_those_of_setup_cfg():
  python, jax = matrix.bounds(Path("setup.cfg").read_text())
  assert python == (3, 11)
  assert jax == "0.6"


def test_versions_are_compared_as_numbers():
  versions = {"a": (3, 9, 18), "b": (3, 12, 10), "c": (3, 12, 9)}
  assert matrix.choose(versions, (3, 9)) == ("a", "b")
  assert matrix.choose(versions, (3, 11)) == ("c", "b")
  with pytest.raises(ValueError, match=r"no Python from 3\.13 on"):
    matrix.choose(versions, (3, 13))


def test_the_version_of_an_interpreter(tmp_path):
  assert matrix.version_of(sys.executable) == sys.version_info[:3]
  assert matrix.version_of(str(tmp_path / "python")) is None
  broken = tmp_path / "broken"
  broken.write_text("#!/bin/sh\nexit 127\n")
  broken.chmod(0o755)
  assert matrix.version_of(str(broken)) is None


def test_a_failing_row_fails_the_matrix(monkeypatch, capsys):
  """The rows run in order, each with its jax; one that fails does not stop the others."""
  installed = {}

  def make_environment(name, python, packages):
    installed[name] = packages
    return name

  class Ran:
    stdout = "Python 3.11.7 jax 0.6.0"
    returncode = 0

  def run(command, **options):
    ran = Ran()
    ran.returncode = int(command[0] == "core-oldest" and "pytest" in command)
    return ran

  monkeypatch.setattr(matrix, "make_environment", make_environment)
  monkeypatch.setattr(matrix, "version_of", lambda python: (3, 11, 7))
  monkeypatch.setattr(matrix.subprocess, "run", run)
  assert matrix.main(["python"]) == 1
  assert list(installed) == ["core-oldest", "core-newest", "whole-newest"]
  assert [packages[0] for packages in installed.values()] == ["jax==0.6", "jax", "--editable"]
  printed = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in printed[-3:]] == ["FAILED", "passed", "passed"]
