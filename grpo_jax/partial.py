"""Lets completions go on in later steps, so that a long one does not hold up a step.

With `rollout.partial_tokens = n`, a step samples in rounds of up to n tokens of each completion,
until as many prompts as it needs are complete. The others stay, with all of their completions, and
go on in the next step under its parameters. So `rollout.partial_prompts` more prompts than a step
needs are under way at any time. A step takes the complete prompts that were begun first.

Prompts are numbered in the order in which they are begun. Number i is prompt i mod P of step i // P
of a run without partial rollouts, with the random stream that it has there. What a step samples is
a function of its parameters and of what it found, so a run gives the same bits again. A checkpoint
holds the completions that are under way.

The tokens of a completion may be from the parameters of several steps. Each keeps the log-prob that
it had when it was drawn, and `Batch.staleness` says how many steps ago that was.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.build import Run
from grpo_jax.learning.step import TrainState
from grpo_jax.models.protocol import Params
from grpo_jax.rollout import Rollout, assemble, score
from grpo_jax.sampling.partial import METRICS, PartialSampler, Parts, nothing
from grpo_jax.sampling.sampler import Generated
from grpo_jax.tasks.base import Example
from grpo_jax.tasks.rewards.workers import Scorer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """Holds the prompts that are under way, in the order of their numbers, in NumPy.

  Attributes:
    number: [C], number of each prompt.
    step: [C, G, T], step whose parameters drew each token.
    parts: their completions so far.
  """

  number: Int[np.ndarray, "C"]
  step: Int[np.ndarray, "C G T"]
  parts: Parts


class Pool:
  """Samples the rollouts of a run with `rollout.partial_tokens`.

  Args:
    run: the run.
  """

  def __init__(self, run: Run) -> None:
    self._run, r = run, run.config.rollout
    self._count, self._size = r.prompts_per_step, r.prompts_per_step + r.partial_prompts
    self._sampler = PartialSampler(run.sampler, r.partial_tokens)
    self._groups = self._new_groups(np.arange(0))
    self._examples = lru_cache(maxsize=64)(lambda step: run.examples(step)(0))

  def take(self, step: int, state: TrainState, scorer: Scorer) -> Rollout:
    """Returns the rollout of a step.

    Args:
      step: number of the step; all earlier ones were taken.
      state: the state before it.
      scorer: of this step.

    Raises:
      RewardError: as in `rollout.collect`. The completions stay, so that they can be saved and
        scored again.
    """
    run, sampler = self._run, self._run.sampler
    params = run.to_rollout_params(state.params)
    jax.block_until_ready(params)  # or the update before would count as sampling
    start, rounds = time.monotonic(), 0
    begun = step * self._count + len(self._groups.number)
    new = self._new_groups(np.arange(begun, step * self._count + self._size))
    self._groups = jax.tree.map(lambda *both: np.concatenate(both), self._groups, new)
    while self._complete().sum() < self._count:
      self._sample(step, params)
      rounds += 1
    rows = np.flatnonzero(self._complete())[: self._count]
    groups, sampled = jax.tree.map(lambda a: a[rows], self._groups), time.monotonic()
    out = self._generated(groups, step)
    examples = [self._example(number) for number in groups.number]
    scored = score(
      scorer, examples, out, step_rewards=run.rollout.step_rewards, tokenizer=sampler.tokenizer
    )
    seconds = {
      "time/sampling": sampled - start,
      "time/rewards": time.monotonic() - sampled,
    }
    rollout = assemble(lambda _: scored, sampler, run.rollout_at(step), seconds)
    self._groups = jax.tree.map(lambda a: np.delete(a, rows, axis=0), self._groups)
    carried = float((out.staleness[out.mask] > 0).mean())
    metrics = dict(zip(METRICS, (carried, float(rounds))))
    return dataclasses.replace(rollout, metrics=rollout.metrics | metrics)

  def saved(self) -> dict[str, np.ndarray]:
    """Returns the prompts that are under way, as arrays by name."""
    groups = self._groups
    return {"number": groups.number, "step": groups.step} | vars(groups.parts)

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """Takes up the prompts of a checkpoint."""
    if saved:
      arrays = dict(saved)
      number, step = arrays.pop("number"), arrays.pop("step")
      self._groups = Groups(number, step, Parts(**arrays))

  # --- parts --------------------------------------------------------------------------------------

  def _new_groups(self, numbers: Int[np.ndarray, "C"]) -> Groups:
    r = self._run.config.rollout
    shape = (len(numbers), r.group_size, r.completion_length)
    parts = nothing(*shape, self._run.sampler.tokenizer.pad_id)
    return Groups(numbers, np.zeros(shape, np.int32), parts)

  def _ended(self, parts: Parts) -> Bool[np.ndarray, "C G"]:
    """Returns whether completions ended by themselves."""
    return parts.state == len(self._run.sampler.table) - 1

  def _complete(self) -> Bool[np.ndarray, "C"]:
    """Returns whether all completions of a prompt have ended, or are as long as they may be."""
    parts = self._groups.parts
    return (self._ended(parts) | (parts.length >= parts.tokens.shape[-1])).all(-1)

  def _example(self, number: int) -> Example:
    step, row = divmod(int(number), self._count)
    return self._examples(step)[row]

  def _sample(self, step: int, params: Params) -> None:
    """Runs one round."""
    groups = self._groups
    prompts = [self._example(number).prompt for number in groups.number]
    steps, rows = np.divmod(groups.number, self._count)
    keys = jax.vmap(self._run.key)(steps)
    parts = self._sampler(params, prompts, keys, rows, groups.parts)
    is_new = np.arange(parts.tokens.shape[-1]) >= groups.parts.length[..., None]
    steps = np.where(is_new, step, groups.step)
    self._groups = Groups(groups.number, steps.astype(np.int32), parts)

  def _generated(self, groups: Groups, step: int) -> Generated:
    """Returns the completions of prompts that are complete."""
    sampler, parts = self._run.sampler, groups.parts
    prompts, prompt_mask = sampler.encode([self._example(n).prompt for n in groups.number])
    mask = np.arange(parts.tokens.shape[-1]) < parts.length[..., None]
    return Generated(
      prompts=prompts,
      prompt_mask=prompt_mask,
      tokens=parts.tokens,
      mask=mask,
      ended=self._ended(parts),
      logp=parts.logp,
      entropy=parts.entropy,
      texts=sampler.texts(parts.tokens, mask),
      temperature=sampler.temperature,
      staleness=np.where(mask, step - groups.step, 0).astype(np.float32),
    )
