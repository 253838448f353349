"""A console that cannot show the text, or is gone, ends no command."""

import io
import os
import subprocess
import sys

import pytest

from grpo_jax.run.console import GuardedStream, guarded, keep
from grpo_jax.run.progress import Progress

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


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path):
  """A library that writes to descriptor 1 would write into that file."""
  code = (
    "import os\n"
    "from grpo_jax.run.console import guarded\n"
    "with guarded():\n"
    f"  file = open({str(tmp_path / 'file')!r}, 'w')\n"
    "  os.write(1, b'from a library'); os.write(2, b'and more'); print('x')\n"
    "  file.write('ours')\n"
  )
  command = f'exec "{sys.executable}" -c "$CODE" <&- >&- 2>&-'
  subprocess.run(["sh", "-c", command], env=dict(os.environ, CODE=code), check=True)
  assert (tmp_path / "file").read_text() == "ours"


# --- the copy in a file ---------------------------------------------------------------------------


def test_the_log_holds_what_is_shown_as_it_looks_at_the_end(tmp_path, capsys):
  log = tmp_path / "console.log"
  with guarded():
    print("early")
    keep(log)
    with guarded():  # inside itself, it does nothing
      print("\x1b[31mred\x1b[0m and \x1b]0;title\x07plain", file=sys.stderr)
    for percent in (1, 50, 100):
      print(f"\r\x1b[2K{percent} %", end="")
      assert "%" not in log.read_text()
    print("\r\x1b[2K√2 \ud800\r")
    sys.stdout.write("split ")
    sys.stdout.write("line\nlast")
  assert log.read_bytes().decode() == "early\nred and plain\n√2 \\ud800\nsplit line\nlast\n"
  assert "\x1b[31mred" in capsys.readouterr().err
  with guarded():
    keep(log)
    print("resumed")
  assert log.read_text().endswith("last\nresumed\n")


def test_a_progress_bar_leaves_one_line(tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(sys, "stdout", Terminal())
  with guarded():
    keep(tmp_path / "console.log")
    progress = Progress(total_steps=3)
    for step in range(3):
      progress.update(step, {"reward": 0.5})
      progress.print(f"text {step}")
    progress.close()
  lines = (tmp_path / "console.log").read_text().splitlines()
  assert [line for line in lines if line.startswith("text")] == ["text 0", "text 1", "text 2"]
  assert sum(line.startswith("step") for line in lines) == 1
  assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("path", ["/dev/full", "/no/such/folder/console.log", "/"])
def test_a_log_that_cannot_be_written_ends_nothing(path, capsys):
  with guarded():
    keep(path)
    print("shown")
  assert capsys.readouterr().out == "shown\n"
