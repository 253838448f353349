"""Starts and ends a Python process that serves one module of this package over a connection.

The process is a new interpreter, not a fork: it has no threads, devices or locks of this one.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

# `import grpo_jax` would import jax, which takes a second and much memory: the package is an empty
# module, with submodules, until a function accesses another name.
_PROGRAM = """
import importlib.util, json, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = json.loads(connection.recv_bytes())
spec = importlib.util.find_spec("grpo_jax")
package = importlib.util.module_from_spec(spec)
def load(name):
  if name.startswith("__"):
    raise AttributeError(name)
  if importlib.util.find_spec("grpo_jax." + name):
    return importlib.import_module("grpo_jax." + name)
  del package.__getattr__
  spec.loader.exec_module(package)
  return getattr(package, name)
package.__getattr__ = load
sys.modules["grpo_jax"] = package
importlib.import_module(sys.argv[2]).serve(connection)
"""


def start(module: str, environment: Mapping[str, str]) -> tuple[subprocess.Popen, Connection]:
  """Starts a process that calls `serve(connection)` of a module.

  Args:
    module: dotted name, such as "grpo_jax.environments.template_process".
    environment: environment variables of the process.

  Returns:
    The process, which leads a session of its own, and this side of its connection.
  """
  connection, child = multiprocessing.Pipe()
  process = subprocess.Popen(
    [sys.executable, "-u", "-P", "-c", _PROGRAM, str(child.fileno()), module],
    pass_fds=[child.fileno()],
    stdin=subprocess.DEVNULL,
    # Ctrl-C is for the parent, and processes that a function starts end with the child.
    start_new_session=True,
    env=dict(environment),
  )
  child.close()
  with contextlib.suppress(OSError):  # the process has died, as the next message shows
    connection.send_bytes(json.dumps([str(folder) for folder in sys.path]).encode())
  return process, connection


def end(process: subprocess.Popen, connection: Connection) -> None:
  """Ends a process that `start` returned, and everything in its session."""
  connection.close()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def plain_environment() -> dict[str, str]:
  """Returns this process's environment without keys and tokens: only what Python itself needs."""
  plain = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")
  return {
    name: value
    for name, value in os.environ.items()
    if name in plain or name.startswith(("LC_", "PYTHON", "OMP_", "OPENBLAS_", "COVERAGE"))
  }
