"""Measures the time of a step with rollouts ahead of the updates, and draws when each part works.

    python -m benchmarks.ahead --seconds 2 --steps 8 --rounds 3

Rewards take `--seconds` a step. Each form is a run in a process of its own with `--devices` CPU
devices; in the last ones half of them only sample. `sum` and `max` are of the parts as the form
without `rollout.ahead` measures them in the same round: sampling, rewards, and the rest of the
step. A form in which nothing waits has a step of `max`; on one set of devices, sampling and the
update are one part. Numbers are medians over the steps of a run, then over rounds, in which the
forms take turns; `range` holds the smallest and the largest `step / max` of a round.
`--timeline` draws the first steps of each form in the last round, from the times at which parts
began and ended.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import alternate

FORMS = {
  "one after the other": (0, False),
  "1 ahead": (1, False),
  "2 ahead": (2, False),
  "1 ahead, own devices": (1, True),
  "2 ahead, own devices": (2, True),
}
COLUMNS = (
  ("form", "form", ""),
  ("step_seconds", "step s", ".2f"),
  ("sampling", "sampling s", ".2f"),
  ("rewards", "rewards s", ".2f"),
  ("update", "update s", ".2f"),
  ("sum", "sum", ".2f"),
  ("max", "max", ".2f"),
  ("of_sum", "step / sum", ".2f"),
  ("of_max", "step / max", ".2f"),
  ("range", "range", ""),
  ("staleness", "staleness", ".1f"),
)
REWARD = """
import time
def late(prompts, completions, **columns):
  time.sleep({seconds})
  return [float(len(set(text))) for text in completions]
"""
RUN = """
import json, sys
from benchmarks import ahead
ahead.work(**json.loads(sys.argv[1]))
"""


def work(workdir: str, overrides: Sequence[str], events: str) -> None:
  """Runs one form, and writes when its parts began and ended."""
  from grpo_jax import ahead, rollout, train
  from grpo_jax.config import load

  spans = []

  def timed(part: str, function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
      begun = time.monotonic()
      result = function(*arguments, **options)
      spans.append((part, begun, time.monotonic()))
      return result

    return call

  def begin(*arguments: Any, started: Any = ahead.begin, **options: Any) -> Any:
    begun, finish = time.monotonic(), started(*arguments, **options)

    def wait() -> Any:
      out = finish()
      spans.append(("sampling", begun, time.monotonic()))
      return out

    return wait

  train._learn, ahead.begin = timed("update", train._learn), begin
  rollout.generate = timed("sampling", rollout.generate)
  ahead.score = rollout.score = timed("rewards", rollout.score)
  train.run(load("experiments/tiny.py", list(overrides)), workdir)
  Path(events).write_text(json.dumps(spans), encoding="utf-8")


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns one row per form."""
  rounds: list[list[dict[str, Any]]] = []
  with tempfile.TemporaryDirectory() as folder:
    reward = Path(folder) / "reward.py"
    reward.write_text(REWARD.format(seconds=a.seconds), encoding="utf-8")
    data = Path(folder) / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}:"}) + "\n" for i in range(64)), "utf-8")
    for number, form in itertools.product(range(a.rounds), a.forms):
      ahead, apart = FORMS[form]
      if form == a.forms[0]:
        rounds.append([])
      workdir, events = Path(folder) / str(number) / form, Path(folder) / f"{form}.json"
      overrides = [
        "task.name=jsonl", f"task.settings.path={data}", f"task.settings.reward={reward}:late",
        "task.settings.eval_fraction=0.0", f"steps={a.steps}", "log.samples=0", "log.trackers=()",
        "checkpoint.every=10000", f"compilation_cache={folder}/programs", "rewards.workers=1",
        "algorithm.correction=token_truncate", "algorithm.correction_max=2.0",
        f"rollout.prompts_per_step={a.prompts}", f"rollout.completion_length={a.tokens}",
        f"rollout.ahead={ahead}", f"mesh.rollout_devices={a.devices // 2 if apart else 0}",
      ]  # fmt: skip
      settings = {
        "workdir": str(workdir), "overrides": [f"--config.{o}" for o in overrides],
        "events": str(events),
      }  # fmt: skip
      flags = f"--xla_force_host_platform_device_count={a.devices}"
      subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(settings)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
        stdout=subprocess.DEVNULL, check=True,
      )  # fmt: skip
      rounds[-1].append(_row(workdir, rounds[-1]))
      if a.timeline and number == a.rounds - 1:
        print(f"{form}\n{timeline(json.loads(events.read_text(encoding='utf-8')))}\n")
  return [
    {"benchmark": "ahead", "form": form, **vars(a), **_over_rounds(rows)}
    for form, rows in zip(a.forms, zip(*rounds))
  ]


