"""Finds the data sets of reasoning-gym on which a model can learn: those that it sometimes solves.

    python -m benchmarks.pass_rates --out pass_rates.jsonl > table.md

A group of completions has a gradient only if some of them are right and others are not. The table
has one row for each data set with its default settings, after two solved problems:

- greedy: accuracy without randomness.
- pass@1, pass@8: chance that one completion, and that one of eight, is right.
- mixed: share of the groups of eight with a right and a wrong completion.
- constant: share of the most frequent answer among the problems, which is what a model reaches that
  has learned to ignore the question.

Standard errors are over problems. Each finished data set is one line of `--out`, and is not
measured again, so an interrupted command continues. A data set whose prompts are longer than
`--prompt-length` tokens, or whose answers have more than one line, is listed with the reason.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import alternate
from grpo_jax.evaluate import Answers, answer, pass_at_k, standard_error
from grpo_jax.models import load_model
from grpo_jax.sampling import Sampler
from grpo_jax.tasks.base import Task
from grpo_jax.tasks.reasoning_gym import reasoning_gym_task
from grpo_jax.tasks.rewards.workers import RewardWorkers
from grpo_jax.tokens import encode_prompt, load_tokenizer

GROUP = 8
COLUMNS = (
  ("dataset", "data set", ""),
  ("prompt", "longest prompt", "d"),
  ("greedy", "greedy", ".2f"),
  ("pass@1", "pass@1", ".2f"),
  ("pass@8", "pass@8", ".2f"),
  ("pass@8_se", "±", ".2f"),
  ("mixed", "mixed", ".2f"),
  ("constant", "constant", ".2f"),
)


def measure(sampler: Sampler, params: Any, name: str, problems: int, seed: int) -> dict[str, Any]:
  """Returns the row of a data set; only the name and the reason, `skipped`, if it is left out."""
  make = partial(reasoning_gym_task, name, train_size=problems, eval_size=0, seed=seed)
  try:
    task = make()
  except ValueError as error:
    return {"dataset": name, "skipped": str(error).partition(":")[0]}
  examples = task.splits["train"]
  longest = max(len(encode_prompt(sampler.tokenizer, example.prompt)) for example in examples)
  if longest > sampler.prompt_length:
    return {"dataset": name, "skipped": f"prompts of up to {longest} tokens"}

  def answers(scorer: Any, group: int, **how: Any) -> Answers:
    key = jax.random.key(seed)
    parts = answer(sampler, params, task, examples, scorer, group, how, 32 // group, key)
    return Answers.concatenate([*parts])

  with RewardWorkers(make) as scorer:
    greedy = answers(scorer, 1, temperature=0.0)
    sampled = answers(scorer, GROUP)
  return {"dataset": name, "prompt": longest} | row_of(task, greedy, sampled)


def row_of(task: Task, greedy: Answers, sampled: Answers) -> dict[str, float]:
  """Returns the numbers of a row.

  Args:
    task: its split "train" has the problems.
    greedy, sampled: one completion and eight of each of them, judged.
  """
  right = sampled.right.sum(axis=1)
  passed = {k: np.array([pass_at_k(GROUP, int(count), k) for count in right]) for k in (1, GROUP)}
  golds = Counter(example.columns["answer"] for example in task.splits["train"])
  return {
    "problems": len(right),
    "greedy": float(greedy.right.mean()),
    "mixed": float(((right > 0) & (right < GROUP)).mean()),
    "constant": max(golds.values()) / len(right),
    "missing": greedy.missing + sampled.missing,
    **{f"pass@{k}": float(values.mean()) for k, values in passed.items()},
    **{f"pass@{k}_se": standard_error(values) for k, values in passed.items()},
  }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows as a table, by pass@8, and the data sets that were left out below it."""
  measured = [row for row in rows if "skipped" not in row]
  measured.sort(key=lambda row: (-row["pass@8"], row["dataset"]))
  lines = ["| " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
  for row in measured:
    cells = (format(row[name], style) for name, _, style in COLUMNS)
    lines.append("| " + " | ".join(cells) + " |")
  skipped = [f"- {row['dataset']}: {row['skipped']}" for row in rows if "skipped" in row]
  return "\n".join([*lines, *(["", "Left out:", "", *skipped] if skipped else [])])


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--model", default=alternate.MODEL, help="source of the model")
  parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per data set")
  parser.add_argument("--problems", type=int, default=48, help="problems per data set")
  parser.add_argument("--prompt-length", type=int, default=512, help="longest prompt in tokens")
  parser.add_argument("--tokens", type=int, default=24, help="longest completion in tokens")
  parser.add_argument("--datasets", nargs="*", help="names; all of them by default")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(arguments)
  from reasoning_gym.factory import DATASETS

  names = options.datasets or sorted(set(DATASETS) - {"composite"})
  lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
  rows = {row["dataset"]: row for row in map(json.loads, lines)}
  model, params = load_model(options.model)
  tokenizer = load_tokenizer(options.model)
  sampler = Sampler(
    model,
    tokenizer,
    prompt_length=options.prompt_length,
    completion_length=options.tokens,
    stop=("\n",),
  )
  with options.out.open("a", encoding="utf-8") as out:
    for name in names:
      if name not in rows:
        rows[name] = measure(sampler, params, name, options.problems, options.seed)
        print(json.dumps(rows[name]), file=out, flush=True)
  print(table([rows[name] for name in names]))


if __name__ == "__main__":
  main()
