"""A skipped update once more, and where its numbers went wrong.

`python -m grpo_jax.replay WORKDIR/skipped/step_000012_update_0 [--tokens 10]` reads the state and
the batch of the dump, makes the update again with the program of the run, and says whether it
comes out the same, bit for bit. Exit code 0 if so, 1 if not, 2 for a mistake.
"""

import argparse
import dataclasses
import sys
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.replay")

import jax
import numpy as np

from grpo_jax import config as configs
from grpo_jax.build import Run, build, update_config
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.step import TrainState
from grpo_jax.learning.updates import make_gradients, make_scoring, make_update
from grpo_jax.run import compilation, console
from grpo_jax.run import skipped as dumps

Named = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Replayed:
  """An update made again.

  Attributes:
    metrics: what came out, with loss and grad_norm.
    recorded: what the run saw.
    tokens: per-token numbers by name, [P, G, T], in the order in which they are computed.
    mask: [P, G, T], the tokens that count.
    params, grads: trained parameters and their gradients by name.
    state: what the update left.
  """

  metrics: dict[str, float]
  recorded: dict[str, float]
  tokens: Named
  mask: np.ndarray
  params: Named
  grads: Named
  state: TrainState

  def differing(self) -> list[str]:
    """Metrics that are not the recorded ones, bit for bit (a NaN is a NaN)."""
    names = sorted(set(self.metrics) | set(self.recorded))
    none = object()
    return [
      name
      for name in names
      if not _same(self.metrics.get(name, none), self.recorded.get(name, none))
    ]

  def stages(self) -> list[tuple[str, int, int, list[int]]]:
    """(name, numbers that are not finite, how many there are, where the first one is).

    In the order in which an update reads and computes them, without those that are all finite.
    """
    kinds = {"parameter": self.params, "token": self.tokens, "gradient": self.grads}
    found = []
    for kind, named in kinds.items():
      for name, values in named.items():
        mask = self.mask if kind == "token" else np.ones(values.shape, bool)
        bad = np.argwhere(~np.isfinite(values) & mask)
        if len(bad):
          found.append((f"{kind} {name}", len(bad), int(mask.sum()), bad[0].tolist()))
    return found


def replay(dump: dumps.Dump, run: Run | None = None) -> Replayed:
  """Makes the update of a dump again. Errors: ConfigError where the config cannot be built here."""
  c = configs.from_saved(dump.config)
  compilation.use_cache(c.compilation_cache, dump.path.absolute().parents[1])
  r = build(c) if run is None else run
  base_params, like = r.base_params, r.initial_state()
  state, batch = dump.state(like), dump.batch(meshes.batch_sharding(r.mesh))
  del like
  config, options = update_config(c), {"with_adapters": r.with_adapters, "chunks": r.chunks}
  score = make_scoring(r.model, config, **options)
  gradients = make_gradients(r.model, r.algorithm, config, **options)
  update = make_update(r.model, r.algorithm, r.optimizer, r.schedule, config, **options)
  with r.matmul_precision():
    logp = np.asarray(score(state.params, batch, base_params))
    params = _named(state.params)
    grads, *_ = gradients(state.params, batch, base_params)
    grads = _named(grads)
    state, metrics = update(state, batch, base_params)
  return Replayed(
    metrics={name: float(value) for name, value in metrics.items()},
    recorded=dump.recorded["metrics"],
    tokens=_per_token(logp, batch),
    mask=np.asarray(batch.mask),
    params=params,
    grads=grads,
    state=state,
  )


def report(replayed: Replayed, recorded: dict[str, Any], tokens: int) -> str:
  """What is printed: the numbers, the first that is not finite, the worst tokens, gradients."""
  r, lines = replayed, [f"step {recorded['step']}, update {recorded['update']}"]
  differing = r.differing()
  lines += [
    f"  {name:42} {value:<14.8g}" + (f" recorded {r.recorded.get(name)}" * (name in differing))
    for name, value in r.metrics.items()
  ]
  same = "bit for bit what was recorded"
  lines.append(f"equal: {'no: ' + ', '.join(differing) if differing else 'yes, ' + same}")
  stages = r.stages()
  lines.append(f"first not finite: {stages[0][0]}, at {stages[0][3]}" if stages else _all_finite(r))
  lines += [f"  {name}: {bad} of {count}, first at {at}" for name, bad, count, at in stages]
  lines += ["", "worst tokens: prompt, completion, token"]
  lines.append(" " * 14 + "".join(f"{name:>14}" for name in r.tokens))
  for place in worst_tokens(r, tokens):
    cells = "".join(f"{values[place]:14.6g}" for values in r.tokens.values())
    lines.append(f"  {','.join(map(str, place)):12}{cells}")
  return "\n".join(lines)


def worst_tokens(replayed: Replayed, count: int) -> list[tuple[int, ...]]:
  """Tokens with the most numbers that are not finite, then those that weigh most in the loss."""
  t = replayed.tokens
  bad = sum((~np.isfinite(values)).astype(int) for values in t.values())
  with np.errstate(all="ignore"):
    size = np.nan_to_num(np.abs(t["ratio"] * t["advantages"] * t["weights"]))
  order = np.lexsort((-size.ravel(), -bad.ravel(), ~replayed.mask.ravel()))
  found = [np.unravel_index(i, size.shape) for i in order[: min(count, replayed.mask.sum())]]
  return [tuple(int(i) for i in place) for place in found]


def _all_finite(r: Replayed) -> str:
  largest = max(r.grads, key=lambda name: np.abs(r.grads[name]).max())
  return (
    "all parameters, tokens and gradients are finite; the largest gradient is "
    f"{np.abs(r.grads[largest]).max():.6g}, in {largest}"
  )


def _per_token(logp: np.ndarray, batch: Batch) -> Named:
  """What the loss of each token is made of."""
  held = {name: np.asarray(a) for name, a in batch.arrays().items()}
  advantages = held["advantages"]
  advantages = advantages[..., None] if advantages.ndim == 2 else advantages
  inputs = {n: held[n] for n in ("weights", "sampler_logp", "ref_logp", "old_logp") if n in held}
  with np.errstate(all="ignore"):
    ratio = np.exp(logp - held.get("old_logp", logp))
  spread = np.broadcast_to(advantages, logp.shape)
  return {"advantages": spread, **inputs, "logp": logp, "ratio": ratio}


def _named(tree: Any) -> Named:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def _same(a: Any, b: Any) -> bool:
  return a == b or (a != a and b != b)


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.replay", description=__doc__)
  parser.add_argument("dump", help="a folder that a run left under WORKDIR/skipped/")
  parser.add_argument("--tokens", type=int, default=10, help="tokens to show")
  arguments = parser.parse_args(argv)
  try:
    dump = dumps.read(arguments.dump)
    replayed = replay(dump)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(report(replayed, dump.recorded, arguments.tokens))
  here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  other = [f"{name} {dump.recorded[name]}, here {it}" for name, it in here.items()
           if dump.recorded[name] != it]  # fmt: skip
  if other:
    print("the run had another " + "; ".join(other))
  return 1 if replayed.differing() else 0


if __name__ == "__main__":
  sys.exit(main())
