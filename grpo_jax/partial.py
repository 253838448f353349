"""Lets completions go on in later steps, so that a long one does not hold up a step.

With `rollout.partial_tokens = n`, a step samples in rounds of up to n tokens of each completion,
until as many prompts as it needs are complete. The others stay, with all of their completions, and
go on in the next step under its parameters. So `rollout.partial_prompts` more prompts than a step
needs are under way at any time. A step takes the complete prompts that were begun first.

Prompts are numbered in the order in which they are begun. Number i is prompt i mod P of step i // P
of a run without partial rollouts, with the random stream that it has there. What a step samples is
a function of its parameters and of what it found, so a run gives the same bits again. A checkpoint
holds the completions that are under way. `partial_episodes.py` holds episodes of several turns.

The tokens of a completion may be from the parameters of several steps. Each keeps the log-prob that
it had when it was drawn, and `Batch.staleness` says how many steps ago that was.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.build import Run
from grpo_jax.episodes import EpisodeSampler
from grpo_jax.learning.step import TrainState
from grpo_jax.models.protocol import Params
from grpo_jax.partial_episodes import EpisodesUnderWay
from grpo_jax.rollout import Rollout, assemble, score
from grpo_jax.sampling.partial import METRICS, PartialSampler, Parts, nothing
from grpo_jax.sampling.sampler import Generated, Sampler
from grpo_jax.tasks.base import Example
from grpo_jax.tasks.rewards.workers import Scorer

# Random keys [n] of prompts, and their numbers in their steps.
Stream = tuple[jax.Array, Int[np.ndarray, "n"]]


class UnderWay(Protocol):
  """Holds the prompts that are under way, in the order of their numbers."""

  @property
  def numbers(self) -> Int[np.ndarray, "C"]:
    """Numbers of the prompts."""

  @property
  def complete(self) -> Bool[np.ndarray, "C"]:
    """Tells of each prompt whether all completions have ended, or are as long as they may be."""

  def begin(self, numbers: Int[np.ndarray, "n"]) -> None:
    """Begins the completions of more prompts."""

  def sample(self, step: int, params: Params) -> None:
    """Runs one round."""

  def generated(self, places: Int[np.ndarray, "R"], step: int) -> Generated:
    """Returns the completions of prompts that are complete."""

  def drop(self, places: Int[np.ndarray, "R"]) -> None:
    """Drops prompts."""

  def saved(self) -> dict[str, np.ndarray]:
    """Returns the prompts as arrays by name."""

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """Takes up the prompts of a checkpoint."""

  def close(self) -> None:
    """Ends what plays them."""


class Pool:
  """Samples the rollouts of a run with `rollout.partial_tokens`.

  Args:
    run: the run.
  """

  def __init__(self, run: Run) -> None:
    self._run, r = run, run.config.rollout
    self._count, self._size = r.prompts_per_step, r.prompts_per_step + r.partial_prompts
    self._examples = lru_cache(maxsize=64)(lambda step: run.examples(step)(0))
    what = (run.sampler, r.group_size, self._example, self._stream)
    self._under_way: UnderWay = (
      EpisodesUnderWay(*what)
      if isinstance(run.sampler, EpisodeSampler)
      else CompletionsUnderWay(*what, budget=r.partial_tokens)
    )

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
    run, sampler, under_way = self._run, self._run.sampler, self._under_way
    params = run.to_rollout_params(state.params)
    jax.block_until_ready(params)  # or the update before would count as sampling
    start, rounds = time.monotonic(), 0
    begun = step * self._count + len(under_way.numbers)
    under_way.begin(np.arange(begun, step * self._count + self._size))
    while under_way.complete.sum() < self._count:
      under_way.sample(step, params)
      rounds += 1
    places = np.flatnonzero(under_way.complete)[: self._count]
    sampled = time.monotonic()
    examples = [self._example(number) for number in under_way.numbers[places]]
    out = under_way.generated(places, step)
    scored = score(
      scorer, examples, out, step_rewards=run.rollout.step_rewards, tokenizer=sampler.tokenizer
    )
    seconds = {
      "time/sampling": sampled - start,
      "time/rewards": time.monotonic() - sampled,
    }
    rollout = assemble(lambda _: scored, sampler, run.rollout_at(step), seconds)
    under_way.drop(places)
    carried = float((out.staleness[out.mask] > 0).mean())
    metrics = dict(zip(METRICS, (carried, float(rounds))))
    return dataclasses.replace(rollout, metrics=rollout.metrics | metrics)

  def saved(self) -> dict[str, np.ndarray]:
    """Returns the prompts that are under way, as arrays by name."""
    return self._under_way.saved()

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """Takes up the prompts of a checkpoint."""
    if saved:
      self._under_way.restore(saved)

  def close(self) -> None:
    """Ends what plays the prompts under way."""
    self._under_way.close()

  def _example(self, number: int) -> Example:
    step, row = divmod(int(number), self._count)
    return self._examples(step)[row]

  def _stream(self, numbers: Int[np.ndarray, "n"]) -> Stream:
    steps, rows = np.divmod(numbers, self._count)
    return jax.vmap(self._run.key)(steps), rows


class CompletionsUnderWay:
  """Holds single completions that are under way, in NumPy.

  Args:
    sampler: samples them.
    group: completions per prompt, G.
    example: number of a prompt -> its example.
    stream: numbers of prompts -> their random keys, and their numbers in their steps.
    budget: tokens that a round adds to each completion at most.
  """

  def __init__(
    self,
    sampler: Sampler,
    group: int,
    example: Callable[[int], Example],
    stream: Callable[[Int[np.ndarray, "n"]], Stream],
    budget: int,
  ) -> None:
    self._single, self._example, self._stream = sampler, example, stream
    self._shape = (group, sampler.completion_length)
    self._sampler = PartialSampler(sampler, budget)
    self._groups = self._new_groups(np.arange(0))

  @property
  def numbers(self) -> Int[np.ndarray, "C"]:
    """See `UnderWay.numbers`."""
    return self._groups.number

  @property
  def complete(self) -> Bool[np.ndarray, "C"]:
    """See `UnderWay.complete`."""
    parts = self._groups.parts
    return (self._ended(parts) | (parts.length >= parts.tokens.shape[-1])).all(-1)

  def begin(self, numbers: Int[np.ndarray, "n"]) -> None:
    """See `UnderWay.begin`."""
    new = self._new_groups(numbers)
    self._groups = jax.tree.map(lambda *both: np.concatenate(both), self._groups, new)

  def sample(self, step: int, params: Params) -> None:
    """See `UnderWay.sample`."""
    groups = self._groups
    prompts = [self._example(number).prompt for number in groups.number]
    parts = self._sampler(params, prompts, *self._stream(groups.number), groups.parts)
    is_new = np.arange(parts.tokens.shape[-1]) >= groups.parts.length[..., None]
    steps = np.where(is_new, step, groups.step)
    self._groups = Groups(groups.number, steps.astype(np.int32), parts)

  def generated(self, places: Int[np.ndarray, "R"], step: int) -> Generated:
    """See `UnderWay.generated`."""
    groups = jax.tree.map(lambda a: a[places], self._groups)
    sampler, parts = self._single, groups.parts
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

  def drop(self, places: Int[np.ndarray, "R"]) -> None:
    """See `UnderWay.drop`."""
    self._groups = jax.tree.map(lambda a: np.delete(a, places, axis=0), self._groups)

  def saved(self) -> dict[str, np.ndarray]:
    """See `UnderWay.saved`."""
    groups = self._groups
    return {"number": groups.number, "step": groups.step} | vars(groups.parts)

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """See `UnderWay.restore`."""
    arrays = dict(saved)
    number, step = arrays.pop("number"), arrays.pop("step")
    self._groups = Groups(number, step, Parts(**arrays))

  def close(self) -> None:
    """Does nothing: no process plays them."""

  def _new_groups(self, numbers: Int[np.ndarray, "C"]) -> "Groups":
    shape = (len(numbers), *self._shape)
    parts = nothing(*shape, self._single.tokenizer.pad_id)
    return Groups(numbers, np.zeros(shape, np.int32), parts)

  def _ended(self, parts: Parts) -> Bool[np.ndarray, "C G"]:
    """Returns whether completions ended by themselves."""
    return parts.state == len(self._single.table) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """Holds the prompts of `CompletionsUnderWay`.

  Attributes:
    number: [C], number of each prompt.
    step: [C, G, T], step whose parameters drew each token.
    parts: their completions so far.
  """

  number: Int[np.ndarray, "C"]
  step: Int[np.ndarray, "C G T"]
  parts: Parts
