"""Measures what finished completions cost: long-tailed lengths, with and without compaction.

    python -m benchmarks.tails --prompts 4 --group 8 --tokens 128

All variants run in one process, in turns, and sample the same completions. Lengths are lognormal
(median `--median` tokens, `--sigma`): in a stop table, as large a share of the vocabulary ends a
completion at each token as the distribution asks for. `max_compactions` is an argument of
`generate`: the largest number of times that rows move into arrays of half as many rows. With
`--rows`, the sampler with a budget of so many rows is compared too, which are filled again as
completions end (`sampling.refill`); it is named by its rows, as `rows 8`.
"""

import argparse
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import alternate, ours
from benchmarks.settings import make_prompts
from benchmarks.worker import clock, since
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling.refill import generate_refilled
from grpo_jax.tokens import encode_prompts

COLUMNS = (
  ("max_compactions", "compactions", ""),
  ("cpu_seconds", "CPU s", ".2f"),
  ("gain", "gain", ".2f"),
  ("gain_range", "range", ""),
  ("seconds", "wall s", ".2f"),
  ("compile_cpu_seconds", "compile CPU s", ".1f"),
  ("same", "same rows", ".3f"),
  ("mean_length", "mean length", ".1f"),
  ("longest", "longest", ".0f"),
)


def lognormal_stops(median: float, sigma: float, length: int, vocab: int) -> np.ndarray:
  """Returns a stop table [length + 1, vocab] that makes lengths lognormal.

  The state is the number of tokens so far; the last row is the end. Token number n ends a
  completion that has reached it with probability `P(length <= n | length > n - 1)` of the
  lognormal, over a vocabulary in random order.

  Args:
    median: median length in tokens.
    sigma: standard deviation of the logarithm of the length.
    length: largest number of tokens.
    vocab: vocabulary size.
  """

  def cumulative(n: np.ndarray) -> np.ndarray:
    z = (np.log(np.maximum(n, 1e-9)) - math.log(median)) / (sigma * math.sqrt(2))
    return 0.5 * (1 + np.vectorize(math.erf)(z))

  n = np.arange(length)
  hazard = (cumulative(n + 1) - cumulative(n)) / np.maximum(1 - cumulative(n), 1e-9)
  rng = np.random.default_rng(0)
  table = np.full((length + 1, vocab), length, np.int32)
  for state in range(length):
    continues = rng.random(vocab, np.float32) >= hazard[state]
    table[state, continues] = min(state + 1, length - 1)
  return table


class Variants:
  """Compiles the sampler once for each number of compactions.

  Args:
    a: the arguments of the command.

  Attributes:
    compile_seconds: number of compactions -> CPU seconds of its compilation.
  """

  def __init__(self, a: argparse.Namespace) -> None:
    prompts = make_prompts("chat", a.prompts)
    sampler, params, _ = ours.make_sampler(a.model, prompts, a.tokens, "float32")
    tokens, mask, _ = encode_prompts(sampler.tokenizer, prompts, sampler.prompt_length)
    vocab = sampler.model.config.vocab_size
    table = jnp.asarray(lognormal_stops(a.median, a.sigma, a.tokens, vocab))
    self._inputs = lambda key: (params, tokens, mask, key, table)
    self.keys = [
      generation.row_keys(jax.random.key(i), jnp.arange(a.prompts), a.group)
      for i in range(a.rounds)
    ]
    self._programs, self.compile_seconds = {}, {}
    common = {"length": a.tokens, "temperature": 1.0, "pad_id": sampler.tokenizer.pad_id}
    for count in variants_of(a):
      if isinstance(count, int):
        generate = partial(generation.generate, sampler.model, max_compactions=count, **common)
      else:
        rows = int(count.split()[1])
        generate = partial(generate_refilled, sampler.model, rows=rows, **common)
      before = clock()
      self._programs[count] = jax.jit(generate).lower(*self._inputs(self.keys[0])).compile()
      self.compile_seconds[count] = since(before)["cpu_seconds"]

  def sample(self, count: int | str, key: jax.Array) -> generation.Completions:
    """Samples with up to `count` compactions, or with a budget of rows."""
    return jax.block_until_ready(self._programs[count](*self._inputs(key)))


def variants_of(a: argparse.Namespace) -> list[int | str]:
  """Returns the numbers of compactions, and a name for each budget of rows."""
  return [*a.max_compactions, *(f"rows {rows}" for rows in a.rows)]


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns one row per number of compactions; gains are over the first one."""
  variants = Variants(a)
  records: dict[Any, list[dict[str, float]]] = {count: [] for count in variants_of(a)}
  lengths = []
  for i, key in enumerate(variants.keys):
    tokens = {}
    for count in variants_of(a) if i % 2 == 0 else reversed(variants_of(a)):
      before = clock()
      out = variants.sample(count, key)
      records[count].append(since(before))
      tokens[count] = np.asarray(out.tokens)
    for count in variants_of(a):
      same = (tokens[count] == tokens[a.max_compactions[0]]).all(-1)
      records[count][-1]["same"] = float(same.mean())
    lengths.append(np.asarray(out.mask).sum(-1))
  rows = []
  for count, variant in records.items():
    first = np.array([record["cpu_seconds"] for record in records[a.max_compactions[0]]])
    cpu_seconds = np.array([record["cpu_seconds"] for record in variant])
    gains = first / cpu_seconds
    rows.append(
      {
        "benchmark": "tails",
        **vars(a),
        "max_compactions": count,
        "cpu_seconds": float(np.median(cpu_seconds)),
        "gain": float(np.median(gains)),
        "gain_range": f"{gains.min():.2f} .. {gains.max():.2f}",
        "seconds": float(np.median([record["seconds"] for record in variant])),
        "compile_cpu_seconds": variants.compile_seconds[count],
        "same": float(np.mean([record["same"] for record in variant])),
        "mean_length": float(np.mean(lengths)),
        "longest": float(np.mean([length.max() for length in lengths])),
        **alternate.machine(),
        **ours.about(),
      }
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Measures all variants and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--model", default=alternate.MODEL)
  parser.add_argument("--prompts", type=int, default=4, help="number of prompts, P")
  parser.add_argument("--group", type=int, default=8, help="group size, G")
  parser.add_argument("--tokens", type=int, default=128, help="largest length in tokens, T")
  parser.add_argument("--median", type=float, default=24.0, help="median length in tokens")
  parser.add_argument("--sigma", type=float, default=0.8, help="deviation of the log length")
  parser.add_argument("--max-compactions", type=int, nargs="+", default=[0, 1, 3])
  parser.add_argument("--rows", type=int, nargs="*", default=[], help="budgets of rows")
  parser.add_argument("--rounds", type=int, default=5)
  alternate.show(measure(parser.parse_args(argv)), COLUMNS)


if __name__ == "__main__":
  main()
