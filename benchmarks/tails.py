"""What ended completions cost: sampling with long-tailed lengths, rows moved together or not.

    python -m benchmarks.tails --prompts 4 --group 8 --tokens 128

All variants run in one process, in turns, and draw the same completions: lengths are lognormal
(median `--median` tokens, `--sigma`), by a table of stops in which every token ends a completion in
as large a share of the vocabulary as the distribution says. `max_compactions` is what
`generation.generate` takes: how often rows may move into arrays of half as many.
"""

import argparse
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import alternate, ours
from benchmarks.settings import make_prompts
from benchmarks.worker import clock, since
from grpo_jax.sampling import generate as generation
from grpo_jax.tokens import encode_prompts

COLUMNS = (
  ("max_compactions", "max_compactions", ""),
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
  """A table of stops: the state is the number of tokens so far, its last row the end.

  Token number n ends a completion that has come so far with probability
  `P(length <= n | length > n - 1)` of the lognormal, over a vocabulary in random order.
  """

  def cumulative(n: np.ndarray) -> np.ndarray:
    z = (np.log(np.maximum(n, 1e-9)) - math.log(median)) / (sigma * math.sqrt(2))
    return 0.5 * (1 + np.vectorize(math.erf)(z))

  n = np.arange(length)
  hazard = (cumulative(n + 1) - cumulative(n)) / np.maximum(1 - cumulative(n), 1e-9)
  rng = np.random.default_rng(0)
  table = np.full((length + 1, vocab), length, np.int32)
  for state in range(length):
    goes_on = rng.random(vocab, np.float32) >= hazard[state]
    table[state, goes_on] = min(state + 1, length - 1)
  return table


def main(argv: list[str] | None = None) -> None:
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--model", default=alternate.MODEL)
  parser.add_argument("--prompts", type=int, default=4, help="P")
  parser.add_argument("--group", type=int, default=8, help="G")
  parser.add_argument("--tokens", type=int, default=128, help="T, the budget")
  parser.add_argument("--median", type=float, default=24.0, help="length, tokens")
  parser.add_argument("--sigma", type=float, default=0.8, help="of the logarithm of the length")
  parser.add_argument("--max_compactions", type=int, nargs="+", default=[0, 1, 3])
  parser.add_argument("--rounds", type=int, default=5)
  a = parser.parse_args(argv)
  prompts = make_prompts("chat", a.prompts)
  sampler, params = ours.make_sampler(a.model, prompts, a.tokens, "float32")
  tokens, mask, _ = encode_prompts(sampler.tokenizer, prompts, sampler.prompt_length)
  vocab = sampler.model.config.vocab_size
  table = jnp.asarray(lognormal_stops(a.median, a.sigma, a.tokens, vocab))
  keys = [
    generation.row_keys(jax.random.key(i), jnp.arange(a.prompts), a.group) for i in range(a.rounds)
  ]
  variants, compiled = {}, {}
  for max_compactions in a.max_compactions:
    generate = partial(
      generation.generate, sampler.model, length=a.tokens, temperature=1.0,
      pad_id=sampler.tokenizer.pad_id, max_compactions=max_compactions,
    )  # fmt: skip
    before = clock()
    variants[max_compactions] = (
      jax.jit(generate).lower(params, tokens, mask, keys[0], table).compile()
    )
    compiled[max_compactions] = since(before)["cpu_seconds"]
  records = {max_compactions: [] for max_compactions in variants}
  lengths = []
  for i, key in enumerate(keys):
    order = list(variants) if i % 2 == 0 else list(reversed(variants))
    drawn = {}
    for max_compactions in order:
      before = clock()
      out = jax.block_until_ready(variants[max_compactions](params, tokens, mask, key, table))
      records[max_compactions].append(since(before))
      drawn[max_compactions] = np.asarray(out.tokens)
    for max_compactions, one in drawn.items():
      records[max_compactions][-1]["same"] = float(
        (one == drawn[a.max_compactions[0]]).all(-1).mean()
      )
    lengths.append(np.asarray(out.mask).sum(-1))
  rows = []
  for max_compactions, mine in records.items():
    cpu = np.array(
      [[r["cpu_seconds"] for r in some] for some in (records[a.max_compactions[0]], mine)]
    )
    gains = cpu[0] / cpu[1]
    rows.append(
      {
        "benchmark": "tails",
        **vars(a),
        "max_compactions": max_compactions,
        "cpu_seconds": float(np.median(cpu[1])),
        "gain": float(np.median(gains)),
        "gain_range": f"{gains.min():.2f} .. {gains.max():.2f}",
        "seconds": float(np.median([r["seconds"] for r in mine])),
        "compile_cpu_seconds": compiled[max_compactions],
        "same": float(np.mean([r["same"] for r in mine])),
        "mean_length": float(np.mean(lengths)),
        "longest": float(np.mean([one.max() for one in lengths])),
        **alternate.machine(),
        **ours.about(),
      }
    )
  alternate.show(rows, COLUMNS)


if __name__ == "__main__":
  main()
