"""Tests that environment classes of TRL's users work as they are."""

import random

import pytest

from grpo_jax.environments.trl import trl_environment
from grpo_jax.environments.workers import run_in_process
from grpo_jax.tasks import make_task
from grpo_jax.tasks.base import Example, Task


class GuessEnv:
  """Plays a game as in TRL's guide: it owns its reward and its prompt's end."""

  def __init__(self):
    self.guesses = []

  def reset(self, low=1, high=9, **kwargs) -> str | None:
    self.secret = random.randint(low, high)
    self.guesses = []
    return f" It is from {low} to {high}."

  def guess(self, number: int) -> str:
    """
    Guess the number.

    Args:
        number: Your guess.

    Returns:
        A hint.
    """
    self.guesses.append(number)
    if number == self.secret:
      return "correct"
    return "higher" if number < self.secret else "lower"

  async def hint(self) -> str:
    """Tells the number."""
    return f"{self.secret}"

  def _private(self):
    raise AssertionError

  def get_reward(self) -> float:
    return 1.0 / len(self.guesses) if self.secret in self.guesses else 0.0


def call(name, **arguments):
  import json

  return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


EXAMPLE = Example([{"role": "user", "content": "Guess."}], {"high": 20}, "g")


def runner_of(factory, **settings):
  episodes = trl_environment(factory, **settings)
  return run_in_process(Task("trl", {}, {}, len, environment=episodes))


def test_a_game_is_played_and_owns_its_reward():
  runner = runner_of(GuessEnv)
  prompts = runner.reset([EXAMPLE, EXAMPLE], group=2, seeds=[0, 1])
  assert prompts == [[{"role": "user", "content": "Guess. It is from 1 to 20."}]] * 2
  secrets = {}
  state = random.getstate()
  for p in range(2):
    hints = runner.step({(p, g): call("hint") for g in range(2)})
    numbers = {int(outcome.observation[0]["content"]) for outcome in hints.values()}
    assert len(numbers) == 1  # a group has one secret
    secrets[p] = numbers.pop()
  assert secrets[0] != secrets[1]
  assert random.getstate() == state  # the run's own random numbers are as they were
  outcome = runner.step({(0, 0): call("guess", number=0) + call("guess", number=secrets[0])})[0, 0]
  assert [m["content"] for m in outcome.observation] == ["higher", "correct"]
  assert outcome.observation[0] == {"role": "tool", "name": "guess", "content": "higher"}
  assert outcome.metrics["tools/calls"] == 2
  done = runner.step({(0, 0): "It is done.", (0, 1): "I give up."})
  assert [(o.done, o.reward) for o in done.values()] == [(True, 0.5), (True, 0.0)]
  # An episode that runs out of its budget is scored too.
  runner.step({(1, 0): call("guess", number=secrets[1])})
  assert runner.finish([(1, 0), (1, 1)]) == {(1, 0): 1.0, (1, 1): 0.0}


def test_the_schemas_are_those_of_the_public_methods_and_tools():
  def add(a: int, b: int) -> int:
    """Adds.

    Args:
      a: One.
      b: Another.
    """
    return a + b

  episodes = trl_environment(GuessEnv, [add])
  assert [schema["function"]["name"] for schema in episodes.schemas] == ["add", "guess", "hint"]
  environment = episodes()
  environment.reset(EXAMPLE, 0)
  assert environment.step(call("add", a=1, b=2)).observation[0]["content"] == "3"


def test_states_of_episodes_are_apart():
  runner = runner_of(GuessEnv)
  runner.reset([EXAMPLE], group=2, seeds=[0])
  secret = int(runner.step({(0, 0): call("hint")})[0, 0].observation[0]["content"])
  runner.step({(0, 0): call("guess", number=secret)})
  done = runner.step({(0, 0): "Done.", (0, 1): "Done."})
  assert (done[0, 0].reward, done[0, 1].reward) == (1.0, 0.0)


class NoReset:
  def go(self) -> str:
    """Goes."""
    return ""


class NoTools:
  def reset(self, **row):
    return None


class NoHint:
  def reset(self, **row):
    return None

  def go(self, where):
    """Goes."""


class AsyncReward(NoTools):
  async def get_reward(self) -> float:
    return 0.25

  def go(self) -> str:
    """Goes."""
    return "gone"


