"""Tests that a program runs as Python runs it, ends at its limits, and reaches nothing outside."""

import os
import signal
import subprocess
import sys

import pytest

from grpo_jax.environments import sandbox, servers
from grpo_jax.environments.sandbox import IsolationError, layers, run_python
from grpo_jax.environments.servers import OUTPUT_BYTES

isolated = pytest.mark.skipif(not layers(), reason="needs Linux with namespaces or Landlock")


@isolated
@pytest.mark.parametrize(
  ("code", "returncode", "stdout", "stderr"),
  [
    ("print(input() + 'b')", 0, "ab\n", ""),
    ("import sys; sys.exit(3)", 3, "", ""),
    ("exit(3)", 3, "", ""),
    ("import threading\nthreading.Thread(target=print, args=(1,)).start()", 0, "1\n", ""),
    ("import atexit\natexit.register(print, 1)\nraise SystemExit(2)", 2, "1\n", ""),
    ("quit()", 0, "", ""),
    ("import sys; sys.exit('bad')", 1, "", "bad\n"),
    ("import os; os._exit(7)", 7, "", ""),
    ("print(__name__, end='')", 0, "__main__", ""),
    ("print('\\ud800')", 0, "\\ud800\n", ""),
  ],
)
def test_a_program_runs_as_a_script_does(code, returncode, stdout, stderr):
  ran = run_python(code, stdin="a\n")
  assert (ran.returncode, ran.stdout, ran.stderr) == (returncode, stdout, stderr)
  assert ran.killed is None


@isolated
def test_a_signal_is_a_negative_return_code():
  # abort() may not send itself a signal here, and then falls on an instruction that raises one.
  assert run_python("import os; os.abort()").returncode < 0


@isolated
@pytest.mark.parametrize(
  ("code", "error"), [("1 / 0", "ZeroDivisionError"), ("1 +", "SyntaxError")]
)
def test_an_error_leaves_a_traceback(code, error):
  ran = run_python(code)
  assert ran.returncode == 1
  assert error in ran.stderr
  assert "sandbox_server" not in ran.stderr


@isolated
@pytest.mark.parametrize(
  ("code", "killed"),
  [
    ("while True: pass", "time"),
    ("import time\ntime.sleep(60)", "time"),
    ("import os, time\nif os.fork():\n  time.sleep(60)\nwhile True: pass", "time"),
    ("while True: print('x' * 5000)", "output"),
    ("import sys\nwhile True: print('x' * 5000); print('y' * 5000, file=sys.stderr)", "output"),
    ("import sys\nprint('x' * 10**6); print('y' * 10**6, file=sys.stderr)", "output"),
    ("x = bytearray(2**31)", "memory"),
  ],
)
def test_a_program_ends_at_its_limits_and_the_next_one_runs(code, killed):
  for _ in range(3):
    ran = run_python(code, seconds=1.0, memory_mb=256)
    assert ran.killed == killed
    assert ran.returncode != 0
    assert max(len(ran.stdout), len(ran.stderr)) <= OUTPUT_BYTES
    assert run_python("print('next')").stdout == "next\n"


@isolated
@pytest.mark.parametrize(
  "code",
  [
    "open('/etc/passwd')", "open('{file}')", "open('/new', 'w')", "import os; os.listdir('/home')",
    "import socket; socket.socket()", "import socket; socket.create_connection(('127.0.0.1', 1))",
    "import subprocess; subprocess.run(['ls'])", "import os; os.execv('/bin/sh', ['sh'])",
    "import os; os.kill({parent}, 9)", "import numpy", "import os; os.environ['HOME']",
    "import os; os.write(5, b'x')", "open('big', 'wb').write(bytes(2**26))",
  ],
)  # fmt: skip
def test_a_program_reaches_nothing_outside(code, tmp_path):
  file = tmp_path / "secret"
  file.write_text("x")
  file.chmod(0o644)
  ran = run_python(code.format(file=file, parent=os.getpid()))
  assert ran.returncode != 0
  assert file.read_text() == "x"


@pytest.mark.skipif(
  not {"namespaces", "landlock"} <= set(layers()), reason="needs namespaces and Landlock"
)
@pytest.mark.parametrize("without", ["namespaces", "landlock"])
def test_one_of_two_walls_is_enough(without):
  """Goes without one, as an old kernel or a container does; the interpreter may lie in a home."""
  left = tuple(layer for layer in layers() if layer not in (without, "user"))
  assert sandbox._holds(left)


@isolated
def test_nothing_is_isolated_behind_system_calls_alone():
  assert not sandbox._holds(("seccomp",))


@isolated
def test_nothing_of_a_program_is_left_for_the_next():
  run_python("import math, builtins\nmath.pi = 3\nbuiltins.print = None\nopen('left', 'w')")
  ran = run_python("import math, os\nprint(math.pi, os.path.exists('left'))")
  assert ran.stdout == "3.141592653589793 False\n"


@isolated
def test_a_server_that_died_is_reported_and_replaced():
  run_python("pass")
  server = servers.idle[-1]
  os.kill(server.pid, signal.SIGKILL)
  with pytest.raises(IsolationError, match="server process ended"):
    server.run(b"", seconds=1.0, memory_bytes=2**28)
  assert run_python("print(1)").stdout == "1\n"


@isolated
def test_a_fork_server_that_died_is_replaced():
  run_python("pass")
  servers.fork_servers[0]._process.kill()
  servers.fork_servers[0]._process.wait()
  servers.idle.clear()
  assert run_python("print(1)").stdout == "1\n"


@isolated
@pytest.mark.parametrize("size", [0, 1, 2**16, 2**20])
def test_a_program_and_its_input_of_any_size(size):
  ran = run_python(f"print(len(input()))  # {'x' * size}", stdin="y" * size + "\n")
  assert ran.stdout == f"{size}\n"
  assert run_python("print(1)", stdin="y" * size).stdout == "1\n"  # it is not read


@isolated
def test_a_program_may_be_unsafe_by_name(monkeypatch):
  monkeypatch.setattr(sandbox, "layers", lambda: ())
  monkeypatch.setattr(servers, "idle", [])
  with pytest.raises(IsolationError, match="set unsafe=True"):
    run_python("print(1)")
  ran = run_python("import os\nprint(os.path.exists('/etc/passwd'), *os.environ)", unsafe=True)
  assert ran.stdout == "True\n"


@isolated
def test_a_fork_has_servers_of_its_own_and_nothing_stays_behind(tmp_path):
  script = (
    "import os\nfrom grpo_jax.environments.sandbox import run_python\nrun_python('pass')\n"
    "child = os.fork()\n"
    "if child:\n"
    "  assert os.waitpid(child, 0)[1] == 0\n"  # its end has not closed what the parent keeps
    "  assert run_python('print(1)').stdout == '1\\n'\n"
  )
  environment = dict(os.environ, TMPDIR=str(tmp_path))
  subprocess.run([sys.executable, "-c", script], env=environment, check=True)
  assert not list(tmp_path.iterdir())


def test_what_is_out_of_range_is_named():
  with pytest.raises(ValueError, match="seconds is 0"):
    run_python("", seconds=0)
  with pytest.raises(ValueError, match="seconds is '5'"):
    run_python("", seconds="5")
  with pytest.raises(ValueError, match="memory_mb 1"):
    run_python("", memory_mb=1)
  with pytest.raises(ValueError, match="must be text, got bytes"):
    run_python(b"")


def test_without_isolation_nothing_runs(monkeypatch):
  monkeypatch.setattr(sandbox, "layers", lambda: ())
  with pytest.raises(IsolationError, match="cannot be isolated here"):
    run_python("print(1)")
