"""Collects a batch to learn from: completions, rewards, advantages.

Three stages, each callable alone: `generate` samples a group of completions for each example,
`score` calls the rewards, `make_batch` turns rewards into advantages on the device. `collect` is
their composition. `begin` and `assemble` are its halves, for rollouts that are sampled ahead.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from grpo_jax.core.advantages import lookup_advantage
from grpo_jax.core.algorithms import Algorithm, advantages, nll_weights
from grpo_jax.core.losses import lookup_algorithm
from grpo_jax.core.masks import token_weights
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.distributed import hosts
from grpo_jax.distributed.mesh import Sharding
from grpo_jax.episodes import Episodes, EpisodeSampler, with_environment_rewards
from grpo_jax.learning import deterministic
from grpo_jax.learning.batch import everywhere, laid_out, rows_of, select, trim
from grpo_jax.learning.step import Batch
from grpo_jax.models.protocol import Params
from grpo_jax.sampling.sampler import Generated, Sampler
from grpo_jax.statistics import count_routes, rollout_metrics, router_metrics
from grpo_jax.tasks.base import Example, Prompt, StepRewards
from grpo_jax.tasks.indexed import Indexed
from grpo_jax.tasks.rewards.logs import as_json, mean_metrics
from grpo_jax.tasks.rewards.steps import step_arrays
from grpo_jax.tasks.rewards.workers import Scorer, Scores
from grpo_jax.token_records import rounded, token_records
from grpo_jax.tokens import AnyTokenizer, encode_prompt, encode_prompts

# Examples, or a function of the number of the draw (0, 1, ...) for dynamic sampling.
Examples = Sequence[Example] | Callable[[int], Sequence[Example]]


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Settings of a rollout.

  Attributes:
    group_size: G, completions per prompt.
    algorithm: a row of `ALGORITHMS` by name, or an `Algorithm`: its advantage, its average, and
      the terms of its loss.
    reward_weights: weight of each reward function, for advantages that combine them.
    step_rewards: rewards of steps, for advantages that are computed from them.
    max_resamples: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups without a gradient
      are replaced by groups from up to this many further draws of examples. Where these do not
      suffice, some of them stay, so that P never changes. A group has a gradient if one of its
      advantages is not 0 and one of its tokens is in the loss.
    mask_truncated: completions that ran into the budget count in their group's statistics and have
      no tokens in the loss (DAPO's overlong filtering, section 3.4).
    demonstrations: builds the prompts of a policy that is its own teacher; None without one.
    pad_prompts_to_multiple: the batch holds a multiple of this many prompts; fewer sizes mean fewer
      compilations of the update.
    tokens: whether the samples hold the tokens of each completion (`token_records`), with their
      advantages where these differ between the tokens of a completion.
    batch_sharding: sharding of the batch; None is that of the sampler's prompts. It differs where
      some devices sample and others learn.
    replay_routes: the update uses the experts that were chosen while sampling.
    given: column of the examples whose text is the completion of each, in place of samples; a list
      of G texts where the group is larger than one. Empty: completions are sampled.

  Raises:
    ValueError: the group size is below 1, or 1 with a built-in advantage, which would be 0.
  """

  group_size: int
  algorithm: Algorithm | str = "grpo"
  reward_weights: tuple[float, ...] = ()
  step_rewards: StepRewards | None = None
  max_resamples: int = 0
  mask_truncated: bool = False
  demonstrations: Demonstrations | None = None
  pad_prompts_to_multiple: int = 1
  tokens: bool = False
  batch_sharding: Sharding = None
  replay_routes: bool = False
  given: str = ""

  def __post_init__(self) -> None:
    check_group_size(self.row, self.group_size)

  @property
  def row(self) -> Algorithm:
    """The algorithm itself, looked up if it was named."""
    return lookup_algorithm(self.algorithm)


