"""Plays episodes of several turns: the policy writes, an environment answers, and so on.

An episode is one row of tokens. `mask` says which of them the policy wrote: they have log-probs and
a weight in the loss. Observations lie between them; they are attended to and never trained on.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.distributed import hosts
from grpo_jax.environments.base import EnvironmentFault, EnvironmentRunner, Outcome
from grpo_jax.environments.workers import warn_of_failures
from grpo_jax.models.protocol import Params
from grpo_jax.observations import ObservationEncoder, transcript
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.sampler import Generated, Sampler
from grpo_jax.sampling.turns import Budget, Turn, TurnSampler
from grpo_jax.tasks.base import Example, Prompt
from grpo_jax.tokens import AnyTokenizer, Messages, encode_prompt

POLL = 0.05  # seconds between two looks at environments that are slow, at least
Key = tuple[int, int]  # number of the prompt, number of the completion
# Metrics of every run with episodes: turns, tokens with observations, and the share of episodes
# that ran out of a budget, or whose environment failed.
EPISODE_METRICS = ("episode/turns", "episode/tokens", "episode/truncated", "episode/failed")


@dataclasses.dataclass(frozen=True)
class Episodes(Generated):
  """Holds the episodes of a group for each prompt, on the host.

  Attributes:
    attended: [P, G, T], true for all tokens of an episode, observations included; `mask` is true
      for those of the policy.
    turn_rewards, turn_ends: [P, G, S], the reward that the environment gave each turn (NaN: none)
      and the index of the turn's last token.
    failed: [P, G], true where the environment failed: the episode is not scored.
    transcripts: [P][G], the turns and observations as chat messages.
    measured: [P][G], what environments measured by name, summed over an episode.

  `texts` holds the last turn of each episode; `ended` is false for one that ran out of a budget.
  """

  attended: Bool[np.ndarray, "P G T"] = None
  turn_rewards: Float[np.ndarray, "P G S"] = None
  turn_ends: Int[np.ndarray, "P G S"] = None
  failed: Bool[np.ndarray, "P G"] = None
  transcripts: list[list[Messages]] = dataclasses.field(default_factory=list)
  measured: list[list[dict[str, float]]] = dataclasses.field(default_factory=list)

  @property
  def row_lengths(self) -> Int[np.ndarray, "P G"]:
    """Number of tokens of each episode, observations included."""
    return self.attended.sum(-1)

  @property
  def turns(self) -> Int[np.ndarray, "P G"]:
    """Number of turns of each episode."""
    return (self.turn_ends >= 0).sum(-1)

  def metrics(self) -> dict[str, float]:
    """Returns means over the episodes of all hosts: turns, truncated and failed ones, and more."""
    rows = [
      {
        "episode/turns": float(self.turns[p, g]),
        "episode/truncated": float(not self.ended[p, g] and not self.failed[p, g]),
        "episode/failed": float(self.failed[p, g]),
        "episode/tokens": float(self.row_lengths[p, g]),
        **values,
      }
      for p, line in enumerate(self.measured)
      for g, values in enumerate(line)
    ]
    rows = hosts.gathered_json(rows)
    names = sorted({name for row in rows for name in row})
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


class EpisodeSampler:
  """Samples episodes; takes the place of a `Sampler` in `rollout.collect` and `evaluate`.

  Args:
    sampler: samples single turns; its `completion_length` is the budget of an episode in tokens.
    budget: its other limits.
    make_runner: starts the environments of the task, when the first episode needs them.
    in_step: whether all episodes take their turns together. Otherwise an environment that is slow
      holds up its own episode only: the others go on once it has taken longer than a turn.

  Attributes:
    turns: samples the turns.
    single: the sampler of single turns.
    encode: encodes observations.
  """

  def __init__(
    self,
    sampler: Sampler,
    budget: Budget,
    make_runner: Callable[[], EnvironmentRunner],
    in_step: bool = True,
  ) -> None:
    self.budget, self.single, self.make_runner = budget, sampler, make_runner
    self.in_step, self.turns = in_step, TurnSampler(sampler, budget, in_step)
    self.encode = ObservationEncoder(sampler.tokenizer)
    self._runner: EnvironmentRunner | None = None
    self.tokenizer: AnyTokenizer = sampler.tokenizer
    self.prompt_sharding, self.chunks = sampler.prompt_sharding, sampler.chunks
    self.completion_length, self.prompt_length = sampler.completion_length, sampler.prompt_length

  def close(self) -> None:
    """Ends the environments; a later call starts new ones."""
    if self._runner is not None:
      self._runner.close()
      self._runner = None

  def __call__(
    self,
    params: Params,
    examples: Sequence[Example],
    key: jax.Array,
    *,
    group: int,
    first_prompt: int = 0,
    temperature: float | None = None,
    token_filter: TokenFilter | None = None,
  ) -> Episodes:
    """Plays `group` episodes of each example; arguments as of `Sampler`.

    All episodes of a group have the seed (key, number of the prompt), so an episode is a function
    of the parameters, the key and its numbers.
    """
    if self._runner is None:
      self._runner = self.make_runner()
    with hosts.together("starting the environments"):
      first = first_prompt + hosts.own_shard()[0] * len(examples)
      numbers = first + np.arange(len(examples))
      seeds = episode_seeds(jax.numpy.broadcast_to(key, numbers.shape), numbers)
      prompts = self._runner.reset(examples, group, seeds)
      self.check_prompts(prompts)
    prompts = [own if own is not None else e.prompt for own, e in zip(prompts, examples)]
    session = self.turns.begin(
      params, prompts, key, group=group, first_prompt=first_prompt,
      temperature=temperature, token_filter=token_filter,
    )  # fmt: skip
    game, seconds = Game(self, self._runner, prompts, new_rows(len(prompts), group)), 0.0
    while hosts.any_host(game.goes_on):
      session.keep(game.live)
      limits = game.limits(session.placed)
      if plays := hosts.any_host(bool(limits.any())):
        start = time.monotonic()
        turn = session.turn(limits, game.read())
        seconds = time.monotonic() - start
        with hosts.together("stepping the environments"):
          game.play(turn)
      with hosts.together("waiting for the environments"):
        game.wait(None if self.in_step else max(seconds, POLL), for_one=not plays)
    start = session.prepared
    return game.episodes(
      (start.prompts, start.prompt_mask), start.how["temperature"], session.row_steps
    )

  def check_prompts(self, prompts: Sequence[Prompt | None]) -> None:
    """Raises EnvironmentFault if the environment returned a prompt that exceeds the budget.

    The budget may have been measured on the prompts of the examples.
    """
    for prompt in prompts:
      count = 0 if prompt is None else len(encode_prompt(self.tokenizer, prompt))
      if count > self.prompt_length:
        raise EnvironmentFault(
          f"reset of the environment returned a prompt of {count} tokens, and the budget is "
          f"{self.prompt_length}; set rollout.prompt_length to the longest prompt that it may "
          f"return. The prompt is {prompt!r:.600}"
        )


@dataclasses.dataclass
class Row:
  """Holds one episode while it is played.

  Attributes:
    tokens, own, logp, entropy: of each token; `own` says whether the policy wrote it.
    ends, rewards: of each turn, index of its last token and the environment's reward.
    turns, observations: what was written and answered.
    metrics: what the environment measured, summed.
    unread: observation that the model has not read.
    live: whether it may take another turn.
    waits: whether its environment has not answered yet.
    ended, failed: whether the environment ended it, or failed.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  own: list[bool] = dataclasses.field(default_factory=list)
  logp: list[float] = dataclasses.field(default_factory=list)
  entropy: list[float] = dataclasses.field(default_factory=list)
  ends: list[int] = dataclasses.field(default_factory=list)
  rewards: list[float] = dataclasses.field(default_factory=list)
  turns: list[str] = dataclasses.field(default_factory=list)
  observations: list[str | Messages] = dataclasses.field(default_factory=list)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  unread: list[int] | None = None
  live: bool = True
  waits: bool = False
  ended: bool = False
  failed: bool = False

  def write(self, turn: Turn, place: Key) -> None:
    """Adds what the policy wrote in a turn."""
    n = int(turn.mask[place].sum())
    self.tokens += turn.tokens[place][:n].tolist()
    self.own += [True] * n
    self.logp += turn.logp[place][:n].tolist()
    self.entropy += turn.entropy[place][:n].tolist()
    self.ends.append(len(self.tokens) - 1)
    self.rewards.append(np.nan)

  def observe(self, observation: str | Messages, ids: list[int]) -> None:
    """Adds an observation and its tokens, which the model has yet to read."""
    self.observations.append(observation)
    self.unread = ids
    self.tokens += ids
    self.own += [False] * len(ids)
    self.logp += [0.0] * len(ids)
    self.entropy += [0.0] * len(ids)

  def take(self, outcome: Outcome) -> None:
    """Notes the environment's answer to a turn."""
    if outcome.reward is not None:
      self.rewards[-1] = outcome.reward
    for name, value in outcome.metrics.items():
      self.metrics[name] = self.metrics.get(name, 0.0) + value
    self.failed = outcome.failure is not None
    self.ended = outcome.done and not self.failed
    self.live = not outcome.done

  def finish(self, outcome: Outcome) -> None:
    """Notes the last reward of an episode that ran out of a budget."""
    if outcome.reward is not None:
      self.rewards[-1] = np.nansum([self.rewards[-1], outcome.reward])


