"""Evaluation: greedy accuracy and unbiased pass@k, with standard errors.

python -m grpo_jax.evaluate --workdir DIR                        # a trained run
python -m grpo_jax.evaluate --config experiments/X.py            # its model, untrained
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.rollout import Sampler, accuracy, columns_of, ended, records
from grpo_jax.tasks.base import Example, Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Numbers by name (each `x` with its standard error `x_se`), and the completions behind them."""

  metrics: dict[str, float]
  samples: list[dict[str, Any]]


def evaluate(
  sampler: Sampler,
  params: Any,
  task: Task,
  examples: Sequence[Example],
  *,
  samples: int = 0,
  temperature: float = 1.0,
  batch_prompts: int = 50,
  key: jax.Array | None = None,
) -> Evaluation:
  """Greedy accuracy, and pass@k for k = 1, 2, 4, ... up to `samples`.

  Accuracy is the task's strict rule, 1.0 or nothing. Standard errors are over problems. The last
  batch is filled up with repeated prompts that are not counted, so one program does.

  Args:
    params: in the sampler's layout.
    samples: completions per problem for pass@k at `temperature`; 0 = greedy only.
    key: random key for them.
  """
  right, lengths, stopped, kept = _answers(
    sampler, params, task, examples, 1, 0.0, batch_prompts, jax.random.key(0)
  )
  metrics = {
    "eval/n": float(len(examples)),
    "eval/accuracy": float(right.mean()),
    "eval/accuracy_se": standard_error(right[:, 0]),
    "eval/mean_length": float(lengths.mean()),
    "eval/clipped_ratio": float(1.0 - stopped.mean()),
  }
  if samples:
    key = jax.random.key(0) if key is None else key
    right, _, _, more = _answers(
      sampler, params, task, examples, samples, temperature, batch_prompts, key
    )
    kept += more
    for k in (2**i for i in range(samples.bit_length())):
      passed = np.array([pass_at_k(samples, int(c), k) for c in right.sum(-1)])
      metrics[f"eval/pass@{k}"] = float(passed.mean())
      metrics[f"eval/pass@{k}_se"] = standard_error(passed)
  return Evaluation(metrics, kept)


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Unbiased chance that one of k samples is right, from `correct` right ones of n.

  `1 - C(n - c, k) / C(n, k)`; Chen et al. 2021, arXiv 2107.03374, eq. 1.

  >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
  (0.25, 0.5, 1.0)
  """
  if not 1 <= k <= n or not 0 <= correct <= n:
    raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def standard_error(values: np.ndarray) -> float:
  """Standard error of the mean of independent values; NaN for fewer than two."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _answers(sampler, params, task, examples, group, temperature, batch_prompts, key):
  """(right [n, G], lengths [n, G], ended [n, G], samples) over all examples, in order."""
  right, lengths, stopped, kept = [], [], [], []
  for start in range(0, len(examples), batch_prompts):
    part = list(examples[start : start + batch_prompts])
    filled = part + [part[-1]] * (batch_prompts - len(part))
    prompts = [example.prompt for example in filled]
    out = sampler(params, prompts, key, group=group, temperature=temperature, first_prompt=start)
    n = len(part)
    correct = accuracy(task, prompts[:n], out.texts[:n], columns_of(part))
    size = out.mask[:n].sum(-1)
    right.append(correct)
    lengths.append(size)
    stopped.append(ended(out, sampler)[:n])
    kept += records(prompts[:n], out.texts[:n], accuracy=correct, length=size)
  return *map(np.concatenate, (right, lengths, stopped)), kept


def table(metrics: dict[str, float], title: str) -> str:
  """Metrics with standard errors as lines of text."""
  lines = [f"{title} (n = {metrics['eval/n']:.0f} problems)"]
  for name, value in metrics.items():
    if name.endswith("_se") or name == "eval/n":
      continue
    error = metrics.get(f"{name}_se")
    shown = f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    lines.append(f"  {name.removeprefix('eval/'):<16} {shown}")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  from ml_collections import ConfigDict

  from grpo_jax import checkpoint, config
  from grpo_jax.build import build

  parser = argparse.ArgumentParser(prog="python -m grpo_jax.evaluate", description=__doc__)
  parser.add_argument("--workdir", help="a work directory: its config, and its newest checkpoint")
  parser.add_argument("--config", help="an experiment file, for its model before training")
  parser.add_argument("--samples", type=int, default=8, help="completions per problem for pass@k")
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  arguments, overrides = parser.parse_known_args(argv)
  try:
    if (arguments.workdir is None) == (arguments.config is None):
      raise ValueError("give --workdir (a run) or --config (an experiment), one of them")
    if arguments.config:
      settings = config.load(arguments.config, overrides)
    else:
      saved = checkpoint.read_config(arguments.workdir)
      if saved is None:
        raise ValueError(f"{arguments.workdir} holds no {checkpoint.CONFIG}: not a work directory")
      settings = config.override(ConfigDict(saved), overrides)
    run = build(settings)
    state, step = run.initial_state(), None
    if arguments.workdir:
      with checkpoint.Checkpoints(arguments.workdir, settings.checkpoint.keep) as checkpoints:
        step = checkpoints.latest()
        if step is None:
          raise ValueError(f"{arguments.workdir} holds no complete checkpoint")
        state = checkpoints.restore(step, state)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  result = evaluate(
    run.sampler,
    run.for_sampling()(state.params),
    run.task,
    run.task.splits["eval"],
    samples=arguments.samples,
    temperature=settings.rollout.temperature,
    batch_prompts=settings.eval.batch_prompts,
    key=jax.random.key(settings.seed),
  )
  if arguments.json:
    print(json.dumps(result.metrics))
  else:
    where = settings.model.source if step is None else f"{arguments.workdir} after {step} steps"
    print(table(result.metrics, f"{where} on {run.task.name}, held out"))
  return 0


if __name__ == "__main__":
  sys.exit(main())
