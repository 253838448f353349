"""Writes `problems.jsonl`: 388 functions to be found from three of their values.

The functions are x + c and x * c, with c from 2 to 199. The column `constant` is the key of a row,
so the constants of held-out problems are never trained on.

Command   python experiments/functions/make_problems.py
"""

import json
import random
from pathlib import Path

SHOWN = (("+", 5), ("*", 4), ("*", 23), ("+", 17))  # solved examples in every prompt
VALUES, HIDDEN = (0, 1, 2), (5, 11)  # arguments of the values in the prompt; of further tests


def main():
  examples = "".join(f"{opening(sign, c)} x {sign} {c}\n\n" for sign, c in SHOWN)
  rows = [
    {
      "prompt": examples + opening(sign, c),
      "test": "\n  ".join(
        ["def check(f):"] + [f"assert f({x}) == {value(sign, c, x)}" for x in VALUES + HIDDEN]
      ),
      "entry_point": "f",
      "constant": c,
    }
    for sign in "+*"
    for c in range(2, 200)
    if c not in {c for _, c in SHOWN}
  ]
  random.Random(0).shuffle(rows)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (Path(__file__).parent / "problems.jsonl").write_text(lines, encoding="utf-8")


def opening(sign, c):
  """Returns the values of a function, and its definition up to the expression."""
  values = ", ".join(str(value(sign, c, x)) for x in VALUES)
  return f"# {values}\ndef f(x): return"


def value(sign, c, x):
  return x + c if sign == "+" else x * c


if __name__ == "__main__":
  main()
