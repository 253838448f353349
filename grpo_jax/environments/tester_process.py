"""Runs in the sandbox: holds the tests of a problem and judges a candidate in another process.

The candidate is only reached through calls that carry plain data, so its own classes, patches and
frames do not exist here. The verdict goes to a descriptor that the candidate does not have, after
a number that it does not know. It imports the standard library and files beside it.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

from grpo_jax.environments import plain_data, unit_tests

# Letters of the verdict, after the nonce.
READY, PASSED, FAILED, DONE = b"R", b"P", b"F", b"D"


class CandidateGone(BaseException):
  """Reports that the candidate has ended; no `except Exception` of the tests hides it."""


class Candidate:
  """Asks the process under test, by its pipes."""

  def __init__(self, answers: int, requests: int) -> None:
    self._answers, self._requests = answers, requests
    self.gone = False

  def ask(self, request: list | None) -> object:
    """Sends a request, if there is one, and returns the value of the answer."""
    if self.gone:
      raise CandidateGone
    try:
      if request is not None:
        plain_data.send(self._requests, request)
      answer = plain_data.receive(self._answers)
      ((kind, value),) = answer.items()
      if kind == "raised":
        name, text = value
        error = _exception(name, text)
      elif kind not in ("value", "ready"):
        raise plain_data.NotPlain(f"an answer {kind!r}")
    except (OSError, EOFError, plain_data.NotPlain, ValueError, TypeError, AttributeError) as error:
      # A message that is none leaves no way to find the next one.
      self.gone = True
      raise CandidateGone from error
    if kind == "raised":
      raise error
    return value


def _exception(name: object, text: object) -> Exception:
  """Returns the built-in exception of a name, for tests that expect one.

  StopIteration would end a loop of the tests instead of failing them.
  """
  kind = getattr(builtins, name, None) if isinstance(name, str) else None
  plain = isinstance(kind, type) and issubclass(kind, Exception)
  if not plain or issubclass(kind, StopIteration | StopAsyncIteration | UnicodeError):
    return RuntimeError(f"{name}: {text}")
  return kind(str(text))


def _proxy(candidate: Candidate, name: str):
  def call(*arguments, **keywords):
    try:
      request = [name, list(arguments), keywords]
      plain_data.encode(request)
    except plain_data.NotPlain as error:
      raise TypeError(f"an argument of {name} cannot be carried: {error}") from error
    return candidate.ask(request)

  call.__name__ = name
  return call


def run(source: bytes, namespace: dict, descriptors: list[int]) -> None:
  """Runs the tests of a request and writes the verdict.

  Args:
    source: JSON of the nonce, the `setup` that stands before the tests, the `tests`, the
      `entry_point` (or null), and whether to `stop_early`, at the first failure.
    namespace: of the tests.
    descriptors: to read the candidate's answers from, to write requests to, for the verdict.
  """
  request = json.loads(source)
  answers, requests, verdict = descriptors
  candidate = Candidate(answers, requests)
  tree, _ = unit_tests.split(request["tests"])
  has_check = unit_tests.check_function(tree) is not None
  entry_point = request["entry_point"]

  class Stop(BaseException):
    """Ends the tests."""

  def record(passed: bool) -> None:
    passed = passed and not candidate.gone
    os.write(verdict, PASSED if passed else FAILED)
    if not passed and request["stop_early"]:
      raise Stop

  namespace["__name__"] = "tests"
  exec(compile(request["setup"], "setup", "exec"), namespace)
  _bind(namespace, candidate, unit_tests.names(tree), entry_point)
  namespace[unit_tests.RECORD] = record
  tests = compile(tree, "tests", "exec")
  if has_check:
    exec(tests, namespace)
    os.write(verdict, request["nonce"].encode() + READY)
    target = _proxy(candidate, entry_point)
    namespace[entry_point] = target
  else:
    os.write(verdict, request["nonce"].encode() + READY)
  try:
    candidate.ask(None)  # that its program ran
    if has_check:
      namespace[unit_tests.CHECK](target)
    else:
      exec(tests, namespace)
  except (Exception, CandidateGone, Stop):
    return  # what has not passed has failed
  if not candidate.gone:
    os.write(verdict, DONE)


def _bind(namespace: dict, candidate: Candidate, names: set[str], entry_point: str | None) -> None:
  """Gives the tests what they name: the candidate's functions, and modules of the library."""
  for name in names | ({entry_point} if entry_point else set()):
    if name == entry_point:
      namespace[name] = _proxy(candidate, name)
    elif name in namespace or hasattr(builtins, name) or name == unit_tests.RECORD:
      continue
    elif name in sys.stdlib_module_names:
      namespace[name] = __import__(name)
    else:
      namespace[name] = _proxy(candidate, name)
