"""What a run is about to do, and about how long that takes here."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from grpo_jax.build import Run

# Share of the rate of one large matrix product that a whole step reaches, and share of the groups
# that have a signal and take part in the update. Both vary: the progress bar measures.
EFFICIENCY = 0.5
INFORMATIVE = 0.5


def describe(config: ConfigDict, run: Run, start: int) -> str:
  """Model, task, algorithm, sizes, devices, and the time that is left, as a few lines of text."""
  c, m = config, run.model.config
  train, held_out = len(run.task.splits["train"]), len(run.task.splits["eval"])
  devices = run.mesh.devices
  evaluations = 2 + (c.steps // c.eval.every if c.eval.every else 0)
  operations = (c.steps - start) * step_flops(c, run) + evaluations * evaluation_flops(c, run)
  seconds = operations / (matmul_rate() * devices.size * EFFICIENCY)
  place = f"{devices.size} x {devices.flat[0].device_kind}"
  return "\n".join(
    [
      f"model      {c.model.source}: {weights(run) / 1e6:.1f} M parameters, {m.layers} layers",
      f"task       {run.task.name}: {train} problems to train on, {held_out} held out",
      f"algorithm  {c.algorithm.name}: {run.algorithm.source}",
      f"each step  {c.rollout.prompts_per_step} prompts x {c.rollout.group_size} completions, "
      f"prompts of {run.sampler.prompt_length} and completions of up to "
      f"{c.rollout.completion_length} tokens",
      f"steps      {start} to {c.steps} on {place}, about {duration(seconds)} by a speed probe",
    ]
  )


def weights(run: Run) -> int:
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(run.weights.shapes))


def step_flops(config: ConfigDict, run: Run) -> float:
  """Operations of one step: 2 per weight and token to generate, 6 to learn (8 to recompute layers).

  A prompt is computed once per group in both, so its tokens count P times and not P·G times, and
  they need no output projection. Without a KL term only groups with a signal are learned from.
  """
  c = config.rollout
  kept = 1.0 if run.algorithm.beta > 0 else INFORMATIVE
  learn = (8 if config.model.remat == "layers" else 6) * kept + (2 if run.algorithm.beta > 0 else 0)
  return (2 + learn) * _weight_tokens(
    run, c.prompts_per_step, c.prompts_per_step * c.group_size, c.completion_length
  )


def evaluation_flops(config: ConfigDict, run: Run) -> float:
  """Operations of one evaluation: the greedy answers, and the samples for pass@k."""
  problems = len(run.task.splits["eval"])
  answers = problems * (1 + config.eval.samples)
  prefills = problems * (2 if config.eval.samples else 1)
  return 2 * _weight_tokens(run, prefills, answers, config.rollout.completion_length)


def _weight_tokens(run: Run, prompts: int, completions: int, length: int) -> float:
  """Sum over tokens of the weights each of them meets."""
  m = run.model.config
  head = m.vocab_size * m.width
  body = weights(run) - head * (1 if m.tied else 2)
  tokens = prompts * run.sampler.prompt_length + completions * (length - 1)
  return body * tokens + head * completions * length


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
  """Operations per second of a large float32 matrix product on one device, the best of a few."""
  x = jnp.ones((size, size))
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    began = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best


def duration(seconds: float) -> str:
  """`90` -> `1.5 minutes`."""
  for unit, size in (("hours", 3600), ("minutes", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} seconds"
