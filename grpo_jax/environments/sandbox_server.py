"""Forks one confined child for each program that it is handed, in a process of its own.

Started by `sandbox.py` as `python -I -S sandbox_server.py FD`, with an empty environment. The first
process is the fork server: for each connection that it is sent, it forks a server, which enters
the namespaces once and then runs programs one after another. A program and its input arrive as
pipes that only its own child reads, so nothing of one program is left for the next.

It imports the standard library and files beside it, never the package `grpo_jax` as a whole.
"""

import array
import atexit
import builtins
import contextlib
import errno
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from types import ModuleType, SimpleNamespace

if __name__ == "__main__":  # the packages without their own imports, such as jax
  _here = os.path.dirname(os.path.abspath(__file__))
  for _name, _folder in (("grpo_jax", os.path.dirname(_here)), ("grpo_jax.environments", _here)):
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__path__ = [_folder]

from grpo_jax.environments import candidate_process, isolation, tester_process
from grpo_jax.environments.usage import Usage

# What programs of such tasks import most, loaded once.
_PRELOADED = (
  "abc", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
  "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "linecache", "math",
  "operator", "random", "re", "statistics", "string", "struct", "textwrap", "threading", "time",
  "typing", "unicodedata",
)  # fmt: skip
PROGRAM, STATUS = 3, 4  # descriptors in a child; further ones of the caller follow
OPEN_FILES = 64
_MESSAGE = 1 << 16
_POLL = 0.05  # seconds between looks at the memory and files of a program


def main() -> None:
  """Forks a server for each connection; ends when the caller is gone."""
  for name in _PRELOADED:
    __import__(name)
  gc.freeze()
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # servers that ended leave no zombies
  control = socket.socket(fileno=int(sys.argv[1]))
  while True:
    data, descriptors = _receive(control)
    if not data:
      os._exit(0)
    if os.fork() == 0:
      control.close()
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      _Server(socket.socket(fileno=descriptors[0]), json.loads(data)).serve()
    for descriptor in descriptors:
      os.close(descriptor)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
  numbers = array.array("i")
  try:
    data, ancillary, _, _ = connection.recvmsg(_MESSAGE, socket.CMSG_LEN(16 * numbers.itemsize))
  except ConnectionError:
    return b"", []
  for level, kind, payload in ancillary:
    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
      numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
  return data, list(numbers)


class _Server:
  """Runs the programs of one connection, one after another."""

  def __init__(self, connection: socket.socket, layers: list[str]) -> None:
    self._connection, self._layers = connection, set(layers)
    self._apart = "namespaces" in layers
    self._user = isolation.unused_user() if {"privileged", "user"} <= self._layers else None
    self._folder = ""  # of the programs' working folders, where /tmp is the host's

  def serve(self) -> None:
    """Answers each request with a line of JSON; ends when the caller is gone."""
    try:
      self._start()
      self._connection.send(json.dumps({"pid": os.getpid()}).encode())
    except BaseException as error:
      with contextlib.suppress(OSError):
        self._connection.send(json.dumps({"setup": f"{error}"}).encode())
      self._end()
    while True:
      data, descriptors = _receive(self._connection)
      if not data:
        self._end()
      if not descriptors:
        continue  # that a program wrote too much, which had ended by then
      answer = self._execute(SimpleNamespace(**json.loads(data)), descriptors)
      try:
        self._connection.send(json.dumps(answer).encode())
      except OSError:
        self._end()

  def _start(self) -> None:
    isolation.adopt_orphans()
    self._usage = Usage()
    self._readable = _interpreter_folders()
    if self._apart:
      isolation.enter_namespaces(privileged="privileged" in self._layers)
      isolation.enter_root(self._readable)
    else:
      self._folder = tempfile.mkdtemp(prefix="grpo_jax_sandbox_")
      os.chmod(self._folder, 0o711)

  def _end(self) -> None:
    if self._folder:
      shutil.rmtree(self._folder, ignore_errors=True)
    os._exit(0)

  def _execute(self, request, descriptors: list[int]) -> dict:
    """Forks the child, waits for it, and leaves nothing of it running."""
    status_read, status_write = os.pipe()
    workdir, child, answer = "/tmp", None, {}
    try:
      if self._apart:
        isolation.mount_tmp(request.tmp_bytes)
        child = isolation.fork_apart()
      else:
        workdir = self._make_folder()
        # The limit counts all processes of the user, who may be somebody with others.
        request.processes += isolation.processes_of(self._user)
        child = os.fork()
    except (OSError, isolation.IsolationError) as error:
      answer = {"setup": f"{error}"}
    if child == 0:
      self._become(request, descriptors, status_write, workdir)
    for descriptor in (status_write, *descriptors):
      os.close(descriptor)
    if child is not None:
      killed = self._wait(child, request, "" if self._apart else workdir)
      answer = {"returncode": _kill_all(child), "killed": killed}
    with open(status_read, "rb") as file:
      for line in file:
        answer |= json.loads(line)
    if self._apart:
      isolation.unmount_tmp()
    else:
      shutil.rmtree(workdir, ignore_errors=True)
    return answer

  def _make_folder(self) -> str:
    folder = tempfile.mkdtemp(dir=self._folder)
    if self._user is not None:
      os.chown(folder, self._user, self._user)
    return folder

  def _wait(self, child: int, request, folder: str) -> str | None:
    """Waits until the child ends, uses too much, or the caller says why to kill it or is gone."""
    handle, end = os.pidfd_open(child), time.monotonic() + request.seconds
    try:
      poll = select.poll()
      poll.register(handle, select.POLLIN)
      poll.register(self._connection, select.POLLIN)
      while (left := end - time.monotonic()) > 0:
        ready = dict(poll.poll(min(left, _POLL) * 1000))
        if handle in ready:
          return None
        if self._connection.fileno() in ready:
          return self._connection.recv(_MESSAGE).decode() or "gone"
        if self._usage.memory() > request.memory_bytes:
          return "memory"
        if folder and self._usage.disk(folder) > request.tmp_bytes:
          return "files"
      return "time"
    finally:
      os.close(handle)

  def _become(self, request, descriptors: list[int], status: int, workdir: str) -> None:
    """Puts all layers in place and runs the program; does not return."""
    try:
      os.setsid()  # a process group of its own, killed as one
      descriptors, status = _arrange(descriptors, status), STATUS
      os.chdir(workdir)
      isolation.limit(
        cpu_seconds=int(request.seconds) + 1,
        memory_bytes=request.memory_bytes,
        file_bytes=request.tmp_bytes,
        open_files=OPEN_FILES,
        processes=request.processes,
      )
      isolation.drop_privileges(user=self._user)
      isolation.die_with_parent()
      if self._apart:
        # A process that is number 1 of its namespace ignores signals: the program is its child.
        _fork_reporting()
      if "landlock" in self._layers:
        readable = [*self._readable, "/dev/null", "/dev/zero", "/dev/urandom"]
        isolation.landlock(read=readable, write=[workdir, "/dev/null"], signals=False)
      if "seccomp" in self._layers:
        programs = () if request.programs else isolation.PROGRAMS
        isolation.refuse_system_calls((*isolation.REFUSED, *isolation.SIGNALS, *programs))
      os.close(STATUS)
    except BaseException as error:  # a layer could not be put in place
      _report(status, setup=f"{error}")
      os._exit(1)
    _run(request.role, descriptors)


