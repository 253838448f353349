"""Compares GRPO with PPO: the same task, model, prompts, completions and updates, with a critic.

    python -m benchmarks.critic --seeds 0 1 2

Trains both experiments for each seed, in alternation, with an evaluation every few steps. A run
that has ended is not repeated, so the command can be stopped and started again. The table holds for
each run: held-out accuracy and its standard error at the end; seconds of a step (median); peak
resident memory of the process; parameters and bytes of optimizer state; and the tokens (prompts
once, and completions) that were sampled before the first evaluation with an accuracy of at least
0.8.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
EXPERIMENTS = {
  "GRPO": "experiments/smollm2_addition.py",
  "PPO": "experiments/smollm2_addition_ppo.py",
}
ENOUGH = 0.8
MEASURED = "measured.json"  # in the work directory of a run that has ended


def train(experiment: str, workdir: Path, options: list[str]) -> float:
  """Runs an experiment in a process of its own; returns its peak resident memory in bytes.

  Raises:
    RuntimeError: the run failed.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "grpo_jax.train", "--config", experiment]
  with (workdir / "output.txt").open("w", encoding="utf-8") as output:
    process = subprocess.Popen(
      [*command, "--workdir", str(workdir), *options], stdout=output, stderr=subprocess.STDOUT
    )
    _, status, usage = os.wait4(process.pid, 0)
  if code := os.waitstatus_to_exitcode(status):
    raise RuntimeError(f"{experiment} ended with code {code}, see {workdir / 'output.txt'}")
  return usage.ru_maxrss * 1024.0


def state_sizes(experiment: str, options: list[str]) -> dict[str, float]:
  """Returns the number of parameters that are trained, and the bytes of the optimizer state."""
  import jax

  from grpo_jax.build import build
  from grpo_jax.config import load

  run = build(load(experiment, options))
  trained = [(run.weights.shapes, run.optimizer)]
  if run.critic is not None:
    trained.append((run.critic_weights.shapes, run.critic.optimizer))
  leaves = [leaf for shapes, _ in trained for leaf in jax.tree.leaves(shapes)]
  states = jax.tree.leaves([jax.eval_shape(o.init, shapes) for shapes, o in trained])
  return {
    "parameters": float(sum(math.prod(leaf.shape) for leaf in leaves)),
    "optimizer_bytes": float(sum(math.prod(s.shape) * s.dtype.itemsize for s in states)),
  }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns what the metrics of a run say: accuracy, seconds of a step, tokens to `ENOUGH`.

  Example:
    >>> rows = [{"step": 0, "eval/accuracy": 0.3}, {"step": 0, "step_time": 9.0, "num_tokens": 10},
    ...         {"step": 1, "step_time": 2.0, "num_tokens": 21},
    ...         {"step": 2, "eval/accuracy": 0.9, "eval/accuracy_se": 0.02}]
    >>> summarize(rows)["tokens_to_enough"], summarize(rows)["step_seconds"]
    (21, 5.5)
  """
  steps = {row["step"]: row for row in rows if "step_time" in row}
  evaluations = [row for row in rows if "eval/accuracy" in row]
  reached = [row["step"] for row in evaluations if row["eval/accuracy"] >= ENOUGH]
  return {
    "before": evaluations[0]["eval/accuracy"],
    "accuracy": evaluations[-1]["eval/accuracy"],
    "standard_error": evaluations[-1].get("eval/accuracy_se"),
    "step_seconds": statistics.median(row["step_time"] for row in steps.values()),
    "tokens_to_enough": steps[reached[0] - 1]["num_tokens"] if reached else None,
  }


def measure(name: str, seed: int, folder: Path, options: list[str]) -> dict[str, Any]:
  """Runs one experiment with one seed, unless that was done, and returns its record."""
  from grpo_jax.run.metrics import read_metrics

  workdir = folder / f"{name.lower()}-{seed}"
  if (workdir / MEASURED).exists():
    return json.loads((workdir / MEASURED).read_text(encoding="utf-8"))
  peak = train(EXPERIMENTS[name], workdir, [*options, f"--config.seed={seed}"])
  record = {"algorithm": name, "seed": seed, "peak_bytes": peak}
  record |= summarize(read_metrics(workdir)) | state_sizes(EXPERIMENTS[name], options)
  (workdir / MEASURED).write_text(json.dumps(record) + "\n", encoding="utf-8")
  return record


def table(records: list[dict[str, Any]]) -> str:
  """Returns the records as a Markdown table."""
  header = ("algorithm", "seed", "before", "after", "s a step", "peak GiB", "parameters",
            "optimizer GiB", f"tokens to {ENOUGH:g}")  # fmt: skip
  lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
  for r in records:
    tokens = r["tokens_to_enough"]
    cells = (
      r["algorithm"], r["seed"], f"{r['before']:.3f}",
      f"{r['accuracy']:.3f} ± {r['standard_error']:.3f}", f"{r['step_seconds']:.1f}",
      f"{r['peak_bytes'] / GIB:.1f}", f"{r['parameters'] / 1e6:.0f} M",
      f"{r['optimizer_bytes'] / GIB:.2f}", "not reached" if tokens is None else f"{tokens:,.0f}",
    )  # fmt: skip
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
  """Trains, and prints the table and one JSON line per run."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.critic", description=__doc__)
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--folder", type=Path, default=Path("runs/critic"), help="work directories")
  parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
  arguments, options = parser.parse_known_args(argv)
  options = [f"--config.eval.every={arguments.every}", *options]
  records = [
    measure(name, seed, arguments.folder, options)
    for seed in arguments.seeds
    for name in EXPERIMENTS
  ]
  print(table(records))
  for record in records:
    print(json.dumps(record))


if __name__ == "__main__":
  main()