def new_rows(prompts: int, group: int) -> list[list[Row]]:
  """Returns a row for each of `group` episodes of each prompt."""
  return [[Row() for _ in range(group)] for _ in range(prompts)]


class Game:
  """Holds the rows of some prompts and steps their environments between the turns.

  Args:
    sampler: tokenizer and budget.
    runner: has begun an episode of each row.
    prompts: [P], text or chat messages.
    rows: [P][G].
    numbers: [P], number of each prompt in the runner; None numbers them from 0.
  """

  def __init__(
    self,
    sampler: EpisodeSampler,
    runner: EnvironmentRunner,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Row]],
    numbers: Sequence[int] | None = None,
  ) -> None:
    self._sampler, self._runner, self._prompts = sampler, runner, prompts
    self._group, numbers = len(rows[0]), numbers or range(len(prompts))
    self._rows = {(p, g): row for p, line in enumerate(rows) for g, row in enumerate(line)}
    self._keys = {(p, g): (int(numbers[p]), g) for p, g in self._rows}
    self._places = {key: place for place, key in self._keys.items()}

  @property
  def live(self) -> Bool[np.ndarray, "P G"]:
    """Episodes that may take another turn."""
    return np.array([row.live for row in self._rows.values()]).reshape(-1, self._group)

  @property
  def goes_on(self) -> bool:
    """Tells whether any episode may take another turn, or waits for its environment."""
    return any(row.live or row.waits for row in self._rows.values())

  def limits(self, placed: Bool[np.ndarray, "P G"]) -> Int[np.ndarray, "P G"]:
    """Returns the number of tokens that each row may write in a turn now.

    Args:
      placed: rows that have a place on the device.
    """
    limit = np.zeros((len(self._prompts), self._group), np.int64)
    for place, row in self._rows.items():
      if row.live and not row.waits and placed[place]:
        room = self._sampler.completion_length - len(row.tokens)
        limit[place] = min(self._sampler.budget.turn_length, room)
    return limit

  def read(self) -> dict[Key, list[int]]:
    """Returns the observations that rows have not read; from now on, they have."""
    unread = {place: row.unread for place, row in self._rows.items() if row.unread is not None}
    for place in unread:
      self._rows[place].unread = None
    return unread

  def play(self, turn: Turn) -> None:
    """Adds a turn to each row that took part, and hands it to the environment."""
    decoded = self._sampler.single.texts(turn.tokens, turn.mask)
    texts, over_budget = {}, []
    for place, row in self._rows.items():
      if not turn.mask[place].any():
        continue
      row.write(turn, place)
      row.turns.append(decoded[place[0]][place[1]])
      if turn.ended[place]:
        texts[place] = row.turns[-1]
      else:
        over_budget.append(place)
    self._submit(texts, over_budget)

  def wait(self, patience: float | None, *, for_one: bool) -> None:
    """Waits for the environments.

    Args:
      patience: seconds after which those that have not answered are left out of the next turn;
        None waits for all.
      for_one: whether to wait for one answer at least, since no episode can go on without. On
        several hosts, those of another may.
    """
    end, outcomes = None if patience is None else time.monotonic() + patience, {}
    while any(row.waits for row in self._rows.values()):
      timeout = None if end is None else end - time.monotonic()
      if timeout is not None and timeout <= 0:
        if outcomes or not for_one or hosts.own_shard()[1] > 1:
          break
        timeout = None
      answers = {self._places[key]: o for key, o in self._runner.answers(timeout).items()}
      outcomes |= answers
      over_budget = [place for place, outcome in answers.items() if self._goes_over(place, outcome)]
      self._submit({}, over_budget)
    warn_of_failures(outcomes.values())

  def _submit(self, texts: Mapping[Key, str], over_budget: Sequence[Key]) -> None:
    for place in (*texts, *over_budget):
      self._rows[place].waits = True
    for place in over_budget:
      self._rows[place].live = False
    if texts or over_budget:
      texts = {self._keys[place]: text for place, text in texts.items()}
      self._runner.submit(texts, [self._keys[place] for place in over_budget])

  def _goes_over(self, place: Key, outcome: Outcome) -> bool:
    """Takes an answer; returns whether the episode cannot go on for want of turns or tokens."""
    row = self._rows[place]
    row.waits = False
    if not row.live:
      row.finish(outcome)
      return False
    row.take(outcome)
    if not row.live:
      return False
    is_last = len(row.ends) == self._sampler.budget.turns
    ids = None if is_last else self._encoded(place, outcome.observation)
    if ids is None:
      return True
    row.observe(outcome.observation, ids)
    return False

  def _encoded(self, place: Key, observation: str | Messages) -> list[int] | None:
    """Returns the tokens of an observation; None if it and one more token exceed a budget.

    An observation that cannot be encoded, or has an id beyond the model, fails its episode.
    """
    row, sampler = self._rows[place], self._sampler
    chat = not isinstance(self._prompts[place[0]], str)
    try:
      ids = sampler.encode(observation, last=row.tokens[-1], chat=chat)
      if max(ids, default=0) >= sampler.tokenizer.vocab_size:
        raise ValueError(
          f"the observation {observation!r:.200} has the id {max(ids)}, and the model has only ids "
          f"0..{sampler.tokenizer.vocab_size - 1}"
        )
    except ValueError as error:
      row.failed = True
      warnings.warn(f"lost an episode, which is not scored: {error}", RuntimeWarning, stacklevel=4)
      return None
    room = sampler.completion_length - len(row.tokens) - 1
    return ids if len(ids) <= min(room, sampler.budget.observation_length) else None

  def episodes(
    self,
    prompts: tuple[Int[np.ndarray, "P N"], Bool[np.ndarray, "P N"]],
    temperature: float,
    row_steps: int | None = None,
  ) -> Episodes:
    """Returns the rows as arrays.

    Args:
      prompts: their tokens, left-padded, and the mask.
      temperature: at which turns were sampled.
      row_steps: tokens that all seats could have written; None if they are not counted.
    """
    shape = (len(self._prompts), self._group)
    length, turns = self._sampler.completion_length, self._sampler.budget.turns
    tokens = np.full((*shape, length), self._sampler.tokenizer.pad_id, np.int32)
    mask, attended = np.zeros((2, *shape, length), bool)
    logp, entropy = np.zeros((2, *shape, length), np.float32)
    rewards, ends = np.full((*shape, turns), np.nan), np.full((*shape, turns), -1)
    for place, row in self._rows.items():
      n = len(row.tokens)
      tokens[place][:n], mask[place][:n], attended[place][:n] = row.tokens, row.own, True
      logp[place][:n], entropy[place][:n] = row.logp, row.entropy
      rewards[place][: len(row.rewards)], ends[place][: len(row.ends)] = row.rewards, row.ends
    grid = [[self._rows[p, g] for g in range(self._group)] for p in range(shape[0])]
    flags = {name: np.array([[getattr(row, name) for row in line] for line in grid])
             for name in ("ended", "failed")}  # fmt: skip
    return Episodes(
      prompts=prompts[0],
      prompt_mask=prompts[1],
      tokens=tokens,
      mask=mask,
      ended=flags["ended"],
      logp=logp,
      entropy=entropy,
      texts=[[row.turns[-1] for row in line] for line in grid],
      temperature=temperature,
      row_steps=None if row_steps is None else np.full(shape[0], row_steps / shape[0], np.float32),
      attended=attended,
      turn_rewards=rewards,
      turn_ends=ends,
      failed=flags["failed"],
      transcripts=[[transcript(row.turns, row.observations) for row in line] for line in grid],
      measured=[[row.metrics for row in line] for line in grid],
    )


