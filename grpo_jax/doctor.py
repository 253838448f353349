"""Looks at a run and says what is wrong with it, why, and what to do next.

    python -m grpo_jax.doctor RUN            a run that goes on, has ended or was killed
    python -m grpo_jax.doctor --config X.py  an experiment, before it starts

A finding says how sure it is and shows its numbers. The exit code is 1 if one is sure, else 0.
`grpo_jax.diagnose` is the same for the arrays of one batch, from any trainer.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.doctor")

import jax

from grpo_jax import config as configs
from grpo_jax import testing
from grpo_jax.build import Run, build
from grpo_jax.core.diagnosis import Finding, by_confidence
from grpo_jax.core.losses import policy_loss
from grpo_jax.core.masks import token_weights
from grpo_jax.run import completions, console, mirror
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.health import History, examine
from grpo_jax.run.metrics import read_metrics
from grpo_jax.tokens import encode_prompt


def before(run: Run) -> list[Finding]:
  """Returns what is wrong with a config that builds, before anything is compiled."""
  return by_confidence(check(run) for check in CHECKS_BEFORE)


def _first_prompts(run: Run, count: int = 8) -> list[list[int]]:
  examples = [run.task.splits["train"][i] for i in range(min(count, len(run.task.splits["train"])))]
  return [encode_prompt(run.sampler.tokenizer, example.prompt) for example in examples]


def doubled_start(run: Run) -> Finding | None:
  """Finds prompts that begin with two start tokens."""
  bos = run.sampler.tokenizer.bos_id
  if bos is None or not any(ids[:2] == [bos, bos] for ids in _first_prompts(run)):
    return None
  return Finding(
    "doubled_start",
    f"prompts begin with the start token {bos} twice",
    "a chat template writes it and the tokenizer adds it again: the model never saw that",
    "take it out of the prompts of the task, or of the template",
    "sure",
    {"token": float(bos)},
  )


def closed_thought(run: Run) -> Finding | None:
  """Finds a chat template that ends the thought before the model has begun."""
  prompts = [run.sampler.tokenizer.decode(ids[-8:]) for ids in _first_prompts(run, 1)]
  if not any(text.rstrip().endswith("</think>") for text in prompts):
    return None
  return Finding(
    "closed_thought",
    "prompts end with </think>",
    "the chat template closes the thought, so that the model answers without thinking",
    "chat.arguments.enable_thinking=true if it should think",
    "possible",
  )


def no_groups(run: Run) -> Finding | None:
  """Finds groups that are too small to have two different rewards."""
  size, c = run.config.rollout.group_size, run.config
  if (
    size >= 4
    or c.rollout.given
    or run.algorithm.of_token_rewards
    or run.algorithm.every_group_learns
  ):
    return None
  return Finding(
    "no_groups",
    f"rollout.group_size is {size}",
    f"with a pass rate of 0.1, {(0.9**size + 0.1**size):.0%} of such groups have no two different "
    "rewards",
    f"8 or 16, with fewer prompts per step ({c.rollout.prompts_per_step} now)",
    "possible",
    {"group_size": float(size)},
  )


def idle_reference(run: Run) -> Finding | None:
  """Finds a KL term that is too small to matter."""
  beta = run.algorithm.beta
  if not 0 < beta < 1e-5:
    return None
  return Finding(
    "idle_reference",
    f"algorithm.beta is {beta:g}",
    "the KL term is too small to matter and costs a model in memory and a forward pass",
    "0, or 0.001 to 0.05",
    "likely",
    {"beta": beta},
  )


def changing_loss(run: Run) -> Finding | None:
  """Finds a loss of the run's own functions that a number of micro-batches or padding changes."""
  row = run.algorithm
  own = [name for name in OF_THE_LOSS if callable(getattr(row, name))]
  if not own or row.needs_entropy or row.teacher_weight > 0 or row.nll_weight > 0:
    return None  # other terms need arrays that these checks do not make
  arrays = ["old_logp"]
  arrays += ["ref_logp"] if row.beta > 0 else []
  arrays += ["sampler_logp"] if row.correction != "none" or row.anchor == "sampler" else []

  @jax.jit
  def loss(logp: jax.Array, advantages: jax.Array, mask: jax.Array, **more: jax.Array) -> jax.Array:
    return policy_loss(row, logp, advantages, mask, max_length=LENGTH, **more)[0]

  try:
    weights = partial(token_weights, average=row.average, max_length=LENGTH)
    testing.check_microbatches(loss, arrays=arrays, weights=weights)
    testing.check_padding(loss, arrays=arrays)
  except testing.Counterexample as error:
    return Finding(
      "changing_loss",
      f"with the functions of algorithm.{', '.join(own)}, this does not hold: {error.property} "
      f"({error.found})",
      "train.micro_batches, which should change only the memory, would change what is learned",
      "grpo_jax.testing shows the arrays; a sum over the batch inside the function is the usual "
      "reason",
      "sure",
    )
  return None


OF_THE_LOSS = ("ratio", "anchor", "trust_region", "kl", "correction", "average")
LENGTH = 8  # tokens; any number does
CHECKS_BEFORE: tuple[Callable[[Run], Finding | None], ...] = (
  doubled_start,
  closed_thought,
  no_groups,
  idle_reference,
  changing_loss,
)


# --- the command ----------------------------------------------------------------------------------


def of_run(workdir: str | Path) -> tuple[list[Finding], int]:
  """Returns the findings of a work directory, and its number of training steps.

  Raises:
    ValueError: the folder is no run, or a file in it is damaged.
  """
  with mirror.fetched(workdir, completions.files_of) as path:
    saved = workdirs.read_config(path)
    if saved is None:
      raise ValueError(f"{path} holds no {workdirs.CONFIG}: not a work directory")
    config = configs.from_saved(saved, path / workdirs.CONFIG)
    try:
      rows = read_metrics(path)
    except FileNotFoundError:
      rows = []
    found = [*examine(rows, config), *completions.examine(path)]
  return by_confidence(found), History(rows, config).steps


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.doctor", description=__doc__)
  parser.add_argument("run", nargs="?", help="a work directory")
  parser.add_argument("--config", help="an experiment file, before it starts")
  arguments, overrides = parser.parse_known_args(argv)
  if (arguments.run is None) == (arguments.config is None):
    print("error: give either a work directory or --config", file=sys.stderr)
    return 2
  try:
    if arguments.config:
      findings, steps = before(build(configs.load(arguments.config, overrides))), None
    else:
      findings, steps = of_run(arguments.run)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if steps is not None:
    print(f"{arguments.run}, {steps} steps")
  print("\n\n".join(map(str, findings)) or "nothing found")
  return int(any(f.confidence == "sure" for f in findings))


if __name__ == "__main__":
  sys.exit(main())
