"""Runs Python that a model wrote, in the sandbox: a tool."""

from __future__ import annotations

from grpo_jax.environments import sandbox

SECONDS = 5.0  # of a program
OUTPUT_LENGTH = 1500  # characters of the output, and of the errors, that the model reads


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
  execution = sandbox.run_python(code, seconds=SECONDS)
  return _report(execution.stdout, execution.stderr, execution.killed)


def prepare() -> None:
  """Starts what runs programs, before this process loses the right to start others.

  Raises:
    IsolationError: this machine cannot isolate programs.
  """
  if not sandbox.layers():  # what else would be said of it is not for tools: they are never unsafe
    raise sandbox.IsolationError(f"the tool 'python' cannot run here: {sandbox.explain()}")
  sandbox.require_isolation()


python.prepare = prepare  # see `Environment`


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
