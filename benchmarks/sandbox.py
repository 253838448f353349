"""Measures how many small programs the sandbox runs in a second.

    python -m benchmarks.sandbox --seconds 10

`programs` runs `print(sum(range(100)))`; `functions` judges a function by three tests, which takes
two processes, a candidate and a tester; `outputs` judges a program by one input and output. Every
program differs from the others, so no verdict is remembered. `parallel` programs run at a time.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from grpo_jax.environments import sandbox
from grpo_jax.environments.tester import judge

TESTS = {
  "setup": "",
  "tests": "def check(f):\n  assert f(1) == 1\n  assert f(2) == 4\n  assert f(3) == 9",
  "entry_point": "f",
}


def program(number: int) -> bool:
  """Runs a program; the number makes it another one. Returns whether the result is right."""
  return sandbox.run_python(f"print(sum(range(100)))  # {number}").stdout == "4950\n"


def function(number: int) -> bool:
  """Judges a function by `TESTS`."""
  return judge(f"def f(x): return x * x  # {number}", TESTS).complete


def output(number: int) -> bool:
  """Judges a program by what it writes."""
  code = f"print(2 * int(input()))  # {number}"
  return judge(code, {"pairs": [["21", "42"]]}).complete


KINDS = {"programs": program, "functions": function, "outputs": output}


def rate(call: Callable[[int], bool], parallel: int, seconds: float) -> float:
  """Returns how many calls a second come back, with `parallel` of them at a time."""
  numbers, end = itertools.count(), time.monotonic() + seconds

  def work() -> int:
    done = 0
    while time.monotonic() < end:
      if not call(next(numbers)):
        raise RuntimeError("a program did not give its result")
      done += 1
    return done

  call(-1)  # the servers start
  began = time.monotonic()
  with ThreadPoolExecutor(parallel) as pool:
    workers = [pool.submit(work) for _ in range(parallel)]
    done = sum(worker.result() for worker in workers)
  return done / (time.monotonic() - began)


def main() -> None:
  """Prints a table, then one line of JSON for each row."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
  parser.add_argument("--parallel", type=int, nargs="+", default=[1, 2], help="programs at a time")
  arguments = parser.parse_args()
  print(f"{sandbox.explain()}.\n\n| what | parallel | per second |\n|---|---|---|")
  rows = []
  for kind, call in KINDS.items():
    for parallel in arguments.parallel:
      row = {
        "what": kind, "parallel": parallel,
        "per_second": round(rate(call, parallel, arguments.seconds), 1),
      }  # fmt: skip
      rows.append(row)
      print(f"| {kind} | {parallel} | {row['per_second']:.0f} |", flush=True)
  print()
  for row in rows:
    print(json.dumps(row))


if __name__ == "__main__":
  main()
