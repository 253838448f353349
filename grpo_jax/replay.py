"""Runs a skipped update again and shows where its numbers went wrong.

`python -m grpo_jax.replay WORKDIR/skipped/step_000012_update_0 [--tokens 10]` reads the state and
the batch of the dump, runs the update again with the program of the run, and reports whether the
metrics are the same bit for bit. The exit code is 0 if they are, 1 if not, 2 for a mistake in the
command.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.replay")

import jax
import numpy as np

from grpo_jax import addresses
from grpo_jax import config as configs
from grpo_jax.build import Run, build, update_config
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.step import TrainState, ValueHead, with_entropy_coef
from grpo_jax.learning.updates import in_the_loss, make_gradients, make_scoring, make_update
from grpo_jax.run import compilation, console, mirror
from grpo_jax.run import skipped as dumps

Named = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Replayed:
  """An update that was run again.

  Attributes:
    metrics: metrics of the update, with loss and grad_norm.
    recorded: metrics that the run recorded.
    tokens: per-token numbers by name, [P, G, T], in the order in which they are computed.
    mask: [P, G, T], true for tokens in the loss.
    params, grads: trained parameters and their gradients by name.
    state: the state after the update.
  """

  metrics: dict[str, float]
  recorded: dict[str, float]
  tokens: Named
  mask: np.ndarray
  params: Named
  grads: Named
  state: TrainState

  def differing(self) -> list[str]:
    """Returns the names of metrics that are not the recorded ones bit for bit; NaN equals NaN."""
    names = sorted(set(self.metrics) | set(self.recorded))
    missing = object()
    return [
      name
      for name in names
      if not _same(self.metrics.get(name, missing), self.recorded.get(name, missing))
    ]

  def non_finite(self) -> list[tuple[str, int, int, list[int]]]:
    """Returns (name, count of non-finite numbers, count of all, index of the first non-finite).

    Arrays are in the order in which an update reads and computes them; finite ones are left out.
    """
    kinds = {"parameter": self.params, "token": self.tokens, "gradient": self.grads}
    rows = []
    for kind, arrays in kinds.items():
      for name, values in arrays.items():
        mask = self.mask if kind == "token" else np.ones(values.shape, bool)
        indices = np.argwhere(~np.isfinite(values) & mask)
        if len(indices):
          rows.append((f"{kind} {name}", len(indices), int(mask.sum()), indices[0].tolist()))
    return rows


def replay(dump: dumps.Dump, run: Run | None = None) -> Replayed:
  """Runs the update of a dump again.

  Args:
    run: the run of the dump's config; None builds it.

  Raises:
    ConfigError: the config cannot be built on this machine.
  """
  c = configs.from_saved(dump.config, dump.path)
  compilation.use_cache(c.compilation_cache, dump.path.absolute().parents[1])
  r = build(c) if run is None else run
  base_params, like = r.base_params, r.initial_state()
  state, batch = dump.state(like), dump.batch(meshes.batch_sharding(r.mesh))
  del like
  config, options = update_config(c), {"with_adapters": r.with_adapters, "chunks": r.chunks}
  score = make_scoring(r.model, config, **options)
  # Log-ratios to teachers are in the batch already.
  teachers = [] if r.algorithm.teacher_divergence is None else r.loaded_teachers()
  options["value_head"] = r.critic if isinstance(r.critic, ValueHead) else None
  options["teachers"], frozen = in_the_loss(r.algorithm, base_params, teachers)
  gradients = make_gradients(r.model, r.algorithm, config, **options)
  update = make_update(r.model, r.algorithm, r.optimizer, r.schedule, config, **options)
  with r.matmul_precision():
    logp = np.asarray(score(state.params, batch, base_params))
    params = _named(state.params)
    grads, *_ = gradients(state.params, with_entropy_coef(state, batch), frozen)
    grads = _named(grads)
    state, metrics = update(state, batch, frozen)
  return Replayed(
    metrics={name: float(value) for name, value in metrics.items()},
    recorded=dump.recorded["metrics"],
    tokens=_per_token(logp, batch, r.algorithm),
    mask=np.asarray(batch.mask),
    params=params,
    grads=grads,
    state=state,
  )


def report(replayed: Replayed, recorded: dict[str, Any], tokens: int) -> str:
  """Returns the text of the command: metrics, non-finite numbers, and the worst tokens.

  Args:
    recorded: the record of the dump.
    tokens: number of tokens to show.
  """
  r, lines = replayed, [f"step {recorded['step']}, update {recorded['update']}"]
  differing = r.differing()
  lines += [
    f"  {name:42} {value:<14.8g}" + (f" recorded {r.recorded.get(name)}" * (name in differing))
    for name, value in r.metrics.items()
  ]
  same = "bit for bit as recorded"
  lines.append(f"equal: {'no: ' + ', '.join(differing) if differing else 'yes, ' + same}")
  rows = r.non_finite()
  lines.append(f"first non-finite: {rows[0][0]}, at {rows[0][3]}" if rows else _all_finite(r))
  lines += [f"  {name}: {bad} of {count}, first at {index}" for name, bad, count, index in rows]
  lines += ["", "worst tokens: prompt, completion, token"]
  lines.append(" " * 14 + "".join(f"{name:>14}" for name in r.tokens))
  for index in worst_tokens(r, tokens):
    cells = "".join(f"{values[index]:14.6g}" for values in r.tokens.values())
    lines.append(f"  {','.join(map(str, index)):12}{cells}")
  return "\n".join(lines)


def worst_tokens(replayed: Replayed, count: int) -> list[tuple[int, ...]]:
  """Returns the indices (prompt, completion, token) of the worst tokens.

  Tokens with the most non-finite numbers come first, then those with the largest weight in the
  loss.
  """
  t = replayed.tokens
  bad = sum((~np.isfinite(values)).astype(int) for values in t.values())
  with np.errstate(all="ignore"):
    size = np.nan_to_num(np.abs(t["ratio"] * t["advantages"] * t["weights"]))
  order = np.lexsort((-size.ravel(), -bad.ravel(), ~replayed.mask.ravel()))
  indices = [np.unravel_index(i, size.shape) for i in order[: min(count, replayed.mask.sum())]]
  return [tuple(int(i) for i in index) for index in indices]


def _all_finite(r: Replayed) -> str:
  largest = max(r.grads, key=lambda name: np.abs(r.grads[name]).max())
  return (
    "all parameters, tokens and gradients are finite; the largest gradient is "
    f"{np.abs(r.grads[largest]).max():.6g}, in {largest}"
  )


def _per_token(logp: np.ndarray, batch: Batch, algorithm: Algorithm) -> Named:
  """Returns what the loss of each token is computed from."""
  arrays = {name: np.asarray(a) for name, a in batch.arrays().items()}
  advantages = arrays["advantages"]
  advantages = advantages[..., None] if advantages.ndim == 2 else advantages
  names = ("weights", "sampler_logp", "ref_logp", "old_logp", "teacher_logp")
  inputs = {name: arrays[name] for name in names if name in arrays}
  with np.errstate(all="ignore"):
    anchor = "sampler_logp" if algorithm.anchor == "sampler" else "old_logp"
    ratio = np.exp(logp - arrays.get(anchor, logp))
  per_token = np.broadcast_to(advantages, logp.shape)
  return {"advantages": per_token, **inputs, "logp": logp, "ratio": ratio}


def _named(tree: Any) -> Named:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def _same(a: Any, b: Any) -> bool:
  return a == b or (a != a and b != b)


@contextlib.contextmanager
def _fetched(dump: str) -> Iterator[Path]:
  """Yields the folder of a dump, of one on a store a copy with the dumps beside it.

  Raises:
    ValueError: the store cannot be read, or has nothing there.
  """
  address = addresses.parse(dump)
  if isinstance(address, Path):
    yield address.expanduser()
    return
  parent, _, name = address.prefix.rpartition("/")
  if not parent:
    raise ValueError(f"{dump} is not a dump: give WORKDIR/skipped/NAME")
  with mirror.fetched(dataclasses.replace(address, prefix=parent)) as folder:
    yield folder / name


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.replay", description=__doc__)
  parser.add_argument("dump", help="a folder under WORKDIR/skipped/")
  parser.add_argument(
    "--tokens", type=configs.at_least(0), default=10, help="number of tokens to show"
  )
  arguments = parser.parse_args(argv)
  try:
    with _fetched(arguments.dump) as path:
      dump = dumps.read(path)
      replayed = replay(dump)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(report(replayed, dump.recorded, arguments.tokens))
  here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  changes = [f"{name} was {dump.recorded[name]}, here it is {value}" for name, value in here.items()
             if dump.recorded[name] != value]  # fmt: skip
  if changes:
    print("not the machine of the run: " + "; ".join(changes))
  return 1 if replayed.differing() else 0


if __name__ == "__main__":
  sys.exit(main())
