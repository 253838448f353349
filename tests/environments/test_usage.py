"""Tests what the processes below one are said to use."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  not os.path.exists("/proc/self/statm"), reason="needs /proc as Linux has it"
)
CHILD = """
import os, sys
x = bytearray(b"x") * (80 * 2**20)
f = open("unlinked", "wb")
os.unlink("unlinked")
f.write(bytes(3 * 2**20))
f.flush()
open("file", "wb").write(b"x" * 2**20)
print(flush=True)
input()
"""
# A process of few megabytes, since what a descendant shares with it does not count.
PARENT = f"""
import subprocess, sys
from grpo_jax.environments.usage import Usage
usage = Usage()
assert usage.memory() == 0
pipe = subprocess.PIPE
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=pipe, stdout=pipe)
child.stdout.readline()
print(usage.memory() / 2**20, usage.disk(".") / 2**20)
child.communicate(b"")
print(usage.memory() / 2**20, usage.disk(".") / 2**20)
"""
PACKAGE = """
import sys, types
sys.path.insert(0, sys.argv[1])
sys.modules["grpo_jax"] = package = types.ModuleType("grpo_jax")  # without jax
package.__path__ = [sys.argv[1] + "/grpo_jax"]
"""


def test_memory_and_files_of_descendants(tmp_path):
  command = [sys.executable, "-c", PACKAGE + PARENT, os.getcwd()]
  output = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
  during, after = ([float(x) for x in line.split()] for line in output.stdout.splitlines())
  assert during == pytest.approx([80, 4], abs=12)
  assert during[1] == pytest.approx(4, rel=0.05)  # the file without a name too
  assert after == pytest.approx([0, 1], rel=0.05)
