"""Runs every hostile program of the sandbox's table."""

import pytest

from grpo_jax.environments import sandbox
from tools import hostile

pytestmark = pytest.mark.skipif(
  not sandbox.layers(), reason="needs Linux with namespaces or Landlock"
)


@pytest.fixture(scope="module")
def machine():
  with hostile.machine() as target:
    yield target


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_a_hostile_program_is_contained(name, machine):
  outcome = machine.run(name)
  assert outcome.faults == (), outcome


def test_an_escape_is_noticed(machine, monkeypatch):
  run_python = sandbox.run_python
  programs = {"liar": "print('ESCAPED')", "writer": "", "killer": ""}
  monkeypatch.setattr(hostile, "PROGRAMS", programs)
  assert machine.run("liar").faults == ("escaped: ESCAPED",)

  def run(code, **limits):
    machine.file.write_text("changed")
    machine.file.chmod(0o666)
    return run_python(code, **limits)

  monkeypatch.setattr(sandbox, "run_python", run)
  assert "changed a file" in machine.run("writer").faults
  machine.file.write_text("secret")
