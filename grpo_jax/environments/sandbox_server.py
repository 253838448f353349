"""Runs in a process of its own: forks one confined child for each program that it is handed.

Started by `sandbox.py` as `python -I -S sandbox_server.py FD`, with an empty environment. It
imports the standard library and `isolation.py` beside it. A program and its input arrive as open
files, which the server itself never reads, so nothing of one program is left for the next.
"""

import array
import builtins
import contextlib
import errno
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import sysconfig
import traceback
from types import ModuleType, SimpleNamespace

# What programs of such tasks import most, loaded once.
_PRELOADED = (
  "abc", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
  "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "linecache", "math",
  "operator", "random", "re", "statistics", "string", "struct", "textwrap", "threading", "time",
  "typing", "unicodedata",
)  # fmt: skip
PROGRAM, STATUS = 3, 4  # descriptors in a child; further ones of the caller follow
_MESSAGE = 1 << 16


def _load_isolation():
  path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "isolation.py")
  spec = importlib.util.spec_from_file_location("isolation", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


isolation = _load_isolation()


def main() -> None:
  """Answers each request with one line of JSON; ends when the caller is gone."""
  for name in _PRELOADED:
    __import__(name)
  isolation.die_with_parent()
  isolation.adopt_orphans()
  connection = socket.socket(fileno=int(sys.argv[1]))
  while True:
    data, descriptors = _receive(connection)
    if not data:
      os._exit(0)
    if not descriptors:
      continue  # that a program wrote too much, which had ended by then
    request = SimpleNamespace(**json.loads(data))
    answer = _execute(request, descriptors, connection)
    connection.send(json.dumps(answer).encode())


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
  numbers = array.array("i")
  data, ancillary, _, _ = connection.recvmsg(_MESSAGE, socket.CMSG_LEN(16 * numbers.itemsize))
  for level, kind, payload in ancillary:
    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
      numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
  return data, list(numbers)


def _execute(request, descriptors: list[int], connection: socket.socket) -> dict:
  """Forks the child, waits for it, and leaves nothing of it running."""
  status_read, status_write = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      os.close(status_read)
      connection.close()
      _become(request, descriptors, status_write)
    except BaseException as error:  # before the program: a layer could not be put in place
      os.write(status_write, json.dumps({"setup": f"{error}"}).encode())
    finally:
      os._exit(1)
  os.close(status_write)
  for descriptor in descriptors:
    os.close(descriptor)
  killed = _wait(child, request.seconds, connection)
  _kill_all(child)
  status = b""
  while part := os.read(status_read, 4096):
    status += part
  os.close(status_read)
  answer = json.loads(status) if status else {"returncode": -signal.SIGKILL}
  return answer | {"killed": killed}


def _wait(child: int, seconds: float, connection: socket.socket) -> str | None:
  """Waits until the child ends, its time is over, or the caller says "kill" or is gone."""
  handle = os.pidfd_open(child)
  try:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(connection, select.POLLIN)
    ready = dict(poll.poll(seconds * 1000))
    if handle in ready:
      return None
    if connection.fileno() in ready:
      return connection.recv(_MESSAGE).decode() or "gone"
    return "time"
  finally:
    os.close(handle)


def _kill_all(child: int) -> None:
  """Kills the child and everything it started, and reaps all of it."""
  for kill in (os.killpg, os.kill):
    with contextlib.suppress(ProcessLookupError, PermissionError):
      kill(child, signal.SIGKILL)
  while True:  # orphans come to this process; each was killed with its group, or its namespace
    try:
      os.waitpid(-1, 0)
    except ChildProcessError:
      return
    except OSError as error:
      if error.errno != errno.EINTR:
        raise


def _become(request, descriptors: list[int], status: int) -> None:
  """Puts all layers in place and runs the program; does not return."""
  os.setsid()  # a process group of its own, killed as one
  layers, privileged = set(request.layers), "privileged" in request.layers
  if "namespaces" in layers:
    isolation.enter_namespaces(privileged=privileged)
    _fork()  # now process 1 of the new namespace
    folders = [*request.read, *_interpreter_folders()]
    isolation.enter_root(folders, tmp_bytes=request.tmp_bytes)
    workdir = "/tmp"
  else:
    workdir = request.workdir
    if privileged and "user" in layers:
      os.chown(workdir, isolation.NOBODY, isolation.NOBODY)
  descriptors = _arrange(descriptors, status)
  isolation.limit(
    cpu_seconds=int(request.seconds) + 1,
    memory_bytes=request.memory_bytes,
    file_bytes=request.tmp_bytes,
    open_files=64,
    processes=request.processes,
  )
  isolation.drop_privileges(user=privileged and "user" in layers)
  isolation.die_with_parent()
  os.chdir(workdir)
  # A process that is number 1 of its namespace ignores signals: the program is its child.
  _fork(report=STATUS)
  if "landlock" in layers:
    readable = [*request.read, *_interpreter_folders(), "/dev/null", "/dev/zero", "/dev/urandom"]
    isolation.landlock(read=readable, write=[workdir, "/dev/null"], signals=False)
  if "seccomp" in layers:
    programs = () if request.programs else isolation.PROGRAMS
    isolation.refuse_system_calls((*isolation.REFUSED, *isolation.SIGNALS, *programs))
  os.close(STATUS)
  _run(descriptors)


def _fork(report: int | None = None) -> None:
  """Returns in a new child; the parent waits for it, reports how it ended, and ends."""
  child = os.fork()
  if child == 0:
    return
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  pid = None
  while pid != child:  # the first process of a namespace also gets orphans
    pid, status = os.wait()
  if report is not None:
    with contextlib.suppress(OSError):
      os.write(report, json.dumps({"returncode": os.waitstatus_to_exitcode(status)}).encode())
  os._exit(0)


def _arrange(descriptors: list[int], status: int) -> list[int]:
  """Puts the caller's files at 0 to 3, the status at 4, further ones after; closes all others."""
  stdin, stdout, stderr, program, *others = descriptors
  order = [stdin, stdout, stderr, program, status, *others]
  high = [os.dup2(number, 100 + i) for i, number in enumerate(order)]
  for i, number in enumerate(high):
    os.dup2(number, i, inheritable=True)
  os.closerange(len(order), 256)
  return list(range(5, len(order)))


def _interpreter_folders() -> list[str]:
  """Returns the folders that the interpreter loads modules and libraries from."""
  paths = sysconfig.get_paths()
  folders = [paths["stdlib"], paths["platstdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
  return [path for path in dict.fromkeys(map(os.path.realpath, folders)) if os.path.isdir(path)]


def _run(descriptors: list[int]) -> None:
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
    with open(PROGRAM, "rb") as file:
      source = file.read()
    module = ModuleType("__main__")
    module.__dict__["__descriptors__"] = descriptors
    sys.modules["__main__"] = module
    exec(compile(source, "program", "exec"), module.__dict__)
    code = 0
  except SystemExit as error:
    code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
  except BaseException:
    kind, error, frames = sys.exc_info()
    with contextlib.suppress(BaseException):
      traceback.print_exception(kind, error, frames.tb_next)
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(BaseException):
        stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
  main()
