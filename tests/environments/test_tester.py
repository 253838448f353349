"""Tests that a verdict is right and cannot be forged."""

import pytest

from grpo_jax.environments import sandbox, tester
from grpo_jax.environments.sandbox import IsolationError
from grpo_jax.environments.tester import Limits, TestsError, Verdict, judge, judge_all, same_output

pytestmark = pytest.mark.skipif(
  not sandbox.layers(), reason="needs Linux with namespaces or Landlock"
)
TESTS = {
  "setup": "",
  "tests": "def check(f):\n  assert f(2) == 4\n  assert f(3) == 9\n  assert f(-1) == 1",
  "entry_point": "square",
}
FAST = Limits(seconds=2.0)


def functions(tests, setup="", entry_point=None):
  return {"setup": setup, "tests": tests, "entry_point": entry_point}


@pytest.mark.parametrize(
  ("code", "passed", "complete"),
  [
    ("def square(x): return x * x", 3, True),
    ("square = lambda x: x ** 2", 3, True),
    ("from functools import cache\n@cache\ndef square(x): return x * x", 3, True),
    ("print('noise')\ndef square(x):\n  print(x)\n  return x * x", 3, True),
    ("def square(x): return x * x if x > 0 else 0", 2, False),
    ("def square(x): return [x * x]", 0, False),
    ("def square(x): 1 / 0", 0, False),
    ("def square(x): exit() if x == 3 else None\n  return x * x", 0, False),
    ("def square(x):\n  if x == 3: exit()\n  return x * x", 2, False),
    ("def cube(x): return x * x", 0, False),
    ("def square(x): return x *", 0, False),
    ("", 0, False),
    ("\0", 0, False),
    ("def square(x):\n  if x == 3:\n    while True: pass\n  return x * x", 1, False),
    ("if __name__ == '__main__': raise ValueError\ndef square(x): return x * x", 3, True),
  ],
)
def test_tests_are_counted(code, passed, complete):
  verdict = judge(code, TESTS, FAST)
  assert (verdict.passed, verdict.total, verdict.complete) == (passed, 3, complete)
  assert verdict.share == passed / 3


