"""Examples -> completions -> rewards -> a batch: the seam between host and device.

Besides `sampler.py` and `metrics.py`, arrays cross between host and device here and nowhere else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from grpo_jax.core.advantages import ADVANTAGES, multi_objective, process_advantages
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.checks import lookup
from grpo_jax.core.masks import token_weights
from grpo_jax.distributed import hosts
from grpo_jax.learning import deterministic
from grpo_jax.learning.batch import laid_out, rows_of, select, trim
from grpo_jax.learning.step import Batch
from grpo_jax.sampling.sampler import Generated, Sampler
from grpo_jax.statistics import has_variance, rollout_metrics
from grpo_jax.tasks.base import Example, Prompt, StepRewards
from grpo_jax.tasks.indexed import Indexed
from grpo_jax.tasks.rewards.workers import Scorer, Scores
from grpo_jax.tokens import AnyTokenizer, encode_prompt, encode_prompts


@dataclasses.dataclass(frozen=True)
class Scored:
  """Completions of some prompts and what they earned.

  Attributes:
    prompts: [P], text or chat messages.
    step_rewards, step_ends: [P, G, S], from a task that rewards steps: reward (NaN = no such step)
      and index of the last token of each step.
  """

  prompts: list[Prompt]
  out: Generated
  scores: Scores
  step_rewards: Float[np.ndarray, "P G S"] | None = None
  step_ends: Int[np.ndarray, "P G S"] | None = None


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A batch to learn from, and what to write down about it.

  Attributes:
    batch: on the device.
    scored: all completions that were sampled for it on this host.
    num_tokens: prompt tokens (each prompt once) and completion tokens, of all hosts.
    measured: metrics of the rollout by name, over all hosts.
    samples: one dict a completion, of all hosts.
  """

  batch: Batch
  scored: Scored
  num_tokens: int
  measured: dict[str, float]
  samples: list[dict[str, Any]]


def collect(
  sampler: Sampler,
  params: Any,
  scorer: Scorer,
  draw: Callable[[int], Sequence[Example]],
  key: jax.Array,
  *,
  group: int,
  temperature: float,
  algorithm: Algorithm,
  pad_prompts_to_multiple: int,
  reward_weights: Sequence[float] = (),
  step_rewards: StepRewards | None = None,
  max_resamples: int = 0,
  mask_truncated: bool = False,
) -> Rollout:
  """Samples G completions of each example, scores them and turns rewards into advantages.

  Prompts whose advantages are all 0 have no gradient. Where there is no KL term to give them one,
  they are left out of the batch, which is then filled up to a multiple of `pad_prompts_to_multiple` prompts with
  empty ones: the update costs less and is the same, because the token weights are made before.
  For the same reason the padding is cut off that all of its prompts and completions share.

  Args:
    draw: resample number -> the examples of this host, P over all; 0 gives those of the step.
    reward_weights: of each reward function, for the advantage `multi_objective`.
    step_rewards: the task's, for the advantage `process_advantages`.
    max_resamples: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts whose rewards are
      all equal are replaced by those of up to this many further draws. Where they do not suffice,
      some of the prompts without a signal stay, so that P never changes.
    mask_truncated: completions that ran into the budget count in their group's statistics and
      have no tokens in the loss (DAPO's overlong filtering, section 3.4).
  """
  sample = partial(
    _sample, sampler, params, scorer, draw, key=key, group=group, temperature=temperature,
    step_rewards=step_rewards,
  )  # fmt: skip
  scored, resamples = sample(0), 0
  seen, order = _numbers(scored, 1)
  count = len(order)
  while resamples < max_resamples and has_variance(seen["total"]).sum() < count:
    resamples += 1
    scored = _joined(scored, sample(resamples))
    seen, order = _numbers(scored, resamples + 1)
  spread = has_variance(seen["total"])
  measured = _measure(seen)
  if max_resamples:
    measured |= {"dynamic_sampling/kept": spread.mean(), "dynamic_sampling/resamples": resamples}
  rows = np.sort(np.argsort(~spread, kind="stable")[:count]) if resamples else np.arange(count)
  batch, signal = make_batch(
    scored, order[rows], sampler, algorithm, reward_weights, mask_truncated=mask_truncated
  )
  if algorithm.beta == 0:
    rows = rows[signal]
    batch = select(batch, np.flatnonzero(signal), pad_prompts_to_multiple)
  batch, measured["update/padded"] = trim(batch, seen["prompt_tokens"][rows], seen["lengths"][rows])
  samples = hosts.gathered_json(
    records(
      scored.prompts,
      scored.out.texts,
      reward=scored.scores.total,
      accuracy=scored.scores.accuracy,
      length=scored.out.lengths,
    )
  )
  return Rollout(
    batch=batch,
    scored=scored,
    num_tokens=int(seen["prompt_tokens"].sum() + seen["lengths"].sum()),
    measured=measured,
    samples=[samples[p * group + g] for p in order for g in range(group)],
  )


