"""Writes `problems.jsonl`: 1,000 short word problems, half products and half differences.

Command   python experiments/calculator/make_problems.py
"""

import json
import random
from pathlib import Path

COUNT = 1000
EXAMPLES = """\
31 bags of 12 nuts. How many nuts?
Call: calc(31 * 12)
Result: 372
Answer: 372

Of 680 cards, 126 are lost. How many are left?
Call: calc(680 - 126)
Result: 554
Answer: 554

"""
THINGS = ("pens", "cards", "stamps", "books", "coins", "apples", "cups", "nuts")
PRODUCTS = (
  "{a} boxes of {b} {things}. How many {things}?",
  "{a} rows with {b} {things} each. How many {things}?",
  "{b} {things} a day for {a} days. How many {things}?",
  "{a} children get {b} {things} each. How many {things}?",
)
DIFFERENCES = (  # the larger number stands first in one of them
  "Of {a} {things}, {b} are red. How many are not?",
  "{b} of {a} {things} are sold. How many remain?",
  "{b} {things} are there, {a} are needed. How many are missing?",
  "After {b} of {a} {things} are lost, how many are left?",
)


def main():
  rng = random.Random(0)
  lines, used = [], set()
  while len(lines) < COUNT:
    product = len(lines) % 2 == 0
    if product:
      a, b = rng.randint(12, 99), rng.randint(12, 99)
      key = "{} * {}".format(*sorted((a, b)))
    else:
      b, a = sorted(rng.sample(range(100, 1000), 2))
      key = f"{a} - {b}"
    if key in used:
      continue
    used.add(key)
    form = rng.choice(PRODUCTS if product else DIFFERENCES)
    question = form.format(things=rng.choice(THINGS), a=a, b=b)
    row = {
      "prompt": f"{EXAMPLES}{question}\nCall:",
      "answer": a * b if product else a - b,
      "key": key,
    }
    lines.append(json.dumps(row) + "\n")
  (Path(__file__).parent / "problems.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
  main()
