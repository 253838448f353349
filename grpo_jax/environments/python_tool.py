"""The tool that runs Python which a model wrote, in the sandbox.

An isolated worker process cannot start the sandbox, so `prepare` leaves a child behind before it is
isolated, which runs programs for it.
"""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection, Pipe

from grpo_jax.environments import isolation, sandbox

SECONDS = 5.0  # of a program
OUTPUT_LENGTH = 1500  # characters of the output, and of the errors, that the model reads
_runner: Connection | None = None  # to the child of this process, once `prepare` has started one
_number = 0  # of the last program


def python(code: str) -> str:
  """Runs a Python program and returns what it prints.

  Args:
    code: The program. Only the standard library can be imported.

  Returns:
    The standard output, then errors.

  Example:
    >>> from grpo_jax.environments.sandbox import layers
    >>> if layers():
    ...   assert python("print(12 * 7)") == "84"
  """
  if _runner is None:
    execution = sandbox.run_python(code, seconds=SECONDS)
    return _report(execution.stdout, execution.stderr, execution.killed)
  return _report(*_ask(code))


def prepare() -> None:
  """Starts the child that runs programs for this process, a worker that is not isolated yet.

  Raises:
    IsolationError: this machine cannot isolate programs.
  """
  global _runner
  if not sandbox.layers():
    raise isolation.IsolationError(f"the tool 'python' cannot run here: {sandbox.explain()}")
  if _runner is not None:
    return
  ours, theirs = Pipe()
  if os.fork() == 0:
    try:
      isolation.die_with_parent()
      keep = theirs.fileno()
      os.closerange(3, keep)
      os.closerange(keep + 1, 65536)
      _serve(theirs)
    finally:
      os._exit(0)
  theirs.close()
  _runner = ours


python.prepare = prepare  # see `Environment`


def _serve(connection: Connection) -> None:
  """Runs programs until the other end is gone. Requests and answers are JSON."""
  while True:
    number, code = json.loads(connection.recv_bytes())
    try:
      execution = sandbox.run_python(code, seconds=SECONDS)
      answer = [execution.stdout, execution.stderr, execution.killed]
    except Exception as error:
      answer = [f"{type(error).__name__}: {error}"]
    connection.send_bytes(json.dumps([number, *answer]).encode())


def _ask(code: str) -> list:
  """Returns what the child answers; answers to calls that were interrupted are skipped."""
  global _number
  _number += 1
  try:
    _runner.send_bytes(json.dumps([_number, code]).encode())
    number = 0
    while number != _number:
      number, *answer = json.loads(_runner.recv_bytes())
  except (EOFError, OSError) as error:
    raise isolation.IsolationError("the process that runs programs ended") from error
  if len(answer) == 1:
    raise isolation.IsolationError(f"the sandbox failed: {answer[0]}")
  return answer


def _report(stdout: str, stderr: str, killed: str | None) -> str:
  """Returns what the model reads: why the program was ended, its output, then its errors."""
  reasons = {"time": f"it ran longer than {SECONDS:g} s", "memory": "it used too much memory"}
  ended = f"The program was ended: {reasons.get(killed, 'it printed too much')}" if killed else ""
  stdout, stderr = stdout.strip("\n"), stderr.strip("\n")
  if len(stdout) > OUTPUT_LENGTH:
    stdout = f"{stdout[:OUTPUT_LENGTH]} ... (cut: {len(stdout):,} characters)"
  if len(stderr) > OUTPUT_LENGTH:  # the end of a traceback says what is wrong
    stderr = f"... {stderr[-OUTPUT_LENGTH:]}"
  return "\n".join(part for part in (ended, stdout, stderr) if part) or "(no output)"
