"""Holds episodes that go on in later steps, for a `partial.Pool` whose task has an environment.

A round is a turn of every episode that goes on. Between two steps, environments keep their state,
and the tokens of an episode are read again under the parameters of the next step. A checkpoint
holds what was written and observed. A resumed run plays the turns of each episode to a new
environment, which has to answer the same.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.environments.base import EnvironmentRunner
from grpo_jax.episodes import Episodes, EpisodeSampler, Game, Row, episode_seeds, new_rows
from grpo_jax.models.protocol import Params
from grpo_jax.sampling.partial import row_keys_of
from grpo_jax.sampling.turns import Session
from grpo_jax.tasks.base import Example, Prompt

_JSON = "episodes"  # name of the bytes that hold the episodes


@dataclasses.dataclass
class Group:
  """Holds the episodes of a prompt.

  Attributes:
    prompt: what the environment or the example gave.
    rows: [G].
    steps: [G], step whose parameters drew each token.
  """

  prompt: Prompt
  rows: list[Row]
  steps: list[list[int]]


class EpisodesUnderWay:
  """Holds the episodes that are under way, by the number of their prompt, in that order.

  Args:
    sampler: of episodes; its environments are others than those of this pool.
    group: episodes per prompt.
    example: number of a prompt -> its example.
    stream: numbers of prompts -> their random keys, and their numbers in their steps.
  """

  def __init__(
    self,
    sampler: EpisodeSampler,
    group: int,
    example: Callable[[int], Example],
    stream: Callable[[Int[np.ndarray, "n"]], tuple[jax.Array, Int[np.ndarray, "n"]]],
  ) -> None:
    self._sampler, self._group, self._example, self._stream = sampler, group, example, stream
    self._groups: dict[int, Group] = {}
    self._runner: EnvironmentRunner | None = None
    self._playing: tuple[Session, Game] | None = None  # in this step

  @property
  def numbers(self) -> Int[np.ndarray, "C"]:
    """Numbers of the prompts."""
    return np.array([*self._groups], int)

  @property
  def complete(self) -> Bool[np.ndarray, "C"]:
    """Tells of each prompt whether all of its episodes are over."""
    groups = self._groups.values()
    return np.array([not any(row.live for row in group.rows) for group in groups], bool)

  def begin(self, numbers: Int[np.ndarray, "n"]) -> None:
    """Begins the episodes of more prompts."""
    rows = new_rows(len(numbers), self._group)
    for number, prompt, own in zip(numbers.tolist(), self._reset(numbers), rows):
      self._groups[number] = Group(prompt, own, [[]] * self._group)

  def sample(self, step: int, params: Params) -> None:
    """Plays a turn of each episode that goes on."""
    groups = self._groups.values()
    if self._playing is None:
      prompts, rows = [group.prompt for group in groups], [group.rows for group in groups]
      for row in (row for line in rows for row in line):
        row.unread = None  # it is among the tokens that are read now
      keys = row_keys_of(*self._stream(self.numbers), self._group)
      tokens = [[row.tokens * row.live for row in line] for line in rows]
      session = self._sampler.turns.go_on(params, prompts, keys, tokens)
      game = Game(self._sampler, self._environments(), prompts, rows, [*self._groups])
      self._playing = session, game
    session, game = self._playing
    session.keep(game.live)
    game.play(session.turn(game.limits(session.placed), game.read()))
    game.wait(None, for_one=True)
    for group in groups:
      group.steps = [
        old + [step] * (len(row.tokens) - len(old)) for old, row in zip(group.steps, group.rows)
      ]

  def generated(self, places: Sequence[int], step: int) -> Episodes:
    """Returns the episodes of prompts that are complete."""
    groups = [self._groups[number] for number in self.numbers[places]]
    prompts, rows = [group.prompt for group in groups], [group.rows for group in groups]
    single = self._sampler.single
    game = Game(self._sampler, self._environments(), prompts, rows)
    out = game.episodes(single.encode(prompts), single.temperature)
    age = np.zeros(out.tokens.shape, np.float32)
    for place in np.ndindex(age.shape[:2]):
      steps = groups[place[0]].steps[place[1]]
      age[place][: len(steps)] = step - np.array(steps)
    return dataclasses.replace(out, staleness=np.where(out.mask, age, 0))

  def drop(self, places: Sequence[int]) -> None:
    """Drops prompts, and ends the turns of this step."""
    numbers = self.numbers[places].tolist()
    for number in numbers:
      del self._groups[number]
    self._environments().forget(numbers)
    self._playing = None

  def saved(self) -> dict[str, np.ndarray]:
    """Returns the episodes as bytes by name."""
    groups = {
      number: {
        "prompt": group.prompt, "steps": group.steps, "rows": list(map(vars, group.rows)),
      }
      for number, group in self._groups.items()
    }  # fmt: skip
    return {_JSON: np.frombuffer(json.dumps(groups).encode(), np.uint8)}

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """Takes up the episodes of a checkpoint, and plays their turns to new environments."""
    for number, group in json.loads(saved[_JSON].tobytes()).items():
      rows = [Row(**row) for row in group["rows"]]
      self._groups[int(number)] = Group(group["prompt"], rows, group["steps"])
    prompts = self._reset(self.numbers) if self._groups else []
    for prompt, group in zip(prompts, self._groups.values()):
      if prompt != group.prompt:
        for row in group.rows:
          self._lose(row, group.prompt, prompt)
    self._play_again()

  def close(self) -> None:
    """Ends the environments."""
    if self._runner is not None:
      self._runner.close()
      self._runner = None

  # --- parts --------------------------------------------------------------------------------------

  def _environments(self) -> EnvironmentRunner:
    if self._runner is None:
      self._runner = self._sampler.make_runner()
    return self._runner

  def _reset(self, numbers: Int[np.ndarray, "n"]) -> list[Prompt]:
    """Begins the episodes of prompts in the environments; returns their prompts."""
    examples = [self._example(number) for number in numbers]
    seeds = episode_seeds(*self._stream(numbers)) if examples else []
    prompts = self._environments().begin(examples, self._group, seeds, numbers.tolist())
    self._sampler.check_prompts(prompts)
    return [e.prompt if own is None else own for own, e in zip(prompts, examples)]

  def _play_again(self) -> None:
    """Plays the turns so far of episodes that go on, and ends the environments of the others."""
    runner = self._environments()
    rows = {(n, g): row for n, group in self._groups.items() for g, row in enumerate(group.rows)}
    over = [key for key, row in rows.items() if not row.live]
    runner.submit({}, over)
    waiting = {*over}
    while waiting:
      waiting -= runner.answers().keys()
    for turn in range(max((len(row.turns) for row in rows.values()), default=0)):
      playing = {key: row for key, row in rows.items() if row.live and turn < len(row.turns)}
      runner.submit({key: row.turns[turn] for key, row in playing.items()})
      while playing:
        for key, outcome in runner.answers().items():
          row = playing.pop(key)
          if outcome.done or outcome.observation != row.observations[turn]:
            answer = outcome.failure or outcome.observation
            self._lose(row, row.observations[turn], answer)

  def _lose(self, row: Row, before: Any, now: Any) -> None:
    """Gives up an episode that goes on, if its environment does not answer as before."""
    if row.live:
      row.live, row.failed = False, True
      warnings.warn(
        f"lost an episode, which is not scored: its environment had answered {before!r:.200}, and "
        f"answers {now!r:.200} now that it is played again",
        RuntimeWarning, stacklevel=4,
      )  # fmt: skip
