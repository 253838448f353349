"""Measures how far sampler and update disagree about a mixture of experts, by depth.

    python -m benchmarks.routes --model runs/sums-base-model --dtype bfloat16

The first d layers of the model are a model of their own, for each d. It samples, and the update
scores the same tokens, once with the experts that were chosen while sampling and once with its own
choice. Differences of log-probabilities are in nats, over the tokens of all completions. `other`
is the share of the tokens read for which some layer chooses other experts in the update. The output
is a table, then one JSON line per depth.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import alternate
from grpo_jax.learning.step import Batch, score_batch
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.load import load
from grpo_jax.sampling.sampler import Sampler, for_decoding
from grpo_jax.tokens import load_tokenizer

COLUMNS = (
  ("layers", "layers", "d"),
  ("tokens", "tokens", "d"),
  ("fresh_mean", "fresh mean", ".2g"),
  ("fresh_max", "fresh max", ".2g"),
  ("replayed_mean", "replayed mean", ".2g"),
  ("replayed_max", "replayed max", ".2g"),
  ("other", "other", ".2g"),
)


def measure(
  source: str, dtype: str, prompts: list[str], group: int, tokens: int
) -> list[dict[str, float]]:
  """Returns one row per depth.

  Args:
    source: of the model.
    dtype: of activations.
    group: completions per prompt.
    tokens: of a completion, at most.
  """
  config, params = load(source)
  if not config.experts:
    raise SystemExit(f"{source} is not a mixture of experts")
  return [
    _row(config, params, depth, load_tokenizer(source), dtype, prompts, group, tokens)
    for depth in range(1, config.layers + 1)
  ]


def _row(config, params, depth, tokenizer, dtype, prompts, group, tokens) -> dict[str, float]:
  shallow = {"layers": depth} | {
    name: flags[:depth]
    for name in ("local_layers", "unrotated_layers")
    if (flags := getattr(config, name))
  }
  model = Decoder(
    dataclasses.replace(config, **shallow), dtype=jnp.dtype(dtype), record_routes=True
  )
  params = params | {"layers": jax.tree.map(lambda a: a[:depth], params["layers"])}
  longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
  sampler = Sampler(model, tokenizer, longest, tokens)
  out = sampler(for_decoding(model, params, None), prompts, jax.random.key(0), group=group)
  batch = Batch(
    out.prompts, out.prompt_mask, out.tokens, out.mask,
    advantages=np.zeros(out.mask.shape[:2]), weights=out.mask, sampler_logp=out.logp,
    routes=out.routes, prompt_routes=out.prompt_routes, temperature=1.0,
  )  # fmt: skip
  row = {"layers": depth, "tokens": int(out.mask.sum())}
  fresh = dataclasses.replace(batch, routes=None, prompt_routes=None)
  for name, each in (("fresh", fresh), ("replayed", batch)):
    logp = jax.jit(lambda params, batch: score_batch(model, params, batch)[0])(params, each)
    errors = np.abs(np.asarray(logp, np.float64) - out.logp)[out.mask]
    row |= {f"{name}_mean": float(errors.mean()), f"{name}_max": float(errors.max())}
  rows = batch.prompts, batch.prompt_mask, batch.completions
  chosen = np.asarray(jax.jit(model.score_with_routing)(params, *rows)[1].experts)
  n, read = out.prompts.shape[1], out.mask[..., 1:]
  chosen = np.moveaxis(chosen[:, :, n:], 0, 2).reshape(*read.shape, -1)
  differ = (np.sort(chosen.reshape(*read.shape, depth, -1)) != np.sort(
    out.routes[:, :, :-1].reshape(*read.shape, depth, -1)
  )).any((-2, -1))  # fmt: skip
  return row | {"other": float(differ[read].mean())}


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
  parser.add_argument("--prompts", type=int, default=64, help="sums of two two-digit numbers")
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=4)
  a = parser.parse_args()
  numbers = np.random.default_rng(0).integers(10, 100, (a.prompts, 2))
  rows = measure(a.model, a.dtype, [f"{x} + {y} =" for x, y in numbers], a.group, a.tokens)
  alternate.show(rows, COLUMNS)


if __name__ == "__main__":
  main()
