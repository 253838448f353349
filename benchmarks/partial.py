"""Measures sampling with long-tailed lengths, where completions go on in later steps and not.

    python -m benchmarks.partial --tokens 128 --median 24 --budgets 16 32

Lengths are lognormal, as in `tails`. All variants run in one process, step by step in turns, with
`rollout.partial_prompts` equal to `--prompts`. The first `--warmup` steps are not counted: they
compile, and take the completions that end early. `decode steps` is how often a step decodes one
token of all rows: the longest completion, or at most the rounds times their tokens. `rounds` is
their mean, `carried` the share of tokens that were drawn in earlier steps. A gain is a ratio of the
CPU times of all steps; other completions are taken, so tokens per CPU second say more.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import alternate, ours
from benchmarks.settings import make_prompts
from benchmarks.tails import lognormal_stops
from benchmarks.worker import clock, since
from grpo_jax.partial import CompletionsUnderWay
from grpo_jax.sampling.sampler import Generated
from grpo_jax.tasks.base import Example

COLUMNS = (
  ("partial_tokens", "partial tokens", ""),
  ("cpu_seconds", "CPU s", ".2f"),
  ("gain", "gain", ".2f"),
  ("slowest", "slowest step", ".2f"),
  ("tokens_per_cpu_second", "tokens / CPU s", ".1f"),
  ("mean_length", "mean length", ".1f"),
  ("decode_steps", "decode steps", ".0f"),
  ("rounds", "rounds", ".1f"),
  ("carried", "carried", ".2f"),
)


class Variant:
  """Samples the steps of one variant.

  Args:
    a: the arguments of the command.
    budget: tokens of a round; 0 samples whole completions.
  """

  def __init__(self, a: argparse.Namespace, budget: int) -> None:
    self._prompts = make_prompts("chat", a.prompts)
    sampler, self._params, _ = ours.make_sampler(a.model, self._prompts, a.tokens, "float32")
    vocab = sampler.model.config.vocab_size
    table = lognormal_stops(a.median, a.sigma, a.tokens, vocab)
    self._sampler, self._group = dataclasses.replace(sampler, stop_table=table), a.group
    self._under_way = None
    if budget:
      self._under_way = CompletionsUnderWay(
        self._sampler, a.group, self._example, self._stream, budget
      )
    self.rounds = 0

  def step(self, number: int) -> Generated:
    """Returns the completions of a step."""
    count, under_way = len(self._prompts), self._under_way
    if under_way is None:
      key = jax.random.key(number)
      return self._sampler(self._params, self._prompts, key, group=self._group)
    begun = number * count + len(under_way.numbers)
    under_way.begin(np.arange(begun, (number + 2) * count))
    while under_way.complete.sum() < count:
      under_way.sample(number, self._params)
      self.rounds += 1
    places = np.flatnonzero(under_way.complete)[:count]
    out = under_way.generated(places, number)
    under_way.drop(places)
    return out

  def _example(self, number: int) -> Example:
    return Example(self._prompts[number % len(self._prompts)], {}, str(number))

  def _stream(self, numbers: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    steps, rows = np.divmod(numbers, len(self._prompts))
    return jax.vmap(jax.random.key)(steps), rows


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns one row per variant."""
  variants = {budget: Variant(a, budget) for budget in (0, *a.budgets)}
  records: dict[int, list[dict[str, float]]] = {budget: [] for budget in variants}
  for number in range(a.warmup + a.steps):
    for budget, variant in variants.items():
      if number == a.warmup:
        variant.rounds = 0
      before = clock()
      out = variant.step(number)
      carried = 0 if out.staleness is None else int((out.staleness > 0).sum())
      record = since(before) | {"tokens": int(out.mask.sum()), "carried": carried}
      record["longest"] = int(out.lengths.max())
      if number >= a.warmup:
        records[budget].append(record)
  rows = []
  for budget, steps in records.items():
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    seconds = [step["cpu_seconds"] for step in steps]
    rows.append(
      {
        "benchmark": "partial",
        **vars(a),
        "partial_tokens": budget,
        "cpu_seconds": total["cpu_seconds"] / a.steps,
        "gain": sum(step["cpu_seconds"] for step in records[0]) / total["cpu_seconds"],
        "slowest": max(seconds),
        "tokens_per_cpu_second": total["tokens"] / total["cpu_seconds"],
        "mean_length": total["tokens"] / (a.steps * a.prompts * a.group),
        "decode_steps": (variants[budget].rounds * budget or total["longest"]) / a.steps,
        "rounds": variants[budget].rounds / a.steps,
        "carried": total["carried"] / total["tokens"],
      }
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Measures all variants and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--model", default=alternate.MODEL)
  parser.add_argument("--prompts", type=int, default=4, help="number of prompts of a step, P")
  parser.add_argument("--group", type=int, default=8, help="group size, G")
  parser.add_argument("--tokens", type=int, default=128, help="largest length in tokens, T")
  parser.add_argument("--median", type=float, default=24.0, help="median length in tokens")
  parser.add_argument("--sigma", type=float, default=0.8, help="deviation of the log length")
  parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32], help="tokens of a round")
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--warmup", type=int, default=4)
  alternate.show(measure(parser.parse_args(argv)), COLUMNS)


if __name__ == "__main__":
  main()