GOOD = "def square(x): return x * x\n"
# Each is wrong or ends early; in a process shared with the tests, most would pass.
FORGERIES = {
  "exit at import": "import sys\nsys.exit(0)",
  "exit at import, after the function": GOOD + "import sys\nsys.exit(0)",
  "exit in a call": "import sys\ndef square(x): sys.exit(0)",
  "hard exit at import": GOOD + "import os\nos._exit(0)",
  "hard exit in a call": "import os\ndef square(x): os._exit(0)",
  "exit after one test": "import os\ndef square(x):\n  if x != 2: os._exit(0)\n  return 4",
  "printed markers": "def square(x):\n  print('PPPD', 'RPPPD', 'OK', 'passed', flush=True)",
  "markers to all descriptors": """
import os
def square(x):
  for number in range(1, 64):
    try: os.write(number, b"RPPPD")
    except OSError: pass
""",
  "answers before the questions": """
import os
for number in range(3, 64):
  try:
    for value in (b"4", b"9", b"1"):
      data = b'["d", "value", ' + value + b']'
      os.write(number, len(data).to_bytes(4, "big") + data)
  except OSError: pass
os._exit(0)
""",
  "an int that equals everything": """
class Sly(int):
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  __hash__ = int.__hash__
def square(x): return Sly(0)
""",
  "an object that equals everything": """
class Sly:
  def __eq__(self, other): return True
def square(x): return Sly()
""",
  "an object that is decoded to something": """
class Sly:
  def __reduce__(self): return (eval, ("4",))
  def __iter__(self): return iter("4")
  def __index__(self): return 4
def square(x): return Sly()
""",
  "a patched AssertionError": """
import builtins
class Never(Exception): pass
builtins.AssertionError = Never
def square(x): return 0
""",
  "patched builtins": """
import builtins
builtins.__dict__.update(isinstance=lambda *a: True, len=lambda x: 4, all=lambda x: True)
builtins.exec = builtins.compile = builtins.__import__ = lambda *a, **k: None
def square(x): return 0
""",
  "a patched test framework": """
import sys, types, unittest
unittest.TestCase.assertEqual = lambda *a, **k: None
sys.modules["pytest"] = types.ModuleType("pytest")
def square(x): return 0
""",
  "patched helpers of the channel": """
import json, os, sys
def square(x):
  frame = sys._getframe()
  while frame:
    for name, value in list(frame.f_globals.items()) + list(frame.f_locals.items()):
      if name in ("answer", "message", "plain_data"):
        frame.f_globals["PASSED"] = True
    frame = frame.f_back
  json.dumps = lambda *a, **k: '["d", "value", 99]'
  return 0
""",
  "expected values from the frames": """
import sys
def square(x):
  frame = sys._getframe()
  while frame:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
      if isinstance(value, str) and "assert" in value and "== 4" in value:
        return {2: 4, 3: 9, -1: 1}[x]
    frame = frame.f_back
""",
  "expected values from the heap": """
import gc
def square(x):
  for value in gc.get_objects():
    if isinstance(value, dict) and "tests" in value and "entry_point" in value:
      return {2: 4, 3: 9, -1: 1}[x]
""",
  "a trick at exit": """
import atexit, os
atexit.register(os._exit, 0)
def square(x): raise SystemExit(0)
""",
  "an exception that ends loops": "def square(x): raise StopIteration",
  "a check of its own": "def check(f): pass\ndef square(x): return 0",
  "a record of its own": "def __record__(passed): pass\ndef square(x): return 0",
  "a fork that answers": """
import os
os.fork()
def square(x): return 0
""",
  "a signal that ends it": "import signal\ndef square(x): signal.raise_signal(9)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
  verdict = judge(FORGERIES[name], TESTS, FAST)
  assert not verdict.complete
  assert verdict.passed == (1 if name == "exit after one test" else 0)


@pytest.mark.parametrize(
  ("tests", "code"),
  [
    # Each stands for a way in which tests ask; the program must not choose the answer.
    ("assert all(map(f, [1, 2]))", "def f(x): raise StopIteration"),
    ("assert set(f(1)) == {1, 2}", "def set(x): return {1, 2}\ndef f(x): return []"),
    ("assert f(1) != 2", "class S(int):\n  __ne__ = lambda s, o: True\ndef f(x): return S(2)"),
    ("assert isinstance(f(1), list)", "class L(list): pass\ndef f(x): return L()"),
    ("try:\n  r = f(1)\nexcept:\n  r = 4\nassert r == 4", "import os\ndef f(x): os._exit(0)"),
    ("try:\n  assert f(1) == 1\nexcept Exception:\n  pass", "import os\ndef f(x): os._exit(0)"),
    ("assert f(1) is not None", "class N: pass\ndef f(x): return N()"),
    ("assert f(1)", "class T:\n  def __bool__(self): return True\ndef f(x): return T()"),
  ],
)
def test_no_way_of_asking_lets_a_program_choose(tests, code):
  verdict = judge(code, functions(tests), FAST)
  assert (verdict.passed, verdict.complete) == (0, False)


@pytest.mark.parametrize(
  ("tests", "code"),
  [
    ("assert f(1, b=2) == {'a': (1, [2])}", "def f(a, b): return {'a': (a, [b])}"),
    ("assert f([1, 2]) == {1: 1, 2: 1}", "from collections import Counter\nf = Counter"),
    ("try:\n  f(0)\n  assert False\nexcept ZeroDivisionError:\n  pass", "def f(x): return 1 / x"),
    ("assert math.isclose(f(2), math.sqrt(2))", "def f(x): return x ** .5"),
    ("assert f(10**400) == 10**400", "def f(x): return x"),
    ("import random\nfor _ in range(20):\n  x = random.random()\n  assert f(x) == x",
     "def f(x): return x"),
    ("assert g(f(2)) == 8", "def f(x): return x * 2\ndef g(x): return x * 2"),
    ("assert f(f) == 1", "def f(x): return 1"),
  ],
)  # fmt: skip
def test_what_tests_may_ask(tests, code):
  complete = judge(code, functions(tests), FAST).complete
  assert complete == (tests != "assert f(f) == 1")  # a function is not plain data


def test_tests_may_use_what_stands_before_them():
  tests = functions("assert double(f(2)) == 8", setup="def double(x): return 2 * x")
  assert judge("def f(x): return x * x", tests, FAST).complete
  assert not judge("def f(x): return 0\ndef double(x): return 8", tests, FAST).complete


def test_early_end_of_the_tests():
  code = "def square(x): return 9"
  assert judge(code, TESTS, FAST).passed == 1
  assert judge(code, TESTS, Limits(seconds=2.0, stop_early=True)).passed == 0


@pytest.mark.parametrize(
  "tests",
  [
    functions("import numpy\nassert f(1) == 1", setup="import numpy"),
    functions("def check(f): assert f(1)\nraise ValueError", entry_point="f"),
    functions("assert f(1) == 1", setup="import sys\nsys.exit(0)"),
  ],
)
def test_tests_that_fail_by_themselves_are_no_verdict(tests):
  with pytest.raises(TestsError, match="cannot be set up"):
    judge("def f(x): return 1", tests, FAST)


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch):
  def fail(*_):
    raise IsolationError("no")

  tester._verdicts.clear()
  monkeypatch.setattr(tester, "borrowed_server", fail)
  with pytest.raises(IsolationError):
    judge(GOOD, TESTS, FAST)
  (error,) = judge_all([(GOOD, TESTS)], FAST)
  assert isinstance(error, IsolationError)
  monkeypatch.undo()
  assert judge(GOOD, TESTS, FAST).complete  # the failure is not remembered


