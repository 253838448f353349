"""Compares ways to keep the sampler's rows live, by simulation with measured times of a step.

    python -m benchmarks.slots --prompts 32 --group 8 --tokens 4096 --budget 64

A step of R rows takes `cost(R)` seconds, interpolated between measured numbers of rows: the decode
loop of `--model` on this machine, with room for `--measure-tokens` tokens in each row. The lengths
of all completions are drawn once per distribution. Ways:

- plain: all completions at once, until the last one has ended.
- compaction: the same; rows move into arrays of half as many, three times at most. This is the
  sampler without `rollout.cache_gib`.
- waves: prompts in groups that fill the budget of rows, one after another, each with compaction.
- refill by group: a budget of rows in which a prompt takes the place of one whose completions have
  all ended.
- refill: a completion takes the place of one that has ended, and the last ones are compacted up to
  five times. This is the sampler with `rollout.cache_gib`.

`rows` is the largest number of rows in the cache, its memory in units of one completion, and `live`
the share of row-steps that compute a token of a completion.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import alternate
from grpo_jax.sampling.compaction import shapes
from grpo_jax.sampling.refill import MAX_COMPACTIONS, halvings

# Median, deviation of the logarithm; lengths are cut at the budget of tokens.
DISTRIBUTIONS = {"long tail": (300.0, 0.9), "narrow": (300.0, 0.3), "long": (3000.0, 0.5)}
COLUMNS = (
  ("distribution", "lengths", ""),
  ("way", "way", ""),
  ("rows", "rows", ".0f"),
  ("steps", "steps", ".0f"),
  ("live", "live", ".2f"),
  ("seconds", "device s", ".1f"),
  ("of_plain", "/ plain", ".2f"),
)
Steps = list[tuple[int, int]]  # (rows, number of steps with as many)


def draw_lengths(name: str, prompts: int, group: int, tokens: int, seed: int = 0) -> np.ndarray:
  """Returns lengths [P, G], lognormal, each prompt with a mean of its own."""
  median, sigma = DISTRIBUTIONS[name]
  rng = np.random.default_rng(seed)
  of_prompt = rng.normal(size=(prompts, 1)) * sigma * math.sqrt(0.5)
  own = rng.normal(size=(prompts, group)) * sigma * math.sqrt(0.5)
  return np.clip(np.ceil(median * np.exp(of_prompt + own)), 1, tokens).astype(int)


def compacted(lengths: np.ndarray, sizes: Sequence[int]) -> Steps:
  """Returns the steps of rows that all begin at once and move into ever smaller arrays.

  Args:
    lengths: of the rows.
    sizes: numbers of rows, the first that of all of them.
  """
  steps, at, order = [], 0, np.sort(lengths)
  for size, smaller in zip(sizes, (*sizes[1:], 0)):
    until = order[len(order) - smaller - 1] if len(order) > smaller else at
    steps.append((size, max(until - at, 0)))
    at = max(until, at)
  return steps


def plain(lengths: np.ndarray, budget: int) -> Steps:
  return [(lengths.size, lengths.max())]


def compaction(lengths: np.ndarray, budget: int) -> Steps:
  sizes = [s.chunks * s.width for s in shapes(*lengths.shape, 3)]
  return compacted(lengths.reshape(-1), sizes)


def waves(lengths: np.ndarray, budget: int) -> Steps:
  count = max(budget // lengths.shape[1], 1)
  parts = [lengths[i : i + count] for i in range(0, len(lengths), count)]
  return [step for part in parts for step in compaction(part, budget)]


def refill_by_group(lengths: np.ndarray, budget: int) -> Steps:
  places = max(budget // lengths.shape[1], 1)
  return refilled(lengths.max(-1), places, lengths.shape[1], 0)


def refill(lengths: np.ndarray, budget: int) -> Steps:
  return refilled(lengths.reshape(-1), min(budget, lengths.size), 1, MAX_COMPACTIONS)


def refilled(lengths: np.ndarray, places: int, width: int, most: int) -> Steps:
  """Returns the steps of a queue over a number of places, each `width` rows."""
  ends = np.zeros(places, int)
  for length in lengths:
    ends[ends.argmin()] += length
  last = ends.min()  # then the queue is empty: some place would have taken more
  steps = [(places * width, int(last))]
  left = compacted(ends - last, [places, *halvings(places, most)])
  return steps + [(rows * width, count) for rows, count in left]


WAYS: dict[str, Callable[[np.ndarray, int], Steps]] = {
  "plain": plain,
  "compaction": compaction,
  "waves": waves,
  "refill by group": refill_by_group,
  "refill": refill,
}


def simulate(a: argparse.Namespace, cost: Callable[[int], float]) -> list[dict[str, Any]]:
  """Returns one row per distribution and way.

  Args:
    cost: seconds of a step by its number of rows.
  """
  rows = []
  for name in DISTRIBUTIONS:
    lengths = draw_lengths(name, a.prompts, a.group, a.tokens)
    first = None
    for way, function in WAYS.items():
      steps = function(lengths, a.budget)
      seconds = sum(cost(rows) * count for rows, count in steps)
      first = first or seconds
      work = sum(rows * count for rows, count in steps)
      rows.append(
        {
          "benchmark": "slots", **vars(a), "distribution": name, "way": way,
          "rows": max(rows for rows, _ in steps), "steps": int(sum(count for _, count in steps)),
          "live": float(lengths.sum() / work), "seconds": float(seconds),
          "of_plain": float(seconds / first), "mean_length": float(lengths.mean()),
        }
      )  # fmt: skip
  return rows


def measured_cost(a: argparse.Namespace) -> dict[int, float]:
  """Measures the seconds of a decode step by its number of rows."""
  import jax
  import jax.numpy as jnp

  from benchmarks import ours
  from benchmarks.sampling import best
  from benchmarks.settings import make_prompts
  from grpo_jax.sampling import generate as generation
  from grpo_jax.tokens import encode_prompts

  prompts = make_prompts("chat", 1)
  sampler, params, _ = ours.make_sampler(a.model, prompts, a.measure_tokens, "float32")
  tokens, mask, _ = encode_prompts(sampler.tokenizer, prompts, sampler.prompt_length)
  endless = jnp.zeros((2, sampler.model.config.vocab_size), jnp.int32)
  cost = {}
  for rows in a.measure_rows:
    keys = generation.row_keys(jax.random.key(0), jnp.arange(1), rows)
    calls = []
    # The difference leaves out the prefill. Rounds alternate, so that both see the same machine.
    for length in (a.measure_tokens // 8, a.measure_tokens):
      program = jax.jit(
        partial(
          generation.generate, sampler.model, length=length, temperature=1.0,
          pad_id=sampler.tokenizer.pad_id,
        )
      )  # fmt: skip
      calls.append(partial(program, params, tokens, mask, keys, endless))
    seconds = np.array([[best(call, rounds=1) for call in calls] for _ in range(a.rounds)]).min(0)
    cost[rows] = float(seconds[1] - seconds[0]) / (a.measure_tokens - a.measure_tokens // 8)
  if sorted(cost.values()) != list(cost.values()) or min(cost.values()) <= 0:
    raise SystemExit(f"the machine is too busy to measure: {cost}; use more --rounds")
  return cost


def interpolated(cost: dict[int, float]) -> Callable[[int], float]:
  """Returns the seconds of a step for any number of rows; beyond the last one, in proportion."""
  rows, seconds = np.array([*cost]), np.array([*cost.values()])

  def at(count: int) -> float:
    if count > rows[-1]:
      return float(seconds[-1] * count / rows[-1])
    return float(np.interp(count, rows, seconds))

  return at


def main(argv: Sequence[str] | None = None) -> None:
  """Measures the cost of a step, and prints what each way takes."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--model", default=alternate.MODEL)
  parser.add_argument("--prompts", type=int, default=32, help="number of prompts, P")
  parser.add_argument("--group", type=int, default=8, help="group size, G")
  parser.add_argument("--tokens", type=int, default=4096, help="largest length in tokens, T")
  parser.add_argument("--budget", type=int, default=64, help="rows that the cache has room for")
  parser.add_argument("--measure-tokens", type=int, default=32)
  parser.add_argument("--measure-rows", type=int, nargs="+", default=[1, 4, 16, 64])
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument(
    "--cost", nargs="+", default=[], metavar="ROWS:MS", help="given instead of measured"
  )
  a = parser.parse_args(argv)
  pairs = (text.split(":") for text in a.cost)
  cost = {int(rows): float(ms) / 1000 for rows, ms in pairs} or measured_cost(a)
  print("rows and milliseconds of a step:", {n: round(1000 * s, 2) for n, s in cost.items()})
  alternate.show(simulate(a, interpolated(cost)), COLUMNS)


if __name__ == "__main__":
  main()
