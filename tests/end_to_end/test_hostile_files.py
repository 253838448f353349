"""Tests that damaged files are refused in words that name them, within 20 s and 2 GB."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.hostile_files import KINDS
from tests.helpers.processes import xla_flags


def problems(count, seed, *kinds):
  """Returns what `tests.helpers.hostile_files` finds wrong, in a process of its own."""
  command = [sys.executable, "-m", "tests.helpers.hostile_files", str(count), str(seed), *kinds]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=xla_flags())
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]  # its last lines name the file that hung
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_damaged_files_are_refused_clearly_or_give_the_same_result():
  assert problems(12, 0, *KINDS) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_damaged_files(kind):
  assert problems(400, 1, kind) == []


def test_a_silent_difference_would_be_noticed():
  """Plants damage that nothing refuses: the result of the copy is another one."""
  code = (
    "from tests.helpers import hostile_files as h\n"
    "k = h.KINDS['config']\n"
    "damage = lambda data, content: (content.replace(b'500.0', b'600.0'), 'planted', True)\n"
    "h.KINDS['config'] = h.Kind(k.file, k.make, k.open, damage)\n"
    "h.main(1, 0, ['config'])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True,
    env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=xla_flags()),
  )  # fmt: skip
  assert json.loads(done.stdout.splitlines()[-1]) == ["config: planted: silently another result"]
