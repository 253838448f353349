"""Times the preparation and reading of GSM8K, and grades its published answers.

Each published solution, in each style of writing the answer, must be graded right. The same
solution with its answer raised by 1 must be graded wrong, though its text still holds the right
number.

Command   python benchmarks/gsm8k_rows.py --jsonl FOLDER   (with train.jsonl and test.jsonl)
"""

import argparse
import collections
import tempfile
import time

from grpo_jax import data
from grpo_jax.tasks import gsm8k, make_task
from grpo_jax.tasks.rewards.graders import GRADERS

GRADED_BY = ("numeric", "exact", "math")


def main() -> None:
  """Prints the times and the verdicts."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--jsonl", help="folder with train.jsonl and test.jsonl; default: download")
  parser.add_argument("--graders", nargs="+", default=GRADED_BY)
  jsonl, graders = vars(parser.parse_args()).values()
  with tempfile.TemporaryDirectory() as folder:
    for action in ("prepared in", "opened again in"):
      start = time.perf_counter()
      task = make_task("gsm8k", jsonl=jsonl, data_dir=folder)
      print(f"{action} {time.perf_counter() - start:.2f} s")
    splits = task.splits
    for step in range(50):  # the first step loads grain
      start = start if step > 1 else time.perf_counter()
      data.examples(splits["train"], step, 64, seed=0)
    print(f"64 shuffled examples for a step: {(time.perf_counter() - start) / 49 * 1e3:.2f} ms")
    examples = []
    for name, split in splits.items():
      start = time.perf_counter()
      examples += list(split)
      each = (time.perf_counter() - start) / len(split)
      print(f"{name}: {len(split)} examples, {each * 1e6:.0f} us each")
    for name in graders:
      grade(name, [example.columns for example in examples])


def grade(name: str, rows: list[dict[str, str]]) -> None:
  """Prints the verdicts on right and wrong answers, for each style of writing them.

  Args:
    name: a grader of `GRADERS`.
    rows: columns of the examples.
  """
  gold = [row["answer"] for row in rows]
  wrong = [str(int(answer) + 1) for answer in gold]
  for style, (_, shown) in gsm8k.ANSWERS.items():
    for kind, answers in (("gold", gold), ("gold + 1", wrong)):
      texts = [shown.format(solution=r["solution"], answer=a) for r, a in zip(rows, answers)]
      start = time.perf_counter()
      verdicts = GRADERS[name](prompts=[""] * len(rows), completions=texts, answer=gold)
      each = (time.perf_counter() - start) / len(rows)
      counts = dict(collections.Counter(verdicts))
      print(
        f"{name:8} {style:6} {kind:9} verdicts {counts} of {len(rows)}, {each * 1e6:.0f} us each"
      )


if __name__ == "__main__":
  main()