def _numbers(scored: Scored, draws: int) -> tuple[dict[str, Any], Int[np.ndarray, "P"]]:
  """What metrics and the choice of prompts need, of all hosts, and the order of their prompts.

  What hosts hold stands one host after another. Prompts are numbered draw after draw, whatever the
  number of hosts: prompt i of the first result is number `order[i]` of what stands like that.
  """
  out, scores = scored.out, scored.scores
  seen = hosts.gathered(
    **{f"rewards/{name}": values for name, values in scores.per_name.items()},
    total=scores.total,
    accuracy=scores.accuracy,
    lengths=out.lengths,
    ended=out.ended,
    entropy=out.entropy.sum(-1, dtype=np.float64),
    prompt_tokens=out.prompt_mask.sum(-1),
    missing=np.array([scores.missing]),
  )
  missing = int(seen.pop("missing").sum())
  order = np.arange(len(seen["total"])).reshape(hosts.own_shard()[1], draws, -1)
  order = order.swapaxes(0, 1).reshape(-1)
  return {name: values[order] for name, values in seen.items()} | {"missing": missing}, order


def make_batch(
  scored: Scored,
  rows: Int[np.ndarray, "P"],
  sampler: Sampler,
  algorithm: Algorithm,
  reward_weights: Sequence[float] = (),
  *,
  mask_truncated: bool = False,
) -> tuple[Batch, Bool[np.ndarray, "P"]]:
  """Everything that an update needs, on the device, and which of its prompts have a gradient.

  Statistics over more than a group, and the token weights, are of all prompts on all hosts: they
  are computed from global arrays. A group lies whole on one host.

  Args:
    rows: the prompts of the batch, as indices into those of all hosts, one host after another.
  """
  out, scores = scored.out, scored.scores
  rewards = {
    "multi_objective": lambda: (np.stack([*scores.per_name.values()], -1),),
    "process_advantages": lambda: _same_width(scored.step_rewards, scored.step_ends),
  }.get(algorithm.advantage, lambda: (scores.total,))()
  host = {
    "batch": (out.prompts, out.prompt_mask, out.tokens, out.mask, out.logp),
    "ended": out.ended | (not mask_truncated),
    "rewards": tuple(a.astype(np.float32) if a.dtype == np.float64 else a for a in rewards),
  }
  layout = sampler.prompt_sharding
  weights = np.asarray(reward_weights, np.float32)
  everything = hosts.to_global(host, layout)
  chosen = None if len(rows) == everything["ended"].shape[0] else rows
  length, replicated = sampler.completion_length, sampler.chunks is not None
  batch, signal = _batch(everything, chosen, weights, algorithm, length, layout, replicated)
  return batch, np.asarray(signal)


