"""Tests games of the real package textarena."""

import random

import pytest

pytest.importorskip(
  "textarena", reason="needs the extra textarena: pip install 'grpo_jax[textarena]'"
)

from grpo_jax.environments.textarena import textarena_environment
from grpo_jax.environments.workers import run_in_process
from grpo_jax.tasks.base import Example, Task

pytestmark = pytest.mark.slow


def test_games_that_are_played_at_once_do_not_change_each_other():
  """Finds the number by bisection: one for the episodes of a group, another for others."""
  episodes = textarena_environment("GuessTheNumber-v0-raw", max_turns=6)
  runner = run_in_process(Task("game", {}, {}, len, environment=episodes))

  def play():
    prompts = runner.reset([Example("", {}, f"{p}") for p in range(4)], 2, [1, 2, 3, 4])
    assert "between 1 and 20" in prompts[0][0]["content"]
    bounds = {(p, g): (1, 20) for p in range(4) for g in range(2)}
    numbers = {}
    while bounds:
      random.random()  # the run draws too
      guesses = {key: sum(bound) // 2 for key, bound in bounds.items()}
      outcomes = runner.step({key: f"I say [{guess}]" for key, guess in guesses.items()})
      for key, outcome in outcomes.items():
        assert outcome.failure is None
        if outcome.done:
          assert outcome.reward == 1.0
          numbers[key] = guesses[key]
          del bounds[key]
          continue
        ((role, content),) = [(m["role"], m["content"]) for m in outcome.observation]
        assert role == "user"
        assert "I say" not in content  # neither its own move nor the history
        low, high = bounds[key]
        guess = guesses[key]
        bounds[key] = (guess + 1, high) if "higher" in content else (low, guess - 1)
    return numbers

  first = play()
  assert all(first[p, 0] == first[p, 1] for p in range(4))
  assert len({first[p, 0] for p in range(4)}) > 1
  assert play() == first


def test_an_invalid_move_ends_the_game_at_the_second_time():
  episodes = textarena_environment("GuessTheNumber-v0-raw", chat=False)
  runner = run_in_process(Task("game", {}, {}, len, environment=episodes))
  assert runner.reset([Example("Play: ", {}, "p")], 1, [0])[0].startswith("Play: You are Player 0.")
  first = runner.step({(0, 0): "no idea"})[0, 0]
  assert not first.done
  assert "invalid move" in first.observation
  second = runner.step({(0, 0): "still none"})[0, 0]
  assert (second.done, second.reward) == (True, 0.0)
  assert second.metrics == {"textarena/invalid": 1.0}


@pytest.mark.parametrize(
  ("game", "message"),
  [
    ("GuessTheNumber-v0", "only variants that end in '-raw'"),
    ("GuessTheNumbr-v0-raw", "did you mean 'GuessTheNumber-v0-raw'"),
    ("TicTacToe-v0-raw", "cannot be played by one player"),
  ],
)
def test_other_games_are_errors(game, message):
  with pytest.raises(ValueError, match=message):
    textarena_environment(game)