def check_group_size(algorithm: Algorithm | None, size: int) -> None:
  """Raises ValueError for a group that is too small for the advantage of an algorithm.

  Example:
    >>> check_group_size(lookup_algorithm("ppo"), 1)
    >>> check_group_size(lookup_algorithm("opd"), 1)
    >>> check_group_size(lookup_algorithm("grpo"), 1)
    Traceback (most recent call last):
    ValueError: group_size is 1, it must be at least 2: a group of one has no variance, and ...
  """
  compares = algorithm is None or (
    isinstance(algorithm.advantage, str) and lookup_advantage(algorithm.advantage).needs_groups
  )
  least = 2 if compares else 1
  if size < least:
    raise ValueError(
      f"group_size is {size}, it must be at least {least}: a group of one has no variance, and an "
      "advantage compares the completions of a prompt with each other. For groups of one, take an "
      "algorithm with a critic (ppo), a teacher (opd) or without a baseline (reinforce_pp, "
      "online_rft), or a function as its advantage"
    )


@dataclasses.dataclass(frozen=True)
class Scored:
  """Completions of some prompts and their rewards.

  Attributes:
    examples: [P].
    out: the completions.
    scores: their rewards.
    step_rewards, step_ends: [P, G, S], from a task that rewards steps: reward (NaN = no such step)
      and index of the last token of each step.
  """

  examples: list[Example]
  out: Generated
  scores: Scores
  step_rewards: Float[np.ndarray, "P G S"] | None = None
  step_ends: Int[np.ndarray, "P G S"] | None = None

  @property
  def prompts(self) -> list[Prompt]:
    """[P], text or chat messages."""
    return [example.prompt for example in self.examples]


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A batch to learn from, and its record.

  Attributes:
    batch: on the device.
    scored: all completions that were sampled for it on this host.
    num_tokens: prompt tokens (each prompt once) plus completion tokens, over all hosts.
    metrics: by name, over all hosts.
    samples: one dict per completion, of all hosts.
    accuracy: of all completions that were sampled on all hosts, one draw of examples after another;
      NaN for those that were not judged.
    rows: which prompt of the samples each prompt of the batch is. The batch may have empty ones
      behind.
    drawn_from: counts of a curriculum that the problems were drawn by; None: those of the state.
  """

  batch: Batch
  scored: Scored
  num_tokens: int
  metrics: dict[str, float]
  samples: list[dict[str, Any]]
  accuracy: Float[np.ndarray, "D G"]
  rows: Int[np.ndarray, "R"]
  drawn_from: Float[np.ndarray, "n 2"] | None = None

  def add_ratios(self, ratios: Float[np.ndarray, "P G T"]) -> None:
    """Writes ratios of the tokens of the batch into those samples that hold tokens."""
    group = ratios.shape[1]
    for i, row in enumerate(self.rows):
      for g in range(group):
        if record := self.samples[row * group + g].get("tokens"):
          own = np.array([logp is not None for logp in record["logp"]])
          record["ratio"] = rounded(ratios[i, g, : len(own)], own)


# --- the three stages -----------------------------------------------------------------------------


def generate(
  sampler: Sampler | EpisodeSampler,
  params: Params,
  examples: Sequence[Example],
  key: jax.Array,
  *,
  group_size: int,
  first_prompt: int = 0,
  **how: Any,
) -> Generated:
  """Samples `group_size` completions of each example at the sampler's temperature.

  Args:
    sampler: of single turns, or of episodes.
    params: in any layout the model takes; `to_sampling_params` makes the fastest.
    examples: of this host, P over all hosts.
    key: random key; completion g of prompt p has the stream (key, first_prompt + p, g).
    how: `temperature` and `token_filter` of the sampler, for evaluation.
  """
  if isinstance(sampler, EpisodeSampler):
    return sampler(params, examples, key, group=group_size, first_prompt=first_prompt, **how)
  prompts = [example.prompt for example in examples]
  return sampler(params, prompts, key, group=group_size, first_prompt=first_prompt, **how)


def given(sampler: Sampler, examples: Sequence[Example], column: str, group_size: int) -> Generated:
  """Returns the completions that a column of the examples holds, in place of samples.

  Args:
    column: holds the text of one completion, or a list of `group_size` texts.

  Raises:
    ValueError: an example lacks the column, or it holds another number of texts.
  """
  texts = []
  for example in examples:
    if column not in example.columns:
      raise ValueError(
        f"the problem {example.key!r} has no column {column!r} with a completion: its columns are "
        f"{', '.join(example.columns) or 'none'}; set rollout.given to one of them"
      )
    value = example.columns[column]
    texts.append([str(text) for text in value] if isinstance(value, list | tuple) else [str(value)])
    if len(texts[-1]) != group_size:
      raise ValueError(
        f"the column {column!r} of the problem {example.key!r} holds {len(texts[-1])} completions, "
        f"and rollout.group_size is {group_size}: they must be the same"
      )
  return sampler.given([example.prompt for example in examples], texts)


def begin(
  sampler: Sampler | EpisodeSampler,
  params: Params,
  examples: Sequence[Example],
  key: jax.Array,
  *,
  group_size: int,
  first_prompt: int = 0,
) -> Callable[[], Generated]:
  """Starts `generate`, and returns the function that waits for its result.

  The function starts no program and may be called in another thread. Episodes are the exception:
  the host plays them turn by turn, so that all of it happens when the function is called.
  """
  how = {"group_size": group_size, "first_prompt": first_prompt}
  if isinstance(sampler, EpisodeSampler):
    return partial(generate, sampler, params, examples, key, **how)
  prompts = [example.prompt for example in examples]
  return sampler.begin(params, prompts, key, group=group_size, first_prompt=first_prompt)


def score(
  scorer: Scorer,
  examples: Sequence[Example],
  out: Generated,
  *,
  step_rewards: StepRewards | None = None,
  tokenizer: AnyTokenizer | None = None,
) -> Scored:
  """Scores the completions of some examples.

  Args:
    scorer: calls the rewards, such as `score_with(reward)` or a `RewardWorkers`.
    step_rewards: also rewards the steps of each completion; needs the `tokenizer`.
  """
  prompts, columns = [example.prompt for example in examples], columns_of(examples)
  scores = scorer(prompts, out.texts, columns, out.lengths, ids=ids_of(out))
  if isinstance(out, Episodes):
    total, per_name, turns = with_environment_rewards(out, scores.total, scores.per_name)
    missing = scores.missing + int(out.failed.sum())
    scores = dataclasses.replace(scores, total=total, per_name=per_name, missing=missing)
    return Scored(list(examples), out, scores, turns, np.maximum(out.turn_ends, 0))
  if step_rewards is None:
    return Scored(list(examples), out, scores)
  if tokenizer is None:
    raise ValueError("score(step_rewards=...) needs the tokenizer of the completions")
  arrays = step_arrays(step_rewards, tokenizer, prompts, out.texts, out.tokens, out.mask, columns)
  return Scored(list(examples), out, scores, *arrays)


def make_batch(
  scored: Scored,
  sampler: Sampler,
  config: RolloutConfig,
  rows: Int[np.ndarray, "P"] | None = None,
) -> tuple[Batch, Bool[np.ndarray, "P"]]:
  """Puts everything an update needs on the device.

  Statistics over more than a group, and the token weights, are of all prompts on all hosts: they
  are computed from global arrays. A group lies whole on one host.

  Args:
    rows: the prompts of the batch, as indices into those of all hosts, one host after another; None
      takes all of them in that order.

  Returns:
    (batch, whether each of its prompts has a gradient).
  """
  out, scores, algorithm = scored.out, scored.scores, config.row
  routes = (getattr(out, "routes", None), getattr(out, "prompt_routes", None))
  if config.replay_routes and routes[0] is None:
    raise ValueError(
      "RolloutConfig.replay_routes is true, but these completions have no recorded routes: sample "
      "with Decoder(record_routes=True), and not in episodes; or set it to False"
    )
  # Prompts are the first axis of everything that is laid out over the devices.
  rewards = {
    "rewards": scores.total,
    "rewards_per_function": np.stack([*scores.per_name.values()], -1),
  }
  if scored.step_rewards is not None:
    steps = _same_width(scored.step_rewards, scored.step_ends)
    rewards["step_rewards"], rewards["step_ends"] = steps
  host = {
    "batch": (out.prompts, out.prompt_mask, out.tokens, out.mask, out.logp),
    "routes": routes if config.replay_routes else None,
    "staleness": getattr(out, "staleness", None),
    "entropy": None if algorithm.entropy_share is None else out.entropy,
    "ended": out.ended | (not config.mask_truncated),
    "rewards": {
      name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in rewards.items()
    },
  }
  if config.demonstrations is not None:
    with hosts.together("building the teacher's prompts"):
      host["teacher"] = config.demonstrations(
        sampler.tokenizer, scored.examples, out.texts, scores.total
      )
  layout = _layout(sampler, config)
  weights = np.asarray(config.reward_weights, np.float32)
  arrays = hosts.to_global(host, layout)
  if rows is not None and np.array_equal(rows, np.arange(arrays["ended"].shape[0])):
    rows = None
  replicated = sampler.chunks is not None
  batch, has_gradient = _make_batch(
    arrays, rows, weights, algorithm, sampler.completion_length, layout, replicated
  )
  batch = dataclasses.replace(batch, temperature=out.temperature)
  return batch, np.asarray(has_gradient)


def collect(
  sampler: Sampler,
  params: Params,
  examples: Examples,
  scorer: Scorer,
  key: jax.Array,
  config: RolloutConfig,
) -> Rollout:
  """Samples G completions of each example, scores them and turns rewards into advantages.

  Prompts whose advantages are all 0 have no gradient. Without another term of the loss that gives
  them one (`Algorithm.every_group_learns`), they are left out of the batch: the update costs less
  and is the same, because the token weights were computed before. The batch is padded with empty
  prompts to a multiple of `config.pad_prompts_to_multiple`. Padding that all of its rows share is
  cut off.

  Args:
    examples: of this host, P over all hosts. With `config.max_resamples` a function: number of the
      draw -> examples; draw 0 gives the examples of the step.
    key: random key of the step.

  Raises:
    ValueError: `max_resamples` with a list of examples, which cannot be drawn again.
  """
  draw = examples if callable(examples) else lambda number: examples
  if config.max_resamples and not callable(examples):
    raise ValueError(
      f"max_resamples is {config.max_resamples}, but examples is a list; pass a function of the "
      "number of the draw that returns a list, or set max_resamples to 0"
    )
  seconds = {"time/sampling": 0.0, "time/rewards": 0.0}
  sample = partial(_generate_and_score, sampler, params, draw, scorer, key, config, seconds)
  return assemble(sample, sampler, config, seconds)


def assemble(
  sample: Callable[[int], Scored],
  sampler: Sampler | EpisodeSampler,
  config: RolloutConfig,
  seconds: dict[str, float],
  draws: int | None = None,
) -> Rollout:
  """Turns scored completions into a batch: `collect` from its third stage on.

  Args:
    sample: number of the draw -> its scored completions.
    sampler: the sampler they are from.
    seconds: metrics of the time of the first two stages, which `sample` may add to.
    draws: number of draws at most; None is 1 + `config.max_resamples`.
  """
  most, layout = config.max_resamples + 1 if draws is None else draws, _layout(sampler, config)
  scored, draws = sample(0), 1
  arrays, order = _gather_all_hosts(scored, draws)
  batch, has_gradient = make_batch(scored, sampler, config, order)
  count = len(order)
  while draws < most and has_gradient.sum() < count:
    scored, draws = _concatenate(scored, sample(draws)), draws + 1
    arrays, order = _gather_all_hosts(scored, draws)
    batch, has_gradient = make_batch(scored, sampler, config, order)
  metrics = _metrics(arrays) | seconds
  if getattr(scored.out, "routes", None) is not None:
    model = sampler.model.config
    counts = count_routes(scored.out.routes, scored.out.mask, model.layers, model.experts)
    metrics |= router_metrics(hosts.gathered(counts=counts[None])["counts"].sum(0))
  if isinstance(scored.out, Episodes):
    metrics |= scored.out.metrics()
  if config.demonstrations is not None:
    metrics["teacher/taught"] = float(_share_taught(batch, layout))
  if config.max_resamples:
    metrics |= {
      "dynamic_sampling/kept": has_gradient.mean(),
      "dynamic_sampling/resamples": draws - 1,
    }
  rows, advantage = np.arange(count), np.full((len(order), config.group_size), np.nan)
  if draws > 1:
    rows = np.sort(np.argsort(~has_gradient, kind="stable")[:count])
    batch, has_gradient = make_batch(scored, sampler, config, order[rows])
  advantage[rows] = np.asarray(_of_completions(batch, layout))
  chosen, by_token = rows, _of_tokens(batch, layout) if config.tokens else None
  if not config.row.every_group_learns:
    rows = rows[has_gradient]
    batch = select(batch, np.flatnonzero(has_gradient), config.pad_prompts_to_multiple)
  batch, metrics["update/padded"] = trim(
    batch, arrays["prompt_tokens"][rows], arrays["row_lengths"][rows]
  )
  known = token_records(scored.out, sampler.tokenizer) if config.tokens else None
  group, samples = config.group_size, hosts.gathered_json(_samples(scored, known))
  for i, p in enumerate(order):
    for g in range(group):
      samples[p * group + g]["advantage"] = advantage[i, g].item()
  if by_token is not None:
    for i, row in enumerate(chosen):
      for g in range(group):
        record = samples[order[row] * group + g]["tokens"]
        own = np.array([logp is not None for logp in record["logp"]])
        record["advantage"] = rounded(by_token[i, g, : len(own)], own)
  return Rollout(
    batch=batch,
    scored=scored,
    num_tokens=int(arrays["prompt_tokens"].sum() + arrays["row_lengths"].sum()),
    metrics=metrics,
    samples=[samples[p * group + g] for p in order for g in range(group)],
    accuracy=arrays["accuracy"],
    rows=rows,
  )


# --- parts ----------------------------------------------------------------------------------------


def _layout(sampler: Sampler | EpisodeSampler, config: RolloutConfig) -> Sharding:
  """Returns the sharding of the batch."""
  return sampler.prompt_sharding if config.batch_sharding is None else config.batch_sharding


def _generate_and_score(
  sampler: Sampler,
  params: Params,
  draw: Callable[[int], Sequence[Example]],
  scorer: Scorer,
  key: jax.Array,
  config: RolloutConfig,
  seconds: dict[str, float],
  number: int,
) -> Scored:
  """Runs the first two stages on one draw of examples, and adds up the time they take.

  All hosts fail together.
  """
  with hosts.together("reading the examples"):
    examples = list(draw(number))
  first = number * len(examples) * hosts.own_shard()[1]
  jax.block_until_ready(params)  # or the update before would count as sampling
  start = time.monotonic()
  if config.given:
    with hosts.together("reading the given completions"):
      out = given(sampler, examples, config.given, config.group_size)
  else:
    out = generate(sampler, params, examples, key, group_size=config.group_size, first_prompt=first)
  sampled = time.monotonic()
  with hosts.together("scoring the completions"):
    scored = score(
      scorer, examples, out, step_rewards=config.step_rewards, tokenizer=sampler.tokenizer
    )
  seconds["time/sampling"] += sampled - start
  seconds["time/rewards"] += time.monotonic() - sampled
  return scored


def _gather_all_hosts(scored: Scored, draws: int) -> tuple[dict[str, Any], Int[np.ndarray, "P"]]:
  """Returns the arrays that metrics and the choice of prompts need, and the order of the prompts.

  Gathered arrays hold the prompts of one host after another. Prompts are numbered draw after draw,
  whatever the number of hosts: prompt i is `order[i]` of what was gathered.
  """
  out, scores = scored.out, scored.scores
  arrays = hosts.gathered(
    **{f"rewards/{name}": values for name, values in scores.per_name.items()},
    total=scores.total,
    accuracy=scores.accuracy,
    lengths=out.lengths,
    row_lengths=out.row_lengths,
    ended=out.ended,
    entropy=out.entropy.sum(-1, dtype=np.float64),
    prompt_tokens=out.prompt_mask.sum(-1),
    **({} if out.row_steps is None else {"row_steps": out.row_steps}),
    missing=np.array([scores.missing]),
    raised=np.array([scores.raised]),
  )
  counts = {name: int(arrays.pop(name).sum()) for name in ("missing", "raised")}
  logged = mean_metrics(hosts.gathered_json(scores.logged))
  order = np.arange(len(arrays["total"])).reshape(hosts.own_shard()[1], draws, -1)
  order = order.swapaxes(0, 1).reshape(-1)
  arrays = {name: values[order] for name, values in arrays.items()}
  return arrays | counts | {"logged": logged}, order


@partial(jax.jit, static_argnames=("algorithm", "max_length", "layout", "replicated"))
def _make_batch(
  arrays: dict[str, Any],
  rows: jax.Array | None,
  reward_weights: jax.Array,
  algorithm: Algorithm,
  max_length: int,
  layout: Any,
  replicated: bool,
) -> tuple[Batch, jax.Array]:
  if rows is not None:
    arrays = rows_of(arrays, rows, layout)
  prompts, prompt_mask, completions, sampled, logp = arrays["batch"]
  mask = sampled & arrays["ended"][..., None]
  weights = token_weights(mask, algorithm.average, max_length=max_length)
  token_rewards, of_right = None, None
  if algorithm.of_token_rewards:  # the learner computes the advantages, before the updates
    token_rewards = _token_rewards(arrays["rewards"], sampled)
    values = jnp.full(mask.shape, jnp.nan)
    learns = jnp.isfinite(arrays["rewards"]["rewards"])[..., None]
  else:
    compute = partial(_advantages, algorithm)
    if replicated:  # statistics over rows have the same bits only where every device has all rows
      compute = deterministic.replicated(compute, layout.mesh)
    values = compute(arrays["rewards"], reward_weights, sampled, arrays["entropy"])
    learns = values != 0
  if algorithm.nll_weight > 0:
    of_right = nll_weights(algorithm, arrays["rewards"]["rewards"], mask)
  batch = Batch(
    prompts, prompt_mask, completions, mask, values, weights, logp,
    token_rewards=token_rewards, nll_weights=of_right,
  )  # fmt: skip
  if arrays["routes"] is not None:
    routes, prompt_routes = arrays["routes"]
    batch = dataclasses.replace(batch, routes=routes, prompt_routes=prompt_routes)
  if arrays["staleness"] is not None:
    batch = dataclasses.replace(batch, staleness=arrays["staleness"])
  has_gradient = learns.any(range(1, learns.ndim)) & mask.any((-2, -1))
  if "teacher" in arrays:
    tokens, token_mask, taught = arrays["teacher"]
    taught = taught[..., None] & mask
    batch = dataclasses.replace(
      batch, teacher_prompts=tokens, teacher_prompt_mask=token_mask, taught=taught
    )
  return laid_out(batch, layout), laid_out(has_gradient, layout, P())


def _advantages(
  algorithm: Algorithm,
  rewards: dict[str, jax.Array],
  weights: jax.Array,
  mask: jax.Array,
  entropy: jax.Array | None,
) -> jax.Array:
  """Returns the advantages of an algorithm from all rewards there are."""
  per_function = jnp.moveaxis(rewards["rewards_per_function"], -1, 0)
  rewards = {**rewards, "rewards_per_function": per_function}
  return advantages(algorithm, **rewards, reward_weights=weights, mask=mask, entropy=entropy)


def _token_rewards(rewards: dict[str, jax.Array], mask: jax.Array) -> jax.Array:
  """Returns the reward of each token [P, G, T]: that of a turn or completion is at its last token.

  A completion that was not scored has NaN there.
  """
  length = mask.shape[-1]
  last = length - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
  slots = jnp.arange(length)
  at_end = jnp.where(slots == last[..., None], rewards["rewards"][..., None], 0.0)
  if "step_rewards" not in rewards:
    return at_end
  steps, ends = rewards["step_rewards"], rewards["step_ends"]
  given = jnp.isfinite(steps)[..., None] & (slots == ends[..., None])
  of_turns = jnp.where(given, steps[..., None], 0.0).sum(-2)
  # The rewards of the turns of an episode hold its total; one that was not scored has none.
  return jnp.where(jnp.isnan(at_end), at_end, of_turns)


def _same_width(rewards: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pads the rewards of steps to the host with the most steps."""
  widest = hosts.gathered(width=np.array([rewards.shape[-1]]))["width"].max()
  padding = [(0, 0), (0, 0), (0, widest - rewards.shape[-1])]
  return np.pad(rewards, padding, constant_values=np.nan), np.pad(ends, padding)