@partial(jax.jit, static_argnames=("algorithm", "max_length", "layout", "replicated"))
def _batch(
  everything,
  rows,
  reward_weights,
  algorithm: Algorithm,
  max_length: int,
  layout: Any,
  replicated: bool,
):
  if rows is not None:
    everything = rows_of(everything, rows, layout)
  prompts, prompt_mask, completions, sampled, logp = everything["batch"]
  compute = partial(_advantages, algorithm)
  if replicated:  # statistics over rows have the same bits only where all devices have all rows
    compute = deterministic.replicated(compute, layout.mesh)
  advantages = compute(everything["rewards"], reward_weights, sampled)
  mask = sampled & everything["ended"][..., None]
  weights = token_weights(mask, algorithm.average, max_length=max_length)
  batch = Batch(prompts, prompt_mask, completions, mask, advantages, weights, logp)
  signal = (advantages != 0).any(range(1, advantages.ndim)) & mask.any((-2, -1))
  return laid_out(batch, layout), laid_out(signal, layout, P())


def _advantages(algorithm: Algorithm, rewards: tuple, weights: jax.Array, sampled: jax.Array):
  if algorithm.advantage == "multi_objective":
    return multi_objective(jnp.moveaxis(*rewards, -1, 0), weights)
  if algorithm.advantage == "process_advantages":
    return process_advantages(*rewards, sampled)
  return lookup("advantage", ADVANTAGES, algorithm.advantage)(*rewards)


# --- parts of a rollout ---------------------------------------------------------------------------


def _sample(
  sampler, params, scorer, draw, resample, *, key, group, temperature, step_rewards
) -> Scored:
  """Completions of this host's examples with their rewards."""
  with hosts.together("reading the examples"):
    examples = draw(resample)
    prompts = [example.prompt for example in examples]
    columns = columns_of(examples)
  first = resample * len(prompts) * hosts.own_shard()[1]
  out = sampler(params, prompts, key, group=group, temperature=temperature, first_prompt=first)
  with hosts.together("scoring the completions"):
    scores = scorer(prompts, out.texts, columns, out.lengths)
    if step_rewards is None:
      return Scored(prompts, out, scores)
    rewards, ends = step_arrays(step_rewards, sampler.tokenizer, prompts, out, columns)
    return Scored(prompts, out, scores, rewards, ends)


