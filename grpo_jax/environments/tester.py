"""Judges a model's program by tests that it cannot see and a verdict that it cannot write.

Functions are called from a process of their own, the tester (`tester_process.py`), which exchanges
plain data with the program's; programs that read and write are compared in this process. Either
way, nothing that a program prints, exits with, patches or finds in its memory counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from grpo_jax.environments import unit_tests
from grpo_jax.environments.sandbox import IsolationError, borrowed_server
from grpo_jax.environments.servers import Execution, pipe
from grpo_jax.environments.tester_process import DONE, FAILED, PASSED, READY

CACHED = 20_000  # verdicts that are remembered
_TESTER_SECONDS = 5.0  # that a tester may take beyond its candidate
# {"setup", "tests", "entry_point"} of functions, or {"pairs": [[stdin, stdout], ...]}.
Tests: TypeAlias = Mapping[str, Any]


class TestsError(ValueError):
  """Reports tests that fail before they call the program: the fault is theirs."""

  __test__ = False  # for pytest


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Says how a program did in its tests.

  Attributes:
    passed: number of tests that it passed.
    total: number of tests.
    complete: whether all passed, and the tests came to their end.
    reason: why it did not run to the end, in a few words; "" if it did.
  """

  passed: int
  total: int
  complete: bool
  reason: str = ""

  @property
  def share(self) -> float:
    """Returns the share of tests passed; 1.0 only if `complete`."""
    return 1.0 if self.complete else min(self.passed, self.total - 1) / self.total


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds what a program may use.

  Attributes:
    seconds: wall time of all its tests together.
    memory_mb: as in `sandbox.run_python`.
    stop_early: end the tests at the first failure.
    unsafe: as in `sandbox.run_python`.
  """

  seconds: float = 5.0
  memory_mb: int = 512
  stop_early: bool = False
  unsafe: bool = False


def judge(code: str, tests: Tests, limits: Limits = Limits()) -> Verdict:
  """Returns the verdict on a program; the same program and tests are run once.

  Args:
    code: the program.
    tests: {"setup": ..., "tests": ..., "entry_point": ...}, Python that asserts, with what stands
      before it and the name of the function under test (None: the tests call it by its name); or
      {"pairs": [[stdin, stdout], ...]}.

  Raises:
    TestsError: the tests fail by themselves.
    IsolationError: the sandbox failed, which says nothing about the program.

  Example:
    >>> from grpo_jax.environments.sandbox import layers
    >>> tests = {"setup": "", "tests": "assert f(1) == 2\\nassert f(2) == 3", "entry_point": None}
    >>> if layers():
    ...   assert judge("def f(x):\\n  return 2 * x", tests).share == 0.5
  """
  key = hashlib.sha256(json.dumps([code, tests, dataclasses.astuple(limits)]).encode()).digest()
  with _lock:
    if key in _verdicts:
      _verdicts.move_to_end(key)
      return _verdicts[key]
  run = _judge_pairs if "pairs" in tests else _judge_functions
  try:
    verdict = run(code, tests, limits)
  except IsolationError:  # a server was killed, by the machine rather than by the program
    verdict = run(code, tests, limits)
  with _lock:
    _verdicts[key] = verdict
    while len(_verdicts) > CACHED:
      _verdicts.popitem(last=False)
  return verdict


def judge_all(
  programs: Sequence[tuple[str, Tests]], limits: Limits, *, parallel: int = 0
) -> list[Verdict | IsolationError]:
  """Returns the verdicts on several programs, with the error where the sandbox failed.

  Args:
    programs: (code, tests) of each.
    limits: as in `judge`, which raises TestsError also here.
    parallel: programs at a time; 0: one per processor.
  """
  distinct = {json.dumps(program): program for program in programs}

  def verdict(program: tuple[str, Tests]) -> Verdict | IsolationError:
    try:
      return judge(*program, limits)
    except IsolationError as error:
      return error

  with ThreadPoolExecutor(parallel or os.cpu_count() or 1) as pool:
    verdicts = dict(zip(distinct, pool.map(verdict, distinct.values())))
  return [verdicts[json.dumps(program)] for program in programs]


_verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
_lock = threading.Lock()


# --- functions ------------------------------------------------------------------------------------


def _judge_functions(code: str, tests: Tests, limits: Limits) -> Verdict:
  """Runs the program and its tester, and returns what the tester wrote."""
  total = count(tests["tests"])
  nonce = secrets.token_hex(16)
  request = {**tests, "nonce": nonce, "stop_early": limits.stop_early}
  memory = limits.memory_mb * 2**20
  with contextlib.ExitStack() as stack:
    candidate, tester = (stack.enter_context(borrowed_server(limits.unsafe)) for _ in range(2))
    requests_read, requests_write = pipe(stack)
    answers_read, answers_write = pipe(stack)
    verdict_read, verdict_write = pipe(stack)
    background = _Background(
      lambda: candidate.run(
        code.encode("utf-8", "surrogatepass"), seconds=limits.seconds, memory_bytes=memory,
        role="candidate", files=[requests_read, answers_write],
      )
    )  # fmt: skip
    try:
      testing = tester.run(
        json.dumps(request).encode(), seconds=limits.seconds + _TESTER_SECONDS,
        memory_bytes=memory, role="tester", files=[answers_read, requests_write, verdict_write],
      )  # fmt: skip
    finally:
      candidate.interrupt()
      ran = background.result()
    written = _read(verdict_read)
  mark = nonce.encode() + READY
  if not written.startswith(mark):
    raise TestsError(f"the tests cannot be set up: {_last_line(testing)}")
  return _verdict(written[len(mark) :], total, ran, testing)


def _verdict(letters: bytes, total: int, ran: Execution, testing: Execution) -> Verdict:
  """Returns the verdict of the letters that a tester wrote after its nonce."""
  finished = letters.endswith(DONE) and testing.killed is None and testing.returncode == 0
  passed = letters.count(PASSED)
  complete = finished and passed > 0 and FAILED not in letters
  reason = ""
  if not finished:
    killed = ran.killed if ran.killed != "interrupted" else testing.killed
    reason = f"killed: {killed}" if killed else _last_line(ran)
  return Verdict(passed, total, complete, reason)


@functools.lru_cache(maxsize=4096)
def count(tests: str) -> int:
  """Returns the number of units of function tests, see `unit_tests.split`."""
  return unit_tests.split(tests)[1]


class _Background:
  """Calls a function in a thread; `result` waits for it, and raises what it raised."""

  def __init__(self, call: Callable[[], Execution]) -> None:
    self._call = call
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      self._value, self._error = self._call(), None
    except BaseException as error:
      self._error = error

  def result(self) -> Execution:
    self._thread.join()
    if self._error is not None:
      raise self._error
    return self._value


def _read(file: Any) -> bytes:
  """Returns what lies in a pipe whose writers have ended."""
  os.set_blocking(file.fileno(), False)
  data = b""
  with contextlib.suppress(BlockingIOError):
    while part := os.read(file.fileno(), 1 << 16):
      data += part
  return data


def _last_line(execution: Execution) -> str:
  lines = execution.stderr.strip().splitlines()
  return lines[-1] if lines else execution.killed or f"exit code {execution.returncode}"


# --- inputs and outputs ---------------------------------------------------------------------------


def _judge_pairs(code: str, tests: Tests, limits: Limits) -> Verdict:
  """Runs the program once for each input and compares what it writes, here."""
  pairs, passed, reason = tests["pairs"], 0, ""
  end = time.monotonic() + limits.seconds
  for stdin, stdout in pairs:
    left = end - time.monotonic()
    if left <= 0:
      reason = "killed: time"
      break
    with borrowed_server(limits.unsafe) as server:
      ran = server.run(
        code.encode("utf-8", "surrogatepass"), stdin.encode("utf-8", "surrogatepass"),
        seconds=left, memory_bytes=limits.memory_mb * 2**20,
      )  # fmt: skip
    right = ran.killed is None and ran.returncode == 0 and same_output(ran.stdout, stdout)
    passed += right
    if ran.killed or ran.returncode:
      reason = f"killed: {ran.killed}" if ran.killed else _last_line(ran)
    if not right and limits.stop_early:
      break
  return Verdict(passed, len(pairs), passed == len(pairs), reason)


def same_output(output: str, expected: str) -> bool:
  """Returns whether two outputs are the same, up to white space at the ends of lines and the text.

  Example:
    >>> same_output("1 2 \\n3\\n\\n", "1 2\\n3"), same_output("1  2", "1 2")
    (True, False)
  """
  return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
  return [line.rstrip() for line in text.rstrip().split("\n")]