class BadReward(AsyncReward):
  def get_reward(self):
    return "high"


class BadReset(AsyncReward):
  def reset(self, **row):
    return 3


def test_bad_classes_are_named():
  for factory, message in [
    (NoReset, "environment 'NoReset' has no method reset"),
    (NoTools, "environment 'NoTools' has no public method"),
    (NoHint, "tool 'go'.* type hint"),
    ({"a": GuessEnv}, "a dict of environments; give each a task of its own"),
  ]:
    with pytest.raises(ValueError, match=message):
      trl_environment(factory)


def test_other_rewards():
  runner = runner_of(AsyncReward)
  assert runner.reset([EXAMPLE], 1, [0]) == [None]
  assert runner.step({(0, 0): "x"})[0, 0].reward == 0.25
  for factory, message in [
    (BadReward, "step returned the reward 'high'"),
    (BadReset, "reset returned int: it must return text"),
  ]:
    runner = runner_of(factory)
    runner.reset([EXAMPLE], 1, [0])
    with pytest.warns(RuntimeWarning, match=message):
      assert message in runner.step({(0, 0): "x"})[0, 0].failure


def test_a_table_task_takes_it(tmp_path):
  (tmp_path / "rows.jsonl").write_text('{"prompt": "Guess.", "high": 5}\n')
  (tmp_path / "game.py").write_text(
    "from grpo_jax.environments.trl import trl_environment\n"
    "from tests.environments.test_trl import GuessEnv\n"
    "episodes = trl_environment(GuessEnv, format='line')\n"
  )
  task = make_task(
    "table", path=f"{tmp_path}/rows.jsonl", reward={"name": "length", "target": 3}, eval_fraction=0,
    environment=f"{tmp_path}/game.py:episodes",
  )  # fmt: skip
  assert task.stop == ("\n",)
  runner = run_in_process(task)
  assert runner.reset(task.splits["train"], 1, [0]) == ["Guess. It is from 1 to 5."]
  assert runner.step({(0, 0): " guess(6)"})[0, 0].observation == "Result: lower\nAnswer:"


def test_a_reward_function_that_reads_environments_is_told_of_get_reward(tmp_path):
  """Environments live in other processes than reward functions."""
  (tmp_path / "rows.jsonl").write_text('{"prompt": "Guess."}\n')

  def won(environments, **columns):
    return [environment.won for environment in environments]

  with pytest.raises(
    ValueError, match=r"requires environments.*give the environment a method get_"
  ):
    make_task("table", path=f"{tmp_path}/rows.jsonl", reward=won, eval_fraction=0)


class Documented:
  """Has what guides of TRL show: state made by `reset`, a game that is over, static helpers."""

  def __init__(self):
    self.reward, self.done = 0.0, False

  @property
  def broken(self):
    raise AssertionError("a property is no tool, and is never read")

  @staticmethod
  def rules() -> str:
    """Tells the rules."""
    return "Five letters."

  def reset(self, **kwargs) -> str | None:
    self.word, self.reward, self.done = kwargs["word"], 0.0, False

  def guess(self, guess: str) -> str:
    """
    Make a guess.

    Args:
        guess: The guessed word, formatted as '[abcde]'

    Returns:
        The feedback message from the environment.
    """
    if self.done:
      raise ValueError("Game over.")
    self.done = guess == f"[{self.word}]"
    self.reward = float(self.done)
    return "G G G G G" if self.done else "- - - - -"

  def get_reward(self) -> float:
    return self.reward


def test_a_class_as_in_the_guides_of_trl():
  runner = runner_of(Documented)
  example = Example([{"role": "user", "content": "Play."}], {"word": "crane"}, "c")
  assert runner.reset([example], 2, [0]) == [None]
  played = runner.step({(0, 0): call("rules") + call("guess", guess="[crane]"), (0, 1): "No."})
  contents = [message["content"] for message in played[0, 0].observation]
  assert contents == ["Five letters.", "G G G G G"]
  assert (played[0, 1].done, played[0, 1].reward) == (True, 0.0)
  over = runner.step({(0, 0): call("guess", guess="[slate]")})[0, 0]
  assert over.observation[0]["content"] == "error: ValueError: Game over."
  assert over.metrics["tools/raised"] == 1
  assert runner.finish([(0, 0)]) == {(0, 0): 1.0}
