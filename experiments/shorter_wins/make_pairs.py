"""Writes preference pairs that a rule decides, and the questions that the policy is trained on.

Both are sums of two two-digit numbers, and no sum is in both. Of the two answers of a pair, the one
with the higher reward of `reward.py` is chosen: a correct one over a wrong one, and the shorter of
two correct ones.

Command   python experiments/shorter_wins/make_pairs.py
"""

import json
import random
from pathlib import Path

from reward import value  # reward.py in the folder of this program

PAIRS, QUESTIONS = 1000, 400
# The solved examples show that answers differ in length.
EXAMPLES = "Q: 21 + 34\nA: 55\nQ: 40 + 17\nA: 40 plus 17 is 57.\n"
STYLES = (" {c}", " {a} + {b} = {c}", " {a} plus {b} is {c}.", " The sum of {a} and {b} is {c}.")
HERE = Path(__file__).parent


def prompt_of(a, b):
  """Returns the question for a sum, after two solved ones."""
  return f"{EXAMPLES}Q: {a} + {b}\nA:"


def answer_of(rng, a, b):
  """Returns an answer in one of the styles; half of them are wrong, by a slip or by a carry."""
  c = a + b
  if rng.random() < 0.5:
    c += rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))
  return rng.choice(STYLES).format(a=a, b=b, c=c)


def make_pair(rng, a, b):
  """Returns a pair whose answers have different rewards."""
  while True:
    answers = [answer_of(rng, a, b) for _ in range(2)]
    low, high = sorted(answers, key=lambda text: value(text, a + b))
    if value(low, a + b) < value(high, a + b):
      return {"prompt": prompt_of(a, b), "chosen": high, "rejected": low}


def make_rows():
  """Returns the pairs and the questions."""
  rng = random.Random(0)
  numbers = range(10, 100)
  sums = rng.sample([(a, b) for a in numbers for b in numbers if a <= b], PAIRS + QUESTIONS)
  sums = [pair if rng.random() < 0.5 else pair[::-1] for pair in sums]
  pairs = [make_pair(rng, a, b) for a, b in sums[:PAIRS]]
  questions = [{"prompt": prompt_of(a, b), "answer": a + b} for a, b in sums[PAIRS:]]
  return pairs, questions


def main():
  for name, rows in zip(("pairs.jsonl", "questions.jsonl"), make_rows()):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
