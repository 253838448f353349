"""Measures episodes whose environments are slow at times, in step and each for itself.

    python -m benchmarks.turns --stall 1 --share 0.1

An environment takes `--stall` seconds for a share of its turns, and next to none for the others;
which ones is a function of the episode's prompt and turn. Each episode has a worker process. Forms
take turns in one process and play the same games: `same` is the share of equal episodes. `alone` is
the time that the slowest episode's environment takes by itself, and `model s` the time of the first
form with environments that take none.
"""

import argparse
import dataclasses
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import alternate, ours
from benchmarks.settings import make_prompts
from benchmarks.slow_environment import slow_task, stalls
from benchmarks.worker import clock, since
from grpo_jax.environments.workers import EnvironmentWorkers
from grpo_jax.episodes import EpisodeSampler
from grpo_jax.sampling.turns import Budget
from grpo_jax.tasks.base import Example

COLUMNS = (
  ("form", "form", ""),
  ("seconds", "wall s", ".2f"),
  ("ratio", "ratio", ".2f"),
  ("range", "range", ""),
  ("cpu_seconds", "CPU s", ".2f"),
  ("model_seconds", "model s", ".2f"),
  ("alone", "alone s", ".2f"),
  ("same", "same", ".2f"),
)
FORMS = {"in step": True, "each for itself": False}


def stops(length: int, vocab: int) -> np.ndarray:
  """Returns a stop table in which one token of eight ends a turn, and so does number `length`."""
  table = np.broadcast_to(np.arange(1, length + 2)[:, None], (length + 1, vocab)).astype(np.int32)
  table[:, ::8] = table[-1] = length
  return table


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns one row per form."""
  prompts = make_prompts("two-shot", a.prompts)
  examples = [Example(p, {"seed": a.seed + i}, str(i)) for i, p in enumerate(prompts)]
  length = a.turns * (a.turn_length + 8)
  single, params, _ = ours.make_sampler(a.model, prompts, length, "float32")
  budget = Budget(a.turns, a.turn_length, 8)
  table = stops(a.turn_length, single.model.config.vocab_size)
  single = dataclasses.replace(single, stop_table=table)
  records: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
  played, model = {}, []

  forms = {
    form: EpisodeSampler(single, budget, lambda: None, in_step) for form, in_step in FORMS.items()
  }

  def play(form: str, workers: EnvironmentWorkers, number: int) -> tuple[dict[str, float], Any]:
    forms[form].make_runner = lambda: workers
    start = clock()
    out = forms[form](params, examples, jax.random.key(number), group=a.group)
    record = since(start)
    forms[form].close()
    return record, out

  settings = {"workers": a.prompts * a.group, "timeout": 60}
  with ExitStack() as stack:
    slow, fast = (
      stack.enter_context(
        EnvironmentWorkers(partial(slow_task, stall, a.share, a.turns), **settings)
      )
      for stall in (a.stall, 0.0)
    )
    for form in FORMS:
      play(form, fast, 0)  # compiles
    for number in range(1, 1 + a.rounds):
      for workers in (fast, slow):  # they start
        workers.reset(examples, a.group, [0] * a.prompts)
      model.append(play("in step", fast, number)[0]["seconds"])
      for form in FORMS:
        slow.reset(examples, a.group, [0] * a.prompts)
        record, played[form] = play(form, slow, number)
        records[form].append(record)
  alone = max(stalls(a.seed + i, a.turns, a.share).sum() for i in range(a.prompts)) * a.stall
  first = played["in step"]
  rows = []
  for form, rounds in records.items():
    seconds = np.array([record["seconds"] for record in rounds])
    ratio = seconds / [record["seconds"] for record in records["in step"]]
    same = (played[form].tokens == first.tokens).all(-1).mean()
    rows.append(
      {
        "benchmark": "turns",
        **vars(a),
        "form": form,
        "seconds": float(np.median(seconds)),
        "ratio": float(np.median(ratio)),
        "range": f"{ratio.min():.2f} to {ratio.max():.2f}",
        "cpu_seconds": float(np.median([record["cpu_seconds"] for record in rounds])),
        "model_seconds": float(np.median(model)),
        "alone": float(alone),
        "same": float(same),
      }
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Measures both forms and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--model", default=alternate.MODEL)
  parser.add_argument("--prompts", type=int, default=8, help="number of prompts, P")
  parser.add_argument("--group", type=int, default=2, help="group size, G")
  parser.add_argument("--turns", type=int, default=5, help="turns of an episode")
  parser.add_argument("--turn-length", type=int, default=8, help="tokens of a turn at most")
  parser.add_argument("--stall", type=float, default=2.0, help="seconds of a slow turn")
  parser.add_argument("--share", type=float, default=0.15, help="share of slow turns")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  alternate.show(measure(parser.parse_args(argv)), COLUMNS)


if __name__ == "__main__":
  main()
