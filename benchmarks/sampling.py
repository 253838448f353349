"""Measures tokens per second of grpo_jax's sampler and of transformers' `generate`.

    python -m benchmarks.sampling --prompts 4 --group 8 --tokens 64 --peer transformers

The time includes the prefill. All completions have exactly `--tokens` tokens (grpo_jax gets a stop
table that no token reaches, transformers `min_new_tokens`), sampled at temperature 1 from the whole
vocabulary in float32. With `--group 1` each row has its own prompt, so nothing is shared.

`of bound` is the share of the memory-bandwidth bound, at which a decode step reads each weight
once. The rate of reading is that of a sum over all weights on all cores, measured in the engine's
process before each round. At larger batches compute is the limit, not memory. `of products` is the
share of the time of all weight matmuls with this number of rows on this backend.

`--form int8` adds an engine of ours with `rollout.weights=int8`, and `--form adapters-nf4` one with
adapters beside a base of `lora.quantize=nf4`. `mismatch` is the mean of |log-prob of the sampler -
log-prob of the update| in nats, in each quarter of the completions.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import alternate
from benchmarks.settings import FORMS
from benchmarks.step import same_tokens

PEER_MODULES = {"transformers": "benchmarks.peers.transformers_generate"}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # matrices of a layer
COLUMNS = (
  ("engine", "engine", ""),
  ("seconds", "wall s", ".2f"),
  ("tokens_per_second", "tokens/s", ".1f"),
  ("seconds_ratio", "time / ours", ".2f"),
  ("range", "range", ""),
  ("cpu_seconds", "CPU s", ".1f"),
  ("tokens_per_cpu_second", "tokens/CPU s", ".1f"),
  ("cpu_seconds_ratio", "/ ours", ".2f"),
  ("of_bound", "of bound", ".2f"),
  ("of_products", "of products", ".2f"),
  ("peak_gib", "peak GiB", ".2f"),
  ("first_seconds", "first s", ".1f"),
  ("mismatch", "mismatch", ""),
  ("other_cores", "other cores", ".2f"),
)


def serve(form: str) -> None:
  """Serves grpo_jax's sampler as an engine: a unit of work is a batch of completions.

  Args:
    form: of the weights, one of `settings.FORMS`.
  """
  import jax
  import numpy as np

  from benchmarks import ours
  from benchmarks.settings import make_prompts
  from benchmarks.worker import Channel, clock, since

  channel = Channel()
  s = channel.settings
  prompts = make_prompts(s["kind"], s["prompts"])
  sampler, params, scored = ours.make_sampler(s["model"], prompts, s["tokens"], s["dtype"], form)
  sampler = ours.endless(sampler)
  gap = mismatch(sampler, params, scored, prompts, s["group"])
  about = {"mismatch": " ".join(f"{nats:.2g}" for nats in gap)}
  about["weight_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  del scored
  has_floors = form == "trained"  # the time of reading all weights, and of all products
  if has_floors:
    read, multiply = reader(params), multiplier(params, s["prompts"] * s["group"])
  channel.ready(ours.about() | about)
  number = 0
  while channel.wait():
    number += 1
    before = clock()
    floors = {"read_seconds": best(read), "product_seconds": best(multiply)} if has_floors else {}
    floors["aside_cpu_seconds"] = since(before)["cpu_seconds"]
    with channel.measure() as record:
      out = sampler(params, prompts, jax.random.key(number), group=s["group"], temperature=1.0)
      record["prompt_tokens"] = int(out.prompt_mask.sum())
      record["completion_tokens"] = int(np.sum(out.lengths))
      record |= floors


def mismatch(sampler: Any, params: Any, scored: Any, prompts: Any, group: int) -> list[float]:
  """Returns the mean |log-prob while sampling - log-prob when scored| in each quarter, in nats.

  Args:
    sampler: samples with `params`.
    scored: the parameters of the update.
    prompts, group: the prompts, and completions of each.
  """
  import jax
  import numpy as np

  from grpo_jax.core.logprobs import head_logprobs

  out, model = sampler(params, prompts, jax.random.key(0), group=group), sampler.model

  @jax.jit
  def score(params, prompts, mask, tokens):
    hidden = model.score(params, prompts, mask, tokens)
    return head_logprobs(hidden, model.head(params), tokens, softcap=model.config.softcap)[0]

  gap = np.abs(score(scored, out.prompts, out.prompt_mask, out.tokens) - out.logp)
  return [float(quarter.mean()) for quarter in np.array_split(gap, 4, axis=-1)]


def reader(params: Any) -> Callable[[], Any]:
  """Returns a function that reads each weight once, by summing all of them."""
  import jax
  import jax.numpy as jnp

  total = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))
  return lambda: total(params)


def multiplier(params: Any, rows: int) -> Callable[[], Any]:
  """Returns a function that multiplies `rows` vectors by each matrix.

  Args:
    params: parameters with layers stacked or unstacked.
    rows: number of vectors.
  """
  import jax
  import jax.numpy as jnp

  layers = jax.tree_util.tree_leaves_with_path(params["layers"])
  matrices = [leaf for path, leaf in layers if path[-1].key in MATRICES]
  x = jnp.ones((rows, max(leaf.shape[-2] for leaf in matrices)), matrices[0].dtype)

  @jax.jit
  def products(matrices, table, x):
    logits = jnp.einsum("rd,vd->rv", x[:, : table.shape[1]], table)
    return [jnp.einsum("ri,...io->...ro", x[:, : m.shape[-2]], m) for m in matrices], logits

  return lambda: products(matrices, params.get("head", params["embed"]), x)


def best(work: Callable[[], Any], rounds: int = 5) -> float:
  """Returns the shortest time of `work` in seconds, after a warm-up call."""
  import jax

  seconds = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    jax.block_until_ready(work())
    seconds.append(time.perf_counter() - start)
  return min(seconds[1:])


def main(argv: list[str] | None = None) -> None:
  """Measures the engines and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  alternate.add_arguments(parser, tuple(PEER_MODULES))
  parser.add_argument("--kind", choices=("two-shot", "chat", "eight-shot"), default="chat")
  parser.add_argument("--prompts", type=int, default=4, help="number of prompts, P")
  parser.add_argument("--group", type=int, default=8, help="group size G; the batch has P x G rows")
  parser.add_argument("--tokens", type=int, default=64, help="new tokens per row, T")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="type of grpo_jax's activations")  # fmt: skip
  parser.add_argument("--form", choices=FORMS, action="append", default=[],
                      help="also measure ours with weights of this form")  # fmt: skip
  a = parser.parse_args(argv)
  if a.worker:
    serve(*a.form)
    return
  settings: dict[str, Any] = {
    "model": alternate.model_for(a.model, a.peer),
    "kind": a.kind,
    "prompts": a.prompts,
    "group": a.group,
    "tokens": a.tokens,
    "dtype": a.dtype,
  }
  commands = alternate.commands_for("benchmarks.sampling", {p: PEER_MODULES[p] for p in a.peer})
  ours = commands[alternate.OURS]
  commands[alternate.OURS] = [*ours, "--form", "trained"]
  commands |= {form: [*ours, "--form", form] for form in a.form}
  results = alternate.alternate(commands, settings, rounds=a.rounds, warmup=a.warmup)
  same_tokens(results)
  tokens = a.prompts * a.group * a.tokens
  about = {"benchmark": "sampling", **settings}
  rows = alternate.summarize(results, about, {"tokens_per_second": tokens})
  for row in rows:
    row["of_bound"] = a.tokens * rows[0]["read_seconds"] / row["seconds"]
    row["of_products"] = a.tokens * rows[0]["product_seconds"] / row["seconds"]
    row["tokens_per_cpu_second"] = tokens / row["cpu_seconds"]
    row["peak_gib"] = row["peak_bytes"] / 2**30
    row["range"] = "{:.2f} .. {:.2f}".format(*row["seconds_ratio_range"])
  alternate.show(rows, COLUMNS)


if __name__ == "__main__":
  main()
