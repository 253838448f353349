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
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo_jax.environments import isolation
from grpo_jax.environments.isolation import IsolationError

OUTPUT_BYTES = 64 * 1024  # of standard output and of standard error each; more ends the program
TMP_BYTES = 16 * 2**20  # of all files in /tmp
PROCESSES = 16  # processes and threads of a program
_SERVER = Path(__file__).with_name("sandbox_server.py")
_GRACE = 5.0  # seconds that a server may take beyond a program's time
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
  if not (0 < seconds <= 3600 and 16 <= memory_mb <= 2**20):
    raise ValueError(
      f"seconds is {seconds} and memory_mb {memory_mb}: they must be in (0, 3600] and [16, 2^20]"
    )
  with _borrowed_server(unsafe) as server:
    return server.run(
      code.encode("utf-8", "surrogatepass"), stdin.encode("utf-8", "surrogatepass"),
      seconds=seconds, memory_bytes=memory_mb * 2**20, programs=programs,
    )  # fmt: skip


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
      out = server.run(_PROBE.encode(), b"", seconds=10.0, memory_bytes=2**29, programs=False)
    return out.stdout == "isolated\n"
  except (IsolationError, OSError):
    return False


# --- servers --------------------------------------------------------------------------------------


class _Server:
  """One server process, which runs one program at a time."""

  def __init__(self, found: tuple[str, ...]) -> None:
    self._layers = found
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SERVER), str(theirs.fileno())],
        env={}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
      )  # fmt: skip
    self._connection = ours
    self._folder = tempfile.mkdtemp(prefix="grpo_jax_sandbox_")

  def run(
    self,
    code: bytes,
    stdin: bytes,
    *,
    seconds: float,
    memory_bytes: int,
    programs: bool,
    descriptors: Sequence[int] = (),
  ) -> Execution:
    """Runs one program; `descriptors` are further open files for it, see `__descriptors__`."""
    workdir = tempfile.mkdtemp(dir=self._folder)
    request = {
      "layers": self._layers, "seconds": seconds, "memory_bytes": memory_bytes,
      "programs": programs, "tmp_bytes": TMP_BYTES, "processes": PROCESSES, "workdir": workdir,
      "read": [],
    }  # fmt: skip
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
      files = [stack.enter_context(_memory_file(data)) for data in (stdin, code)]
      out_read, out_write = os.pipe()
      err_read, err_write = os.pipe()
      for pipe in (out_read, err_read):
        stack.callback(os.close, pipe)
      try:
        fds = [files[0].fileno(), out_write, err_write, files[1].fileno(), *descriptors]
        try:
          socket.send_fds(self._connection, [json.dumps(request).encode()], fds)
        finally:
          os.close(out_write)
          os.close(err_write)
        (stdout, stderr), answer = self._collect([out_read, err_read], seconds)
      except ConnectionError as error:
        self.close()
        raise IsolationError("the sandbox's server process ended") from error
    shutil.rmtree(workdir, ignore_errors=True)
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

  def _collect(self, pipes: list[int], seconds: float) -> tuple[list[bytes], dict]:
    """Reads output up to its limit until the server answers."""
    outputs: dict[int, bytes] = dict.fromkeys(pipes, b"")
    deadline, answer = time.monotonic() + seconds + _GRACE, None
    with selectors.DefaultSelector() as selector:
      for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)
      selector.register(self._connection, selectors.EVENT_READ)
      while answer is None:
        events = selector.select(max(deadline - time.monotonic(), 0))
        if not events:
          raise IsolationError("the sandbox did not answer in time; its process was killed")
        for key, _ in events:
          if key.fileobj is self._connection:
            answer = self._connection.recv(1 << 16)
          elif not self._read(key.fd, outputs):
            selector.unregister(key.fd)
    for pipe in pipes:  # what was written before the end
      os.set_blocking(pipe, False)
      while self._read(pipe, outputs, ask=False):
        pass
    if not answer:
      raise ConnectionError
    return [outputs[pipe] for pipe in pipes], json.loads(answer)

  def _read(self, pipe: int, outputs: dict[int, bytes], ask: bool = True) -> bool:
    """Reads some of a pipe; False at its end or its limit, where the program is killed."""
    try:
      part = os.read(pipe, 1 << 16)
    except (BlockingIOError, OSError):
      return False
    outputs[pipe] = (outputs[pipe] + part)[: OUTPUT_BYTES + 1]
    if len(outputs[pipe]) > OUTPUT_BYTES:
      outputs[pipe] = outputs[pipe][:OUTPUT_BYTES]
      if ask:
        self._connection.send(b"output")
      return False
    return bool(part)

  def close(self) -> None:
    """Ends the process and everything it started; a second call does nothing."""
    self._connection.close()
    if self._process.poll() is None:
      try:
        self._process.wait(timeout=2)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()
    shutil.rmtree(self._folder, ignore_errors=True)

  @property
  def alive(self) -> bool:
    return self._connection.fileno() >= 0 and self._process.poll() is None


def _memory_file(data: bytes):
  """Returns an open file that lies in memory, at its beginning."""
  file = os.fdopen(os.memfd_create("sandbox", os.MFD_CLOEXEC), "w+b")
  file.write(data)
  file.flush()
  file.seek(0)
  return file


_idle: list[_Server] = []
_lock = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)  # a server answers one process only


@atexit.register
def _close_idle() -> None:
  for server in _idle:
    server.close()


@contextlib.contextmanager
def _borrowed_server(unsafe: bool) -> Iterator[_Server]:
  """Yields an idle server, or a new one; it goes back unless it failed."""
  found = layers()
  if not found and not unsafe:
    raise IsolationError(
      f"{explain()}. Run it in a Linux container or virtual machine that allows user namespaces, "
      "or pass unsafe=True to run a model's code with the rights of this process"
    )
  with _lock:
    server = _idle.pop() if _idle else None
  if server is None or not server.alive:
    server = _Server(found)
  try:
    yield server
  except BaseException:
    server.close()
    raise
  with _lock:
    if len(_idle) < max(os.cpu_count() or 1, 2):
      _idle.append(server)
      return
  server.close()
