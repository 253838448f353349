"""Compares `head_logprobs` with full logits: time and memory of forward and backward pass.

    python -m benchmarks.logprobs --batch 4 --tokens 128 --width 576 --vocab 49152

Both methods compute log-probabilities and entropy, and the gradients of a weighted sum of both with
respect to hidden states and head. They alternate in one process, so that a busy machine disturbs
both alike. Memory is the temporary memory of XLA's compiled program, in units of one float32 array
[B, T, V]. The output is a table, then one JSON line per method.

Medians on two cores of an AMD EPYC (jax 0.10.2), hidden size 576, vocabulary 49152, float32:

| tokens  | layout of the head | time / plain | memory of head_logprobs | memory of plain |
|---------|--------------------|--------------|-------------------------|-----------------|
| 4 x 128 | [V, D]             | 0.68         | 0.37                    | 4.0             |
| 32 x 32 | [V, D]             | 0.65         | 0.17                    | 5.0             |
| 64 x 6  | [V, D]             | 0.74         | 0.51                    | 4.0             |
| 32 x 32 | [D, V]             | 0.55         | 0.73                    | 5.0             |

An embedding has the layout [V, D]. With `--kernel` the head has the layout [D, V], and
`head_logprobs` makes a transposed copy of it and another of its gradient.

`--peer trl` or `--peer tunix` measures the functions that the peer's update calls, on the same
inputs, in turns, in a process of its own: log-probabilities with their gradient, and entropy
without one. `besides` is the peak memory of a process beyond its memory once its inputs are ready.
"""

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax
from benchmarks import alternate
from benchmarks.settings import head_inputs
from benchmarks.worker import Channel

PEER_MODULES = {"trl": "benchmarks.peers.trl_logprobs", "tunix": "benchmarks.peers.tunix_logprobs"}
COLUMNS = (
  ("engine", "engine", ""),
  ("seconds", "wall s", ".3f"),
  ("seconds_ratio", "/ ours", ".2f"),
  ("range", "range", ""),
  ("cpu_seconds", "CPU s", ".3f"),
  ("cpu_seconds_ratio", "/ ours", ".2f"),
  ("besides_gib", "besides GiB", ".3f"),
  ("logp", "mean logp", ".5f"),
  ("other_cores", "other cores", ".2f"),
)