def _metrics(arrays: dict[str, Any]) -> dict[str, float]:
  """Returns rewards, accuracy, entropy and lengths under the field's names."""
  prefix = "rewards/"
  per_name = {name.removeprefix(prefix): v for name, v in arrays.items() if name.startswith(prefix)}
  if "environment" in per_name and np.isnan(per_name["environment"]).all():
    del per_name["environment"]  # it gives no rewards
  metrics = rollout_metrics(arrays["total"], per_name, arrays["lengths"], ~arrays["ended"])
  judged = not np.isnan(arrays["accuracy"]).all()
  if "row_steps" in arrays:
    metrics["sampling/live"] = float(arrays["lengths"].sum() / arrays["row_steps"].sum())
  return {
    **arrays["logged"],
    **metrics,
    "accuracy": float(np.nanmean(arrays["accuracy"])) if judged else np.nan,
    "entropy": float(arrays["entropy"].sum() / arrays["lengths"].sum()),
    "rewards/missing": float(arrays["missing"]),
    "rewards/raised": float(arrays["raised"]),
  }


def _concatenate(first: Any, second: Any) -> Any:
  """Concatenates the prompts of two `Scored`; ragged axes are padded to the wider."""
  if dataclasses.is_dataclass(first):
    names = [field.name for field in dataclasses.fields(first)]
    parts = {name: _concatenate(getattr(first, name), getattr(second, name)) for name in names}
    return dataclasses.replace(first, **parts)
  if isinstance(first, dict):
    return {name: _concatenate(value, second[name]) for name, value in first.items()}
  if isinstance(first, float):
    return first  # the temperature, which is the same
  if not isinstance(first, np.ndarray):
    return None if first is None else first + second  # lists, and counts
  if first.ndim == 3 and first.shape[1] != second.shape[1]:  # routes of prompts [P, N, C]
    first, second = (np.moveaxis(a, 1, -1) for a in (first, second))
    width = max(first.shape[-1], second.shape[-1])
    first, second = (
      np.moveaxis(np.pad(a, [(0, 0), (0, 0), (width - a.shape[-1], 0)]), -1, 1)
      for a in (first, second)
    )
  if first.ndim > 1 and first.shape[-1] != second.shape[-1]:
    first, second = _pad_to_wider(first, second)
  return np.concatenate([first, second])