def _same_width(rewards: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rewards of steps with as many of them as the host with the most has."""
  widest = hosts.gathered(width=np.array([rewards.shape[-1]]))["width"].max()
  more = [(0, 0), (0, 0), (0, widest - rewards.shape[-1])]
  return np.pad(rewards, more, constant_values=np.nan), np.pad(ends, more)


def step_arrays(
  step_rewards: StepRewards,
  tokenizer: AnyTokenizer,
  prompts: Sequence[Prompt],
  out: Generated,
  columns: dict[str, list[Any]],
) -> tuple[Float[np.ndarray, "P G S"], Int[np.ndarray, "P G S"]]:
  """Rewards of the steps of each completion, and the index of each step's last token.

  A step ends with the token that brings the text to its end; one that ends beyond the text (after
  a stop string that was cut off, say) ends with the last token.
  """
  shape = out.mask.shape[:2]
  rows = [(p, g) for p in range(shape[0]) for g in range(shape[1])]
  found = step_rewards(
    prompts=[prompts[p] for p, _ in rows],
    completions=[out.texts[p][g] for p, g in rows],
    **{name: [values[p] for p, _ in rows] for name, values in columns.items()},
  )
  if len(found) != len(rows):
    raise ValueError(f"step_rewards returned {len(found)} lists for {len(rows)} completions")
  width = max(1, *(len(steps) for steps in found))
  rewards, ends = np.full((*shape, width), np.nan), np.zeros((*shape, width), np.int32)
  for (p, g), steps in zip(rows, found):
    tokens = out.tokens[p, g][out.mask[p, g]]
    for s, (end, reward) in enumerate(steps):
      if not math.isfinite(reward):
        raise ValueError(f"step_rewards gave {reward} for a step of {out.texts[p][g]!r:.200}")
      rewards[p, g, s], ends[p, g, s] = reward, token_at(tokenizer, tokens, end)
  return rewards, ends


def token_at(tokenizer: AnyTokenizer, tokens: Int[np.ndarray, "T"], end: int) -> int:
  """Index of the token with which the text reaches `end` characters, by bisection."""
  low, high = 0, max(len(tokens) - 1, 0)
  while low < high:
    middle = (low + high) // 2
    if len(tokenizer.decode(tokens[: middle + 1])) >= end:
      high = middle
    else:
      low = middle + 1
  return low


def _measure(seen: dict[str, Any]) -> dict[str, float]:
  """Rewards, accuracy, entropy and lengths under their usual names."""
  per_name = {
    name.removeprefix("rewards/"): v for name, v in seen.items() if name.startswith("rewards/")
  }
  measured = rollout_metrics(seen["total"], per_name, seen["lengths"], ~seen["ended"])
  return measured | {
    "accuracy": float(np.nanmean(seen["accuracy"])),
    "entropy": float(seen["entropy"].sum() / seen["lengths"].sum()),
    "rewards/missing": float(seen["missing"]),
  }


def _joined(first: Scored, second: Scored) -> Scored:
  """The prompts of both."""

  def one(a, b):
    if not isinstance(a, np.ndarray):
      return a + b
    if a.ndim == 2 and a.shape[-1] != b.shape[-1]:  # prompts, left-padded
      width = max(a.shape[-1], b.shape[-1])
      a, b = (np.pad(x, [(0, 0), (width - x.shape[-1], 0)]) for x in (a, b))
    if a.ndim == 3 and a.shape[-1] != b.shape[-1]:  # as many steps as the longer has
      width = max(a.shape[-1], b.shape[-1])
      fill = np.nan if a.dtype.kind == "f" else 0
      a, b = (
        np.pad(x, [(0, 0), (0, 0), (0, width - x.shape[-1])], constant_values=fill) for x in (a, b)
      )
    return np.concatenate([a, b])

  return _each(one, first, second)


def _each(function: Callable, *values: Any) -> Any:
  """`function` of every array and list that has prompts as its first axis."""
  first = values[0]
  if dataclasses.is_dataclass(first):
    names = [field.name for field in dataclasses.fields(first)]
    parts = {name: _each(function, *(getattr(v, name) for v in values)) for name in names}
    return dataclasses.replace(first, **parts)
  if isinstance(first, dict):
    return {name: _each(function, *(value[name] for value in values)) for name in first}
  if isinstance(first, int):
    return sum(values)  # a count
  return None if first is None else function(*values)


def records(
  prompts: Sequence[Any], texts: Sequence[Sequence[str]], **arrays: np.ndarray
) -> list[dict[str, Any]]:
  """One dict per completion: prompt, completion, and its entry of each [P, G] array."""
  return [
    {"prompt": prompt, "completion": text}
    | {name: array[p, g].item() for name, array in arrays.items()}
    for p, prompt in enumerate(prompts)
    for g, text in enumerate(texts[p])
  ]


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
  """Columns of all examples by name; one that an example lacks is None there."""
  names = dict.fromkeys(name for example in examples for name in example.columns)
  return {name: [example.columns.get(name) for example in examples] for name in names}


def fitting(
  tokenizer: AnyTokenizer, split: Sequence[Example], max_length: int, overlong: str
) -> tuple[Sequence[Example], int]:
  """The examples whose prompts have at most `max_length` tokens (0 = any), and that length.

  With overlong="error" a longer prompt raises; with "drop" a warning counts those left out. For
  `max_length=0` the second result is the longest prompt's length.
  """
  prompts = [example.prompt for example in split]
  if max_length == 0:
    return split, max((len(encode_prompt(tokenizer, p)) for p in prompts), default=0)
  _, _, kept = encode_prompts(tokenizer, prompts, max_length, overlong)
  return split if len(kept) == len(split) else Indexed(split.__getitem__, kept), max_length
