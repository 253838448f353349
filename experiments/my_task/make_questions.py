"""Writes `questions.jsonl`: 800 problems that ask for the largest of three two-digit numbers.

Command   python experiments/my_task/make_questions.py
"""

import json
import random
from pathlib import Path

COUNT = 800
EXAMPLES = "largest of 41, 87, 23: 87\nlargest of 65, 12, 38: 65\n"


def main():
  rng = random.Random(0)
  lines, used = [], set()
  while len(lines) < COUNT:
    numbers = rng.sample(range(10, 100), 3)
    if frozenset(numbers) in used:  # no problem twice, in no order
      continue
    used.add(frozenset(numbers))
    prompt = f"{EXAMPLES}largest of {', '.join(map(str, numbers))}:"
    lines.append(json.dumps({"prompt": prompt, "numbers": numbers}) + "\n")
  (Path(__file__).parent / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
  main()
