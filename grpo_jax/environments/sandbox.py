"""Runs Python that a model wrote, in a process that can reach nothing.

Each program runs in a fork of a clean server process (`sandbox_server.py`): an own user, mount,
process, network, IPC and name space, a read-only file system with the interpreter and an empty
/tmp, limits of time, memory, files, processes and output, no environment, and a filter of system
calls. `layers()` says which of these hold on this machine; where network or files cannot be shut
off, nothing runs unless `unsafe=True` asks for it by name.

It shares the kernel with the host. For adversaries other than a model in training, use a virtual
machine.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from grpo_jax.environments import isolation
from grpo_jax.environments.isolation import IsolationError

OUTPUT_BYTES = 64 * 1024  # of standard output and of standard error each; more ends the program
TMP_BYTES = 16 * 2**20  # of all files in /tmp
PROCESSES = 16  # processes and threads of a program
_SERVER = Path(__file__).with_name("sandbox_server.py")
_GRACE = 10.0  # seconds that a server may take beyond a program's time
_MESSAGE = 1 << 16
# Layers that shut off network and files, alternatives from the strictest on.
_LADDER = (
  ("namespaces", "landlock", "seccomp"),
  ("namespaces", "seccomp"),
  ("landlock", "seccomp"),
)


@dataclasses.dataclass(frozen=True)
class Execution:
  """Records what a program did.

  Attributes:
    stdout, stderr: decoded as UTF-8, cut at `OUTPUT_BYTES` bytes each.
    returncode: as in `subprocess`: the exit code, or minus the number of a signal.
    seconds: wall time.
    killed: None if the program ended by itself; else "time", "output" or "memory".
  """

  stdout: str
  stderr: str
  returncode: int
  seconds: float
  killed: str | None


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
    memory_mb: address space of each of its processes, MiB.
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
  if not (0 < seconds <= 3600 and 16 <= memory_mb <= 2**20):
    raise ValueError(
      f"seconds is {seconds} and memory_mb {memory_mb}: they must be in (0, 3600] and [16, 2^20]"
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
  _fork_server()


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
    with contextlib.closing(_Server(candidate)) as server:
      out = server.run(_PROBE.encode(), seconds=10.0, memory_bytes=2**29)
    return out.stdout == "isolated\n"
  except (IsolationError, OSError):
    return False


# --- servers --------------------------------------------------------------------------------------


class _ForkServer:
  """The process that servers are forked from: started fresh, so it has nothing of this one's."""

  def __init__(self) -> None:
    self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SERVER), str(theirs.fileno())],
        env={}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
      )  # fmt: skip

  @property
  def alive(self) -> bool:
    return self._process.poll() is None

  def connect(self, found: Sequence[str]) -> socket.socket:
    """Returns the connection to a new server behind these layers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      socket.send_fds(self._control, [json.dumps(list(found)).encode()], [theirs.fileno()])
    return ours

  def close(self) -> None:
    self._control.close()  # it then ends by itself
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=2)


class _Server:
  """The caller's end of one server, which runs one program at a time."""

  def __init__(self, found: Sequence[str]) -> None:
    self._connection = _fork_server().connect(found)
    self._connection.settimeout(_GRACE)
    try:
      ready = self._connection.recv(_MESSAGE)
    except OSError as error:
      ready = json.dumps({"setup": f"no answer: {error}"}).encode()
    answer = json.loads(ready or b'{"setup": "its process ended"}')
    if "setup" in answer:
      self.close()
      raise IsolationError(f"the sandbox could not be set up: {answer['setup']}")
    self._connection.settimeout(None)
    self.pid: int = answer["pid"]

  def run(
    self,
    code: bytes,
    stdin: bytes = b"",
    *,
    seconds: float,
    memory_bytes: int,
    programs: bool = False,
    role: str = "program",
    files: Sequence[BinaryIO] = (),
  ) -> Execution:
    """Runs one program.

    Args:
      code: the text for the role.
      stdin, seconds, programs: as in `run_python`.
      memory_bytes: `memory_mb` in bytes.
      role: what the server does with the text, see `sandbox_server.py`.
      files: further open files for it, closed here once it has them.
    """
    request = {
      "seconds": seconds, "memory_bytes": memory_bytes, "programs": programs, "role": role,
      "tmp_bytes": TMP_BYTES, "processes": PROCESSES,
    }  # fmt: skip
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
      stdin_read, stdin_write = pipe(stack)
      out_read, out_write = pipe(stack)
      err_read, err_write = pipe(stack)
      code_read, code_write = pipe(stack)
      theirs = [stdin_read, out_write, err_write, code_read]
      inputs = {stdin_write: memoryview(stdin), code_write: memoryview(code)}
      outputs = [out_read, err_read]
      for file in (*inputs, *outputs):
        os.set_blocking(file.fileno(), False)
      try:
        message = json.dumps(request).encode()
        handed_over = [file.fileno() for file in (*theirs, *files)]
        socket.send_fds(self._connection, [message], handed_over)
        for file in (*theirs, *files):
          file.close()
        (stdout, stderr), answer = self._exchange(inputs, outputs, seconds)
      except ConnectionError as error:
        self.close()
        raise IsolationError("the sandbox's server process ended") from error
    if "setup" in answer:
      raise IsolationError(f"the sandbox could not be set up: {answer['setup']}")
    killed = answer["killed"]
    if killed is None and answer["returncode"] != 0 and b"\nMemoryError" in b"\n" + stderr[-200:]:
      killed = "memory"
    return Execution(
      stdout=stdout.decode("utf-8", "replace"),
      stderr=stderr.decode("utf-8", "replace"),
      returncode=answer["returncode"],
      seconds=time.monotonic() - began,
      killed=killed,
    )

  def _exchange(
    self, inputs: dict[BinaryIO, memoryview], outputs: list[BinaryIO], seconds: float
  ) -> tuple[list[bytes], dict]:
    """Writes the inputs and reads the outputs, up to their limit, until the server answers."""
    read: dict[BinaryIO, bytes] = dict.fromkeys(outputs, b"")
    deadline, answer = time.monotonic() + seconds + _GRACE, None
    with selectors.DefaultSelector() as selector:
      for file in inputs:
        selector.register(file, selectors.EVENT_WRITE)
      for file in (*outputs, self._connection):
        selector.register(file, selectors.EVENT_READ)
      while answer is None:
        events = selector.select(max(deadline - time.monotonic(), 0))
        if not events:
          raise IsolationError("the sandbox did not answer in time")
        for key, _ in events:
          if key.fileobj is self._connection:
            answer = self._connection.recv(_MESSAGE)
          elif key.fileobj in inputs:
            if _write_some(key.fileobj, inputs):
              selector.unregister(key.fileobj)
              key.fileobj.close()
          elif not self._read_some(key.fileobj, read):
            selector.unregister(key.fileobj)
    for file in outputs:  # what was written before the end
      while self._read_some(file, read, ask=False):
        pass
    if not answer:
      raise ConnectionError
    return list(read.values()), json.loads(answer)

  def _read_some(self, file: BinaryIO, read: dict[BinaryIO, bytes], ask: bool = True) -> bool:
    """Reads some output; False at its end or its limit, where the program is killed."""
    try:
      part = os.read(file.fileno(), 1 << 16)
    except OSError:
      return False
    read[file] = (read[file] + part)[: OUTPUT_BYTES + 1]
    if len(read[file]) > OUTPUT_BYTES:
      read[file] = read[file][:OUTPUT_BYTES]
      if ask:
        self._connection.send(b"output")
      return False
    return bool(part)

  def interrupt(self) -> None:
    """Ends the program that runs, if one does; for another thread than that of `run`."""
    with contextlib.suppress(OSError):
      self._connection.send(b"interrupted")

  def close(self) -> None:
    """Ends the server and everything it started; a second call does nothing."""
    self._connection.close()

  @property
  def alive(self) -> bool:
    """False once the server has ended: an idle one has nothing to say."""
    if self._connection.fileno() < 0:
      return False
    return not select.select([self._connection], [], [], 0)[0]


def pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
  """Returns the ends of a pipe, to read from and to write to."""
  read, write = os.pipe()
  return (
    stack.enter_context(os.fdopen(read, "rb", 0)),
    stack.enter_context(os.fdopen(write, "wb", 0)),
  )


def _write_some(file: BinaryIO, inputs: dict[BinaryIO, memoryview]) -> bool:
  """Writes some of an input and closes it at the end; True if nothing is left to do."""
  try:
    while inputs[file]:
      inputs[file] = inputs[file][os.write(file.fileno(), inputs[file][: 1 << 16]) :]
  except BlockingIOError:
    return False
  except OSError:  # nobody reads it any more
    pass
  return True


_fork_servers: list[_ForkServer] = []  # one, or none yet
_idle: list[_Server] = []
_lock = threading.RLock()


def _forget() -> None:
  """Leaves the parent's servers to the parent: one answers one process only."""
  global _lock
  _lock = threading.RLock()
  _idle.clear()
  _fork_servers.clear()


os.register_at_fork(after_in_child=_forget)


def _fork_server() -> _ForkServer:
  with _lock:
    if _fork_servers and not _fork_servers[0].alive:
      _fork_servers.pop().close()
    if not _fork_servers:
      _fork_servers.append(_ForkServer())
    return _fork_servers[0]


@atexit.register
def _close_all() -> None:
  for server in (*_idle, *_fork_servers):
    server.close()


@contextlib.contextmanager
def borrowed_server(unsafe: bool) -> Iterator[_Server]:
  """Yields an idle server, or a new one; it goes back unless it failed.

  Raises:
    IsolationError: this machine cannot isolate programs, and `unsafe` is False; or no server can
      be started.
  """
  require_isolation(unsafe)
  with _lock:
    while (server := _idle.pop() if _idle else None) and not server.alive:
      server.close()
  if server is None:
    server = _Server(layers())
  try:
    yield server
  except BaseException:
    server.close()
    raise
  with _lock:
    if len(_idle) < 2 * max(os.cpu_count() or 1, 2):
      _idle.append(server)
      return
  server.close()