def _report(status: int, **values: object) -> None:
  with contextlib.suppress(OSError):
    os.write(status, json.dumps(values).encode() + b"\n")


def _kill_all(child: int) -> int:
  """Kills the child and everything it started, reaps all of it, and returns the child's code."""
  code = -signal.SIGKILL
  for kill in (os.killpg, os.kill):
    with contextlib.suppress(ProcessLookupError, PermissionError):
      kill(child, signal.SIGKILL)
  while True:  # orphans come to this process; each was killed with its group, or its namespace
    try:
      pid, status = os.waitpid(-1, 0)
    except ChildProcessError:
      return code
    except OSError as error:
      if error.errno != errno.EINTR:
        raise
    else:
      code = os.waitstatus_to_exitcode(status) if pid == child else code


def _fork_reporting() -> None:
  """Returns in a new child; the parent waits for it, reports how it ended, and ends."""
  child = os.fork()
  if child == 0:
    isolation.die_with_parent()
    return
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  pid = None
  while pid != child:  # the first process of a namespace also gets orphans
    pid, status = os.wait()
  _report(STATUS, returncode=os.waitstatus_to_exitcode(status))
  os._exit(0)


def _arrange(descriptors: list[int], status: int) -> list[int]:
  """Puts the caller's files at 0 to 3, the status at 4, further ones after; closes all others."""
  stdin, stdout, stderr, program, *others = descriptors
  order = [stdin, stdout, stderr, program, status, *others]
  high = [os.dup2(number, 100 + i) for i, number in enumerate(order)]
  for i, number in enumerate(high):
    os.dup2(number, i, inheritable=True)
  os.closerange(len(order), 4096)
  return list(range(5, len(order)))


def _interpreter_folders() -> list[str]:
  """Returns the folders that the interpreter loads modules and libraries from."""
  paths = sysconfig.get_paths()
  folders = [paths["stdlib"], paths["platstdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
  return [path for path in dict.fromkeys(map(os.path.realpath, folders)) if os.path.isdir(path)]


def _run(role: str, descriptors: list[int]) -> None:
  """Executes the program as `__main__` with Python's own exit codes; does not return."""
  code = 1
  try:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
      signal.signal(number, signal.SIG_DFL)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace")
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")
    os.environ.clear()  # Python sets LC_CTYPE itself
    builtins.exit = builtins.quit = sys.exit  # of the module `site`, which is not loaded
    sys.argv, sys.path[:] = ["program"], [p for p in sys.path if "environments" not in p]
    for name in [name for name in sys.modules if name.startswith("grpo_jax")]:
      del sys.modules[name]
    with open(PROGRAM, "rb") as file:
      source = file.read()
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    _ROLES[role](source, module.__dict__, descriptors)
    code = 0
  except SystemExit as error:
    code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
  except BaseException:
    kind, error, frames = sys.exc_info()
    with contextlib.suppress(BaseException):
      traceback.print_exception(kind, error, frames.tb_next and frames.tb_next.tb_next)
  finally:
    with contextlib.suppress(BaseException):
      for thread in threading.enumerate():  # as Python does at its end
        if thread is not threading.current_thread() and not thread.daemon:
          thread.join()
      atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(BaseException):
        stream.flush()
    os._exit(code & 0xFF)


def _run_program(source: bytes, namespace: dict, descriptors: list[int]) -> None:
  exec(compile(source, "program", "exec"), namespace)


# What a child does with the text it is handed.
_ROLES = {
  "program": _run_program,
  "candidate": candidate_process.run,
  "tester": tester_process.run,
}

if __name__ == "__main__":
  main()
