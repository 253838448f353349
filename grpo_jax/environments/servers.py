"""Starts the processes that run programs, and talks to them; `sandbox.py` says which there are.

One fork server is started afresh, so it has nothing of this process. It forks servers, each of
which runs one program at a time (`sandbox_server.py`). Everything goes through sockets and pipes: a
process that may no longer start programs, write files or send signals can still use it.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from grpo_jax.environments.isolation import IsolationError

OUTPUT_BYTES = 64 * 1024  # of standard output and of standard error each; more ends the program
TMP_BYTES = 16 * 2**20  # of all files in /tmp
PROCESSES = 16  # processes and threads of a program
_SERVER = Path(__file__).with_name("sandbox_server.py")
_GRACE = 10.0  # seconds that a server may take beyond a program's time
_MESSAGE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Execution:
  """Records what a program did.

  Attributes:
    stdout, stderr: decoded as UTF-8, cut at `OUTPUT_BYTES` bytes each.
    returncode: as in `subprocess`: the exit code, or minus the number of a signal.
    seconds: wall time.
    killed: None if the program ended by itself; else "time", "output", "memory" or "files", or
      "interrupted" by `Server.interrupt`.
  """

  stdout: str
  stderr: str
  returncode: int
  seconds: float
  killed: str | None


class ForkServer:
  """Starts the process that servers are forked from; it is fresh and has nothing of this one's."""

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
    """Tells whether the process still runs."""
    return self._process.poll() is None

  def connect(self, found: Sequence[str]) -> socket.socket:
    """Returns the connection to a new server behind these layers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
      socket.send_fds(self._control, [json.dumps(list(found)).encode()], [theirs.fileno()])
    return ours

  def close(self) -> None:
    """Lets the process end, as it does when nobody can ask it for a server."""
    self._control.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=2)


class Server:
  """Calls one server, which runs one program at a time."""

  def __init__(self, found: Sequence[str]) -> None:
    try:
      self._connection = fork_server().connect(found)
      self._connection.settimeout(_GRACE)
      ready = self._connection.recv(_MESSAGE)
    except OSError as error:
      raise IsolationError(f"the sandbox could not be started: {error}") from error
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
    """Tells whether an idle server still runs: then it has nothing to say."""
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


fork_servers: list[ForkServer] = []  # one, or none yet
idle: list[Server] = []
_lock = threading.RLock()


def _forget() -> None:
  """Leaves the parent's servers to the parent: one answers one process only."""
  global _lock
  _lock = threading.RLock()
  idle.clear()
  fork_servers.clear()


os.register_at_fork(after_in_child=_forget)


def fork_server() -> ForkServer:
  """Returns the fork server of this process, a new one if there is none alive.

  Raises:
    IsolationError: it cannot be started.
  """
  with _lock:
    if fork_servers and not fork_servers[0].alive:
      fork_servers.pop().close()
    if not fork_servers:
      try:
        fork_servers.append(ForkServer())
      except OSError as error:  # a confined process may not start another one
        raise IsolationError(f"the sandbox could not be started: {error}") from error
    return fork_servers[0]


@atexit.register
def _close_all() -> None:
  for server in (*idle, *fork_servers):
    server.close()


def take_idle() -> Server | None:
  """Returns a server that waits for a program, if there is one."""
  with _lock:
    while idle:
      server = idle.pop()
      if server.alive:
        return server
      server.close()
  return None


def give_back(server: Server) -> None:
  """Keeps a server for the next program, or closes it if there are enough."""
  with _lock:
    if len(idle) < 2 * max(os.cpu_count() or 1, 2):
      idle.append(server)
      return
  server.close()