def _over_rounds(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
  """Returns the medians of a form over the rounds."""
  of_max = [row["of_max"] for row in rows]
  medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
  return medians | {"range": f"{min(of_max):.2f} to {max(of_max):.2f}"}


def _row(workdir: Path, rows: Sequence[dict[str, float]]) -> dict[str, float]:
  """Returns the medians of a run over its steps, without the first ones, which compile.

  Args:
    workdir: of the run.
    rows: of the forms before it in the round.
  """
  from grpo_jax.run.metrics import read_metrics

  metrics = [row for row in read_metrics(workdir) if "loss" in row][3:]

  def median(name: str) -> float:
    return float(np.median([row.get(name, 0.0) for row in metrics]))

  row = {
    "step_seconds": median("step_time"),
    "sampling": median("time/sampling"),
    "rewards": median("time/rewards"),
    "staleness": median("sampling/staleness"),
  }
  alone = rows[0] if rows else row
  update = alone["step_seconds"] - alone["sampling"] - alone["rewards"]
  parts = (alone["sampling"], alone["rewards"], update)
  apart = workdir.name.endswith("own devices")
  longest = max(parts) if apart else max(parts[0] + parts[2], parts[1])
  row |= {"update": update, "sum": sum(parts), "max": longest}
  return row | {"of_sum": row["step_seconds"] / row["sum"], "of_max": row["step_seconds"] / longest}


def timeline(
  spans: Sequence[Sequence[Any]], first: int = 3, count: int = 4, width: int = 90
) -> str:
  """Draws when sampling, rewards and update of some steps took place; each letter is a step.

  Args:
    spans: (part, begin, end) in seconds, in the order of the steps of each part.
    first, count: the first update to draw, and the number of updates.
    width: characters of a line.
  """
  parts: dict[str, list[tuple[float, float]]] = {"sampling": [], "rewards": [], "update": []}
  for part, begin, end in spans:
    parts[part].append((begin, end))
  updates = parts["update"][first : first + count]
  start, end = updates[0][0], updates[-1][1]
  lines = []
  for part, times in parts.items():
    line = ["."] * width
    for number, (a, b) in enumerate(times):
      left, right = ((t - start) / (end - start) * width for t in (a, b))
      for i in range(max(int(left), 0), min(max(int(right), int(left) + 1), width)):
        line[i] = chr(ord("a") + number % 26)
    lines.append(f"{part:10}{''.join(line)}")
  return "\n".join([*lines, f"{'':10}{end - start:.1f} s"])


def main(argv: Sequence[str] | None = None) -> None:
  """Measures all forms and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--seconds", type=float, default=2.0, help="time of the rewards of a step")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument(
    "--forms", nargs="+", choices=FORMS, default=[*FORMS], metavar="FORM",
    help=f"the first one measures the parts; of: {', '.join(FORMS)}",
  )  # fmt: skip
  parser.add_argument("--rounds", type=int, default=1, help="runs of each form, in turn")
  parser.add_argument("--devices", type=int, default=2, help="CPU devices of each process")
  parser.add_argument("--prompts", type=int, default=16, help="number of prompts, P")
  parser.add_argument("--tokens", type=int, default=64, help="completion length, T")
  parser.add_argument("--timeline", action="store_true")
  alternate.show(measure(parser.parse_args(argv)), COLUMNS)


if __name__ == "__main__":
  main()