def plain(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the same from full logits `[B, T, V]`."""
  logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
  return grpo_jax.token_logprobs(logits, tokens)


def compiled(
  function: Callable, inputs: tuple[jax.Array, ...], kernel: bool
) -> jax.stages.Compiled:
  """Compiles value and gradients of `sum(a * logp + b * entropy)`.

  Args:
    function: `(hidden, head [D, V], tokens) -> (logp, entropy)`.
    inputs: hidden states, head, tokens, a and b.
    kernel: true if the head has the layout [D, V], false for [V, D].
  """

  def loss(hidden, head, tokens, a, b):
    logp, entropy = function(hidden, head if kernel else head.T, tokens)
    return jnp.sum(a * logp + b * entropy)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()


def measure(
  batch: int, tokens: int, width: int, vocab: int, dtype: str, repeats: int, kernel: bool
) -> list[dict]:
  """Returns one row per method: median and quartiles in seconds, and temporary memory.

  Args:
    batch, tokens, width, vocab: B, T, D and V.
    dtype: type of hidden states and head.
    repeats: number of measured rounds.
    kernel: true for a head of the layout [D, V].
  """
  rng = np.random.default_rng(0)
  inputs = (
    jnp.asarray(rng.normal(size=(batch, tokens, width)), dtype),
    jnp.asarray(rng.normal(size=(width, vocab) if kernel else (vocab, width)) / width**0.5, dtype),
    jnp.asarray(rng.integers(0, vocab, (batch, tokens)), jnp.int32),
    jnp.asarray(rng.normal(size=(batch, tokens)), jnp.float32),
    jnp.asarray(rng.normal(size=(batch, tokens)), jnp.float32),
  )
  programs = {
    "head_logprobs": compiled(grpo_jax.head_logprobs, inputs, kernel),
    "plain logits": compiled(plain, inputs, kernel),
  }
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for round_number in range(repeats + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*inputs))
      if round_number > 0:  # the first round warms up
        seconds[name].append(time.perf_counter() - start)
  rows = []
  for name, program in programs.items():
    temporary = program.memory_analysis().temp_size_in_bytes
    low, median, high = np.percentile(seconds[name], (25, 50, 75))
    rows.append(
      {
        "way": name,
        "batch": batch,
        "tokens": tokens,
        "width": width,
        "vocab": vocab,
        "dtype": dtype,
        "head": "[D, V]" if kernel else "[V, D]",
        "device": jax.devices()[0].device_kind,
        "seconds_median": round(float(median), 5),
        "seconds_quartiles": [round(float(low), 5), round(float(high), 5)],
        "temporary_bytes": temporary,
        "temporary_per_logits": round(temporary / (4 * batch * tokens * vocab), 4),
      }
    )
  for row in rows:
    row["time_per_plain"] = round(row["seconds_median"] / rows[-1]["seconds_median"], 3)
  return rows


def serve() -> None:
  """Serves `head_logprobs` as an engine: a unit of work is a forward and a backward pass."""
  channel = Channel()
  hidden, head, tokens, weights = (jnp.asarray(a) for a in head_inputs(**channel.settings["shape"]))

  @jax.jit
  def work(hidden, head, tokens, weights):
    def loss(hidden, head):
      logp, entropy = grpo_jax.head_logprobs(hidden, head.T, tokens)
      return jnp.sum(weights * logp), (logp.mean(), entropy)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

  channel.ready({"jax": jax.__version__})
  while channel.wait():
    with channel.measure() as record:
      (_, (logp, _)), _ = jax.block_until_ready(work(hidden, head, tokens, weights))
      record["logp"] = float(logp)


def beside_peers(shape: dict[str, int], peers: list[str], rounds: int, warmup: int) -> None:
  """Measures `head_logprobs` and the peers' functions in turns, and prints the rows.

  Raises:
    ValueError: the engines computed different log-probabilities.
  """
  commands = alternate.commands_for("benchmarks.logprobs", {p: PEER_MODULES[p] for p in peers})
  results = alternate.alternate(commands, {"shape": shape}, rounds=rounds, warmup=warmup)
  rows = alternate.summarize(results, {"benchmark": "head", **shape}, {})
  for row in rows:
    row["range"] = "{:.2f} .. {:.2f}".format(*row["seconds_ratio_range"])
    row["besides_gib"] = (row["peak_bytes"] - row["ready_bytes"]) / 2**30
  logps = [row["logp"] for row in rows]
  if not np.allclose(logps, logps[0], atol=1e-4):
    raise ValueError(f"the engines disagree: their mean log-probabilities are {logps}")
  alternate.show(rows, COLUMNS)


def main() -> None:
  """Measures `head_logprobs` beside full logits or beside peers."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--peer", choices=tuple(PEER_MODULES), action="append", default=[],
                      help="compare with this peer instead of with full logits")  # fmt: skip
  parser.add_argument("--batch", type=int, default=4, help="number of sequences")
  parser.add_argument("--tokens", type=int, default=128, help="tokens per sequence")
  parser.add_argument("--width", type=int, default=576, help="hidden size D")
  parser.add_argument("--vocab", type=int, default=49152, help="vocabulary size V")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--kernel", action="store_true", help="a head of the layout [D, V]")
  parser.add_argument("--repeats", type=int, default=9, help="measured rounds of each method")
  a = parser.parse_args()
  shape = {"batch": a.batch, "tokens": a.tokens, "width": a.width, "vocab": a.vocab}
  if a.worker:
    serve()
  elif a.peer:
    beside_peers(shape, a.peer, rounds=a.repeats, warmup=2)
  else:
    beside_plain(**shape, dtype=a.dtype, repeats=a.repeats, kernel=a.kernel)


def beside_plain(**settings) -> None:
  """Prints `measure` as a table and JSON lines."""
  rows = measure(**settings)
  print(f"{'way':<16}{'median s':>10}{'quartiles':>22}{'x plain':>10}{'memory / [B,T,V]':>18}")
  for row in rows:
    quartiles = "{:.4f} .. {:.4f}".format(*row["seconds_quartiles"])
    print(
      f"{row['way']:<16}{row['seconds_median']:>10.4f}{quartiles:>22}"
      f"{row['time_per_plain']:>10.3f}{row['temporary_per_logits']:>18.3f}"
    )
  for row in rows:
    print(json.dumps(row))


if __name__ == "__main__":
  main()