def with_environment_rewards(
  episodes: Episodes, total: np.ndarray, per_name: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
  """Returns (total, rewards by name, rewards of turns) with those of the environment.

  The environment's rewards are summed over an episode, under the name `environment`, and added to
  the total with weight 1. What reward functions gave belongs to the last turn. An episode whose
  environment failed is not scored at all.

  Args:
    total: [P, G], weighted sum of the reward functions; NaN: not scored.
    per_name: name -> [P, G], their rewards.
  """
  given = np.isfinite(episodes.turn_rewards)
  own = np.where(given.any(-1), np.where(given, episodes.turn_rewards, 0).sum(-1), np.nan)
  scored = np.isfinite(total)
  both = np.where(scored, total, 0) + np.where(np.isnan(own), 0, own)
  both = np.where((scored | ~np.isnan(own)) & ~episodes.failed, both, np.nan)
  values = {name: np.where(episodes.failed, np.nan, value) for name, value in per_name.items()}
  values["environment"] = np.where(episodes.failed, np.nan, own)
  turns = np.where(episodes.turn_ends >= 0, np.where(given, episodes.turn_rewards, 0), np.nan)
  last = np.maximum(episodes.turns - 1, 0)[..., None]
  at_end = np.take_along_axis(turns, last, -1) + np.where(scored, total, 0)[..., None]
  np.put_along_axis(turns, last, at_end, -1)
  return both, values, np.where(np.isnan(both)[..., None], np.nan, turns)


def episode_seeds(keys: jax.Array, numbers: Int[np.ndarray, "P"]) -> list[int]:
  """Returns one seed per prompt, folded from its random key and its number.

  Args:
    keys: [P].
  """
  folded = jax.vmap(jax.random.fold_in)(keys, numbers)
  return [int(bits) & 0x7FFFFFFF for bits in np.asarray(jax.random.key_data(folded))[:, -1]]
