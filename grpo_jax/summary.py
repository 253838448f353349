"""Describes a run before its first step, with an estimate of the time it takes on this machine."""

import math
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.build import Run
from grpo_jax.config import function_name
from grpo_jax.models.io.weights import Weights

# Share of the FLOP/s of one large matmul that a whole step reaches, and share of the groups that
# are not zero-variance and take part in the update. Both vary between runs; the progress bar
# replaces the estimate by a measurement.
EFFICIENCY = 0.5
NONZERO_VARIANCE = 0.5


def describe(config: ConfigDict, run: Run, start: int) -> str:
  """Formats model, task, algorithm, sizes, devices and the remaining time as lines of text.

  Args:
    config: the config of the run.
    run: the run that was built from it.
    start: number of the first step to run.
  """
  c, m = config, run.model.config
  train, held_out = len(run.task.splits["train"]), len(run.task.splits["eval"])
  devices = run.mesh.devices
  evaluations = 2 + (c.steps // c.eval.every if c.eval.every else 0)
  flops = (c.steps - start) * step_flops(c, run) + evaluations * evaluation_flops(c, run)
  seconds = flops / (matmul_rate() * devices.size * EFFICIENCY)
  hardware = f"{devices.size} x {devices.flat[0].device_kind}"
  if c.mesh.slices > 1:
    hardware += f" in {c.mesh.slices} slices"
  rows = "completions of up to"
  if run.task.environment is not None:
    apart = "" if c.episode.in_step else ", each for itself,"
    rows = f"episodes of up to {c.episode.turns} turns{apart} and"
  return "\n".join(
    [
      f"model      {c.model.source}: {count_parameters(run.weights) / 1e6:.1f} M parameters, "
      f"{m.layers} layers",
      *(
        [
          f"critic     {configs.critic_source(c)}: "
          f"{count_parameters(run.critic_weights) / 1e6:.1f} M parameters and an optimizer"
        ]
        if run.critic_weights
        else ["critic     a value head on the trunk of the policy"]
        if run.critic
        else []
      ),
      *(
        f"teacher    {teacher.source}: {count_parameters(teacher.weights) / 1e6:.1f} M parameters"
        for teacher in run.teachers
      ),
      f"task       {run.task.name}: {train} training problems, {held_out} held out",
      *([f"           {run.task.note}"] if run.task.note else []),
      *([f"curriculum {_curriculum(c)}"] if run.curriculum else []),
      f"algorithm  {c.algorithm.name}: {run.algorithm.source}",
      f"each step  {c.rollout.prompts_per_step} prompts x {c.rollout.group_size} completions, "
      f"prompts of {run.sampler.prompt_length} and {rows} {c.rollout.completion_length} tokens",
      *([f"ahead      {_ahead(c, run)}"] if c.rollout.ahead else []),
      *([f"partial    {_partial(c)}"] if c.rollout.partial_tokens else []),
      f"steps      {start} to {c.steps} on {hardware}, about {format_duration(seconds)} by a speed "
      "probe",
      *([f"epochs     {_epochs(c, train)}"] if c.epochs else []),
    ]
  )


def _ahead(c: ConfigDict, run: Run) -> str:
  """Says how far sampling is ahead of the updates, and on which devices."""
  count, steps = c.rollout.ahead, "step" if c.rollout.ahead == 1 else "steps"
  apart = f", on {run.rollout_mesh.devices.size} devices of its own" * run.has_rollout_devices
  return f"sampling is {count} {steps} ahead of the updates{apart}"


def _partial(c: ConfigDict) -> str:
  """Says how completions go on in later steps."""
  r = c.rollout
  return (
    f"rounds of {r.partial_tokens} tokens of {r.prompts_per_step + r.partial_prompts} prompts, "
    "which go on in later steps"
  )


def _curriculum(c: ConfigDict) -> str:
  """Says how problems are drawn."""
  choice = c.data.curriculum
  name = choice if isinstance(choice, str) else function_name(choice)
  return f"{name}: problems are drawn by their pass rates, not in passes"


def _epochs(c: ConfigDict, problems: int) -> str:
  """Says how many steps the epochs take, and where the last step reaches."""
  drawn = c.steps * c.rollout.prompts_per_step
  beyond = drawn - math.floor(c.epochs * problems)
  text = f"{c.epochs:g} of {problems} problems take {c.steps} steps"
  return text + (f"; the last one draws {beyond} problems of the next epoch" if beyond else "")


def count_parameters(weights: Weights) -> int:
  """Returns the number of parameters of a model."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights.shapes))


def step_flops(config: ConfigDict, run: Run) -> float:
  """Estimates the FLOPs of one step: sampling, scoring by others, and the update.

  Per weight and token: 2 to sample, 6 to learn (8 if remat recomputes the layers), and 2 to score
  under a reference. A prompt is computed once per group in both, so its tokens count P times
  instead of P·G times, and need no output projection. Where no term but the advantages gives them a
  gradient, zero-variance groups are left out of the update.
  """
  c = config.rollout
  share = 1.0 if run.algorithm.every_group_learns or run.critic else NONZERO_VARIANCE
  learn = (8 if config.model.remat == "layers" else 6) * share
  score = 2 if run.algorithm.beta > 0 else 0
  if run.critic:
    score += 2
  if run.critic_weights:  # as large as the policy, or taken to be
    learn *= 2
  completions = c.prompts_per_step * c.group_size
  uses = _weight_uses(run, c.prompts_per_step, completions, c.completion_length)
  sizes = [count_parameters(teacher.weights) for teacher in run.teachers]
  teach = 2 * sum(sizes) / count_parameters(run.weights)
  return (2 + learn + score + teach) * uses


def evaluation_flops(config: ConfigDict, run: Run) -> float:
  """Estimates the FLOPs of one evaluation: the greedy completions and the samples for pass@k."""
  problems = len(run.task.splits["eval"])
  completions = problems * (1 + config.eval.samples)
  prefills = problems * (2 if config.eval.samples else 1)
  return 2 * _weight_uses(run, prefills, completions, config.rollout.completion_length)


def _weight_uses(run: Run, prompts: int, completions: int, length: int) -> float:
  """Returns the number of weights that multiply a token, summed over the tokens."""
  m = run.model.config
  head = m.vocab_size * m.width
  body = count_parameters(run.weights) - head * (1 if m.tied else 2)
  tokens = prompts * run.sampler.prompt_length + completions * (length - 1)
  return body * tokens + head * completions * length


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
  """Measures the FLOP/s of a large float32 matmul on one device, the best of several.

  Args:
    size: number of rows and columns of the matrices.
    repeats: number of measured matmuls.
  """
  x = jnp.ones((size, size))
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def format_duration(seconds: float) -> str:
  """Formats a time in seconds with its largest unit.

  >>> format_duration(90), format_duration(9000), format_duration(12.3)
  ('1.5 minutes', '2.5 hours', '12 seconds')
  """
  for unit, size in (("hours", 3600), ("minutes", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} seconds"