def test_a_verdict_is_remembered(monkeypatch):
  code, pairs = "print(input())  # remembered", {"pairs": [["1", "1"]]}
  first = judge(code, pairs, FAST)
  monkeypatch.setattr(tester, "borrowed_server", None)  # calling it would fail
  assert judge(code, pairs, FAST) is first
  with pytest.raises(TypeError):
    judge(code, {"pairs": [["1", "2"]]}, FAST)
  with pytest.raises(TypeError):
    judge(code, pairs, Limits(seconds=3.0))


def test_the_memory_of_verdicts_is_bounded(monkeypatch):
  monkeypatch.setattr(tester, "CACHED", 2)
  for number in range(4):
    judge(f"print({number})", {"pairs": [["", str(number)]]}, FAST)
  assert len(tester._verdicts) == 2


@pytest.mark.parametrize(
  ("code", "passed"),
  [
    ("print(int(input()) * 2)", 2),
    ("import sys\nprint(int(input()) * 2)\nsys.exit(0)", 2),
    ("print(4)", 1),
    ("print(int(input()) * 2)\nraise ValueError", 0),
    ("print(int(input()) * 2, flush=True)\nwhile True: pass", 0),
    ("import os\nos._exit(0)", 0),
    ("print('x' * 10**6)", 0),
    ("print(int(input()) * 2, 'more')", 0),
  ],
)
def test_outputs_are_compared_here(code, passed):
  verdict = judge(code, {"pairs": [["2\n", "4\n"], ["3", "6"]]}, FAST)
  assert (verdict.passed, verdict.total, verdict.complete) == (passed, 2, passed == 2)


@pytest.mark.parametrize(
  ("output", "expected", "same"),
  [
    ("1\n", "1", True), ("1  \n2\n\n", "1\n2", True), ("1\r\n2", "1\n2", True), ("", "\n", True),
    ("1 2", "1\n2", False), (" 1", "1", False), ("1.0", "1", False), ("1\n\n2", "1\n2", False),
  ],
)  # fmt: skip
def test_white_space_at_the_ends_does_not_count(output, expected, same):
  assert same_output(output, expected) == same


def test_many_programs_keep_their_order():
  programs = [(f"print({n % 3})", {"pairs": [["", "1"]]}) for n in range(9)]
  shares = [verdict.share for verdict in judge_all(programs, FAST)]
  assert shares == [0.0, 1.0, 0.0] * 3


def test_a_share_of_one_means_complete():
  assert Verdict(3, 3, False).share == 2 / 3
  assert Verdict(1, 1, False).share == 0.0