def _pad_to_wider(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts [P, N] on the left, and steps [P, G, S] on the right, to the wider of two."""
  width = max(a.shape[-1], b.shape[-1])
  fill = np.nan if a.ndim == 3 and a.dtype.kind == "f" else 0

  def pad(x: np.ndarray) -> np.ndarray:
    missing = width - x.shape[-1]
    last = (missing, 0) if x.ndim == 2 else (0, missing)
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [last], constant_values=fill)

  return pad(a), pad(b)


@partial(jax.jit, static_argnames="layout")
def _of_completions(batch: Batch, layout: Any) -> Float[jax.Array, "P G"]:
  """Returns the advantage of each completion; where its tokens have their own, their mean.

  It is NaN where the learner computes the advantages, from rewards of tokens.
  """
  values = batch.advantages
  if values.ndim == 3:
    values = jnp.where(batch.mask, values, 0.0).sum(-1) / batch.mask.sum(-1)
  return laid_out(values, layout, P())


def _of_tokens(batch: Batch, layout: Any) -> Float[np.ndarray, "P G T"] | None:
  """Returns the advantages of tokens, if each has its own and the learner computes none."""
  if batch.advantages.ndim != 3 or batch.token_rewards is not None:
    return None
  return np.asarray(everywhere(batch.advantages, layout))


@partial(jax.jit, static_argnames="layout")
def _share_taught(batch: Batch, layout: Any) -> Float[jax.Array, ""]:
  """Returns the share of the tokens that have a teacher."""
  share = batch.taught.sum() / jnp.maximum(batch.mask.sum(), 1)
  return share if layout is None else laid_out(share, layout, P())


def _samples(scored: Scored, tokens: list[list[dict[str, Any]]] | None) -> list[dict[str, Any]]:
  """Returns the record of each completion, without its advantage."""
  scores, out = scored.scores, scored.out
  arrays = {"accuracy": scores.accuracy, "length": out.lengths, "ended": out.ended}
  rows = records(scored.examples, out.texts, reward=scores.total, **arrays)
  cells = [(p, g) for p in range(len(scored.examples)) for g in range(len(out.texts[p]))]
  for row, (p, g) in zip(rows, cells):
    row["rewards"] = {name: values[p, g].item() for name, values in scores.per_name.items()}
    row |= scores.extras[p][g] if scores.extras else {}
    if isinstance(out, Episodes):
      row["turns"] = out.transcripts[p][g]
    if tokens:
      row["tokens"] = tokens[p][g]
  return rows


def records(
  examples: Sequence[Example], texts: Sequence[Sequence[str]], **arrays: np.ndarray
) -> list[dict[str, Any]]:
  """Returns one dict per completion: its example, its text, and its entry of each [P, G] array.

  The column `answer` of the example, if there is one, is also an entry of its own.
  """
  rows = []
  for p, example in enumerate(examples):
    columns = as_json(example.columns)
    about = {"prompt": example.prompt, "key": example.key, "columns": columns}
    about |= {"answer": columns["answer"]} if "answer" in columns else {}
    for g, text in enumerate(texts[p]):
      values = {name: array[p, g].item() for name, array in arrays.items()}
      rows.append({**about, "completion": text, **values})
  return rows


def ids_of(out: Generated) -> list[list[list[int]]] | None:
  """Returns the token ids of each completion, [P][G]; None from a sampler that returns text only.

  The ending token is included.
  """
  if not hasattr(out, "tokens"):
    return None
  pairs = zip(out.tokens, out.mask)
  return [[ids[mask].tolist() for ids, mask in zip(*group)] for group in pairs]


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
  """Returns the columns of all examples by name; one that an example lacks is None there."""
  names = dict.fromkeys(name for example in examples for name in example.columns)
  return {name: [example.columns.get(name) for example in examples] for name in names}


def with_system(examples: Sequence[Example], text: str) -> Sequence[Example]:
  """Returns the examples with a system turn before the messages of each prompt; "": unchanged.

  Accessing an example raises ValueError if its prompt is text, or has a system turn of its own.
  """
  if not text:
    return examples

  def make(i: int) -> Example:
    example = examples[i]
    if isinstance(example.prompt, str):
      reason = "is text, which has no turns: give chat messages"
    elif example.prompt[0]["role"] == "system":
      reason = "has a system turn of its own: leave chat.system empty, or take that turn out"
    else:
      turn = {"role": "system", "content": text}
      return dataclasses.replace(example, prompt=[turn, *example.prompt])
    raise ValueError(f"chat.system is set, and the prompt {str(example.prompt)[:200]!r} {reason}")

  return Indexed(make, range(len(examples)))


def longest_prompt(tokenizer: AnyTokenizer, examples: Sequence[Example]) -> int:
  """Returns the number of tokens of the longest prompt; 0 for no examples."""
  return max((len(encode_prompt(tokenizer, example.prompt)) for example in examples), default=0)


def fit_prompts(
  tokenizer: AnyTokenizer, examples: Sequence[Example], max_length: int, overlong: str
) -> Sequence[Example]:
  """Returns the examples whose prompts have at most `max_length` tokens.

  Args:
    overlong: "error" raises for a longer prompt; "drop" leaves it out, and a warning counts them.
  """
  prompts = [example.prompt for example in examples]
  _, _, indices = encode_prompts(tokenizer, prompts, max_length, overlong)
  if len(indices) == len(examples):
    return examples
  return Indexed(examples.__getitem__, indices)
