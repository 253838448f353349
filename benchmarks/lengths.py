"""Measures what padding costs in an update with long-tailed lengths, sorted by length and not.

    python -m benchmarks.lengths --tokens 512 --median 37.5

Lengths are lognormal (median `--median` tokens, `--sigma`), cut at `--tokens`. Both variants
compute the same gradient of the same random model in one process, in turns, with `--micro-batches`
micro-batches. `computed` is the share of the tokens of the unsorted variant that each computes, and
`padded` the share of those that is padding. A gain is a ratio of CPU times of one round, and
`difference` the largest difference of the two gradients, relative to the largest entry.
"""

import argparse
import math

import jax
import numpy as np

from benchmarks import alternate
from benchmarks.worker import clock, since
from grpo_jax.core.masks import token_weights
from grpo_jax.learning.batch import Batch, sizes
from grpo_jax.learning.reduction import by_length, make_gradient, split
from grpo_jax.learning.step import make_loss
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder

CONFIG = ModelConfig(
  vocab_size=2048, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=384
)  # fmt: skip
COLUMNS = (
  ("sort_by_length", "sorted", ""),
  ("computed", "computed", ".2f"),
  ("padded", "padded", ".2f"),
  ("cpu_seconds", "CPU s", ".2f"),
  ("gain", "gain", ".2f"),
  ("range", "range", ""),
)


def make_batch(a: argparse.Namespace) -> Batch:
  """Returns a batch of random tokens."""
  rng = np.random.default_rng(a.seed)
  rows = a.prompts, a.group, a.tokens
  lengths = np.exp(rng.normal(math.log(a.median), a.sigma, rows[:2]))
  mask = np.arange(a.tokens) < np.clip(lengths, 1, a.tokens)[..., None]
  return Batch(
    prompts=rng.integers(0, CONFIG.vocab_size, (a.prompts, a.prompt_tokens)).astype(np.int32),
    prompt_mask=np.ones((a.prompts, a.prompt_tokens), bool),
    completions=rng.integers(0, CONFIG.vocab_size, rows).astype(np.int32),
    mask=mask,
    advantages=rng.normal(size=rows[:2]).astype(np.float32),
    weights=np.asarray(token_weights(mask, "token")),
    sampler_logp=np.zeros(rows, np.float32),
    temperature=1.0,
  )


def computed_tokens(batch: Batch, micro_batches: int, sort_by_length: bool) -> int:
  """Returns the number of tokens that an update computes, padding included."""
  cut = sizes(batch.mask.shape[2])
  if sort_by_length:
    batch, _ = by_length(batch, micro_batches)
  parts = np.asarray(split(batch.mask, micro_batches))
  _, count, group, length = parts.shape
  longest = (parts * np.arange(1, length + 1)).max((1, 2, 3))
  used = [min(n for n in cut if n >= most) if sort_by_length else length for most in longest]
  return sum(count * (batch.prompts.shape[1] + group * n) for n in used)


def main(argv: list[str] | None = None) -> None:
  """Measures both variants and prints a table."""
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--prompt-tokens", type=int, default=32)
  parser.add_argument("--tokens", type=int, default=512)
  parser.add_argument("--median", type=float, default=37.5)
  parser.add_argument("--sigma", type=float, default=1.0)
  parser.add_argument("--micro-batches", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  a = parser.parse_args(argv)
  batch, model = make_batch(a), Decoder(CONFIG)
  params = model.init(jax.random.key(0))
  real = a.prompts * a.prompt_tokens + int(batch.mask.sum())
  variants, seconds, gradients = {}, {}, {}
  for is_sorted in (False, True):
    loss = make_loss(model, "dapo")
    gradient = make_gradient(loss, a.micro_batches, sort_by_length=is_sorted)
    variants[is_sorted] = jax.jit(gradient).lower(params, batch, None).compile()
    seconds[is_sorted] = []
  for _ in range(a.rounds):
    for is_sorted, gradient in variants.items():
      start = clock()
      gradients[is_sorted] = jax.block_until_ready(gradient(params, batch, None))[0]
      seconds[is_sorted].append(since(start)["cpu_seconds"])
  pairs = zip(jax.tree.leaves(gradients[False]), jax.tree.leaves(gradients[True]), strict=True)
  difference = max(float(abs(x - y).max()) for x, y in pairs)
  largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradients[False]))
  tokens = {v: computed_tokens(batch, a.micro_batches, v) for v in seconds}
  rows = []
  for is_sorted, times in seconds.items():
    gains = np.array(seconds[False]) / np.array(times)
    rows.append({
      "sort_by_length": is_sorted,
      "computed": tokens[is_sorted] / tokens[False],
      "padded": 1 - real / tokens[is_sorted],
      "cpu_seconds": float(np.median(times)),
      "gain": float(np.median(gains)),
      "range": f"{gains.min():.2f} to {gains.max():.2f}",
      "difference": difference / largest,
    })  # fmt: skip
  alternate.show(rows, COLUMNS)


if __name__ == "__main__":
  main()
