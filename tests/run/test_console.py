"""A console that cannot show the text, or is gone, ends no command."""

import io
import os
import subprocess
import sys

import pytest

from grpo_jax.run.console import GuardedStream, guarded

CODE = """
import sys
from grpo_jax.run.console import guarded
with guarded():
  for _ in range(2000):
    print("\\u221a2 = ", "x" * 50, flush=True)
  print("\\u221a", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize(
  ("encoding", "shown"), [("ascii", "\\u221a2"), ("latin-1", "\\u221a2"), ("utf-8", "√2")]
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, shown):
  raw = io.BytesIO()
  stream = GuardedStream(io.TextIOWrapper(raw, encoding=encoding))
  assert stream.write("√2") == 2
  stream.flush()
  assert raw.getvalue().decode(encoding) == shown


def test_a_stream_that_is_closed_or_missing_takes_anything():
  closed = io.StringIO()
  closed.close()
  for stream in (GuardedStream(closed), GuardedStream(None)):
    stream.write("x")
    stream.flush()
    assert not stream.isatty()


def test_the_streams_come_back():
  before = sys.stdout, sys.stderr
  with guarded():
    assert isinstance(sys.stdout, GuardedStream)
  assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("shell", ["", " | head -1", " >&-", " >&- 2>&-", " > /dev/full"])
def test_a_command_keeps_its_exit_code(shell):
  environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONPATH=os.getcwd())
  command = f'"{sys.executable}" -c "$CODE"{shell}; exit ${{PIPESTATUS[0]}}'
  completed = subprocess.run(
    ["bash", "-c", command], env=environment | {"CODE": CODE}, capture_output=True, timeout=60
  )
  assert completed.returncode == 7, completed.stderr
  assert b"Traceback" not in completed.stderr
