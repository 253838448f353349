"""Runs Python that a model wrote, in a process that can reach nothing.

Each program runs in a fork of a clean server process (`sandbox_server.py`): an own user, mount,
process, network, IPC and name space, a read-only file system with the interpreter and an empty
/tmp, limits of time, memory, files, processes and output, no environment, and a filter of system
calls. `layers()` says which of these hold on this machine; where network or files cannot be shut
off, nothing runs unless `unsafe=True` asks for it by name.

It shares the kernel with the host. For adversaries other than a model in training, use a virtual
machine.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence

from grpo_jax.environments import isolation, servers
from grpo_jax.environments.isolation import IsolationError
from grpo_jax.environments.servers import Execution, Server

# Layers that shut off network and files, alternatives from the strictest on.
_LADDER = (
  ("namespaces", "landlock", "seccomp"),
  ("namespaces", "seccomp"),
  ("landlock", "seccomp"),
)


def run_python(
  code: str,
  *,
  stdin: str = "",
  seconds: float = 5.0,
  memory_mb: int = 512,
  programs: bool = False,
  unsafe: bool = False,
) -> Execution:
  """Runs a Python program in the sandbox and returns what it did.

  Args:
    code: the program; only the standard library can be imported.
    stdin: its standard input.
    seconds: wall time, and CPU time rounded up, after which it is killed.
    memory_mb: address space of each of its processes, and what all of them use together, MiB.
    programs: allow it to start other programs; there is little to start.
    unsafe: run it where `layers` says that network or files cannot be shut off.

  Raises:
    ValueError: a limit is out of range, or the code is not a string.
    IsolationError: this machine cannot isolate it, and `unsafe` is False; or the sandbox failed,
      which says nothing about the program.

  Example:
    >>> if layers():
    ...   assert run_python("print(sum(map(int, input().split())))", stdin="3 4").stdout == "7\\n"
  """
  if not isinstance(code, str) or not isinstance(stdin, str):
    raise ValueError(
      f"code and stdin must be text, got {type(code).__name__}, {type(stdin).__name__}"
    )
  check_limits(seconds, memory_mb)
  with borrowed_server(unsafe) as server:
    return server.run(
      code.encode("utf-8", "surrogatepass"), stdin.encode("utf-8", "surrogatepass"),
      seconds=seconds, memory_bytes=memory_mb * 2**20, programs=programs,
    )  # fmt: skip


def check_limits(seconds: float, memory_mb: int) -> None:
  """Raises ValueError for limits of a program that are out of range."""
  numbers = isinstance(seconds, int | float) and isinstance(memory_mb, int)
  if not numbers or not (0 < seconds <= 3600 and 16 <= memory_mb <= 2**20):
    raise ValueError(
      f"seconds is {seconds!r} and memory_mb {memory_mb!r}: they must be a number in (0, 3600] and "
      "an integer in [16, 2^20]"
    )


def require_isolation(unsafe: bool = False) -> None:
  """Starts what runs programs, so that this process may lose the right to start others.

  Raises:
    IsolationError: this machine cannot isolate programs, and `unsafe` is False.
  """
  if not layers() and not unsafe:
    raise IsolationError(
      f"{explain()}. Run it in a Linux container or virtual machine that allows user namespaces, "
      "or set unsafe=True to run a model's code with the rights of this process"
    )
  servers.fork_server()


@functools.cache
def layers() -> tuple[str, ...]:
  """Returns the layers that hold on this machine, found by running a program behind them.

  "namespaces", "landlock" and "seccomp" shut off network and files; "privileged" says that this
  process is the host's user 0, "user" that a program then runs as another user. An empty tuple
  means that programs cannot be isolated here.
  """
  if sys.platform != "linux":
    return ()
  have = {"seccomp"} if isolation.has_seccomp() else set()
  have |= {"landlock"} if isolation.landlock_version() else set()
  privileged = ["privileged"] if os.geteuid() == 0 else []
  # Another user cannot read an interpreter in somebody's closed home; then the user stays.
  users = [["user"], []] if privileged else [[]]
  for rung in _LADDER:
    if not set(rung) - {"namespaces"} <= have:
      continue
    for rights in ([*privileged], []) if privileged else ([],):
      for user in users if rights else [[]]:
        candidate = (*rung, *rights, *user)
        if _holds(candidate):
          return candidate
  return ()


def explain() -> str:
  """Returns one line that says how programs are isolated on this machine."""
  found = layers()
  if not found:
    return "code cannot be isolated here: neither namespaces nor Landlock with seccomp hold"
  kinds = [layer for layer in found if layer not in ("privileged", "user")]
  note = "" if _limits_processes(found) else "; the number of processes is not limited"
  return f"code runs behind {', '.join(kinds)}, rlimits and no-new-privileges{note}"


def _limits_processes(found: Sequence[str]) -> bool:
  return "privileged" not in found or "user" in found


_PROBE = """
import os, socket, sys, math, colorsys
assert not os.environ, "environment"
try:
  open("/etc/passwd")
except OSError:
  pass
else:
  raise SystemExit("/etc/passwd")
interpreter = os.path.realpath(sys.base_prefix) + "/"
for path in ("/root", "/home"):  # nothing of a home but what leads to an interpreter in it
  try:
    names = os.listdir(path)
  except OSError:
    continue
  assert all(interpreter.startswith(f"{path}/{name}/") for name in names), path
try:
  socket.socket()
except OSError:
  print("isolated")
"""


def _holds(candidate: tuple[str, ...]) -> bool:
  """Returns whether a program runs behind these layers and cannot reach network or files."""
  try:
    with contextlib.closing(Server(candidate)) as server:
      out = server.run(_PROBE.encode(), seconds=10.0, memory_bytes=2**29)
    return out.stdout == "isolated\n"
  except (IsolationError, OSError):
    return False


@contextlib.contextmanager
def borrowed_server(unsafe: bool) -> Iterator[Server]:
  """Yields an idle server, or a new one; it goes back unless it failed.

  Raises:
    IsolationError: this machine cannot isolate programs, and `unsafe` is False; or no server can
      be started.
  """
  require_isolation(unsafe)
  server = servers.take_idle() or Server(layers())
  try:
    yield server
  except BaseException:
    server.close()
    raise
  servers.give_back(server)
