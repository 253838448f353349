"""Guessing a number from the answers "Higher" and "Lower": the smallest game of several turns.

    Guess a number from 1 to 9.
    Guess: 5
    Higher
    Guess: 7
    Lower
    Guess: 6
    Correct

No guess is right or wrong by its text alone, and all games of a range have the same prompt: what a
guess is worth is known to the environment only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from grpo_jax.environments.base import Step
from grpo_jax.tasks.base import Example, Prompt, Task, unknown_name
from grpo_jax.tasks.indexed import Indexed, shuffled

FORMATS = ("completion", "chat")
REWARDS = ("final", "turns")
GUESS = re.compile(r"\s*(\d{1,9})\s*\.?\s*")


def guess_number_task(
  *,
  low: int = 1,
  high: int = 9,
  ranges: int = 1,
  turns: int = 3,
  games: int = 2,
  reward: str = "final",
  format: str = "completion",
  eval_fraction: float = 0.2,
  train_size: int = 1000,
  seed: int = 0,
) -> Task:
  """Builds the task. The optimum is bisection, which finds 7 of 9 numbers in 3 turns.

  Args:
    low: the smallest number.
    high: the largest number.
    ranges: number of ranges. The first is `low` to `high`, and each one begins a number later than
      the one before. With several, whole ranges are held out, with all of their numbers. With one,
      numbers are: a policy can then learn which numbers are never the secret.
    turns: guesses in a game.
    games: finished games that a prompt shows: the same ones in every prompt, moved to its range.
    reward: "final" gives the last turn 1 if the number was found, else 0. "turns" gives every turn
      the part of the remaining numbers that its answer rules out. The number gives 1, and 1 more
      for every turn that is left, so that finding it is always worth more than ruling out the rest.
    format: "completion", text whose turns end at a line break, or "chat", messages for a chat
      template.
    eval_fraction: part of the ranges, or of the numbers of a single one, that is held out.
    train_size: number of training games; they repeat the secrets.
    seed: selects the games that are shown, what is held out, and the order of the training games.

  Raises:
    ValueError: a setting is unknown or out of range.

  Example:
    >>> task = guess_number_task(games=0)
    >>> task.splits["train"][0].prompt
    'Guess a number from 1 to 9.\\nGuess:'
    >>> game = task.environment()
    >>> game.reset(Example("", {"secret": 6, "low": 1, "high": 9}, "6"), 0)
    >>> game.step(" 5").observation, game.step(" 7").observation, game.step(" 6").reward
    ('Higher\\nGuess:', 'Lower\\nGuess:', 1.0)
  """
  if format not in FORMATS:
    raise unknown_name("format", format, FORMATS)
  if reward not in REWARDS:
    raise unknown_name("reward", reward, REWARDS)
  if not (0 <= low < high < 10**9 and high - low < 10**6):
    raise ValueError(
      f"low is {low} and high {high}: need 0 <= low < high, below 10^9, at most 10^6"
    )
  if turns < 1 or games < 0 or train_size < 1 or not 0 < eval_fraction < 1:
    raise ValueError(
      f"turns is {turns}, games {games}, train_size {train_size} and eval_fraction "
      f"{eval_fraction}: need at least 1, 0 and 1, and a part in (0, 1)"
    )
  if not 1 <= ranges <= 10**6:
    raise ValueError(f"ranges is {ranges}: it must be at least 1 and at most 10^6")
  chat = format == "chat"
  shown = _example_games(low, high, turns, games, seed)
  size = high - low + 1

  def example(first: int, secret: int) -> Example:
    last = first + size - 1
    prompt = _prompt(first, last, turns, chat, [_moved(game, first - low) for game in shown])
    columns = {"secret": secret, "low": first, "high": last}
    return Example(prompt, columns, f"{first} to {last}: {secret}")

  if ranges == 1:
    train, held_out = ([(low, low + i) for i in part] for part in _split(size, eval_fraction, seed))
  else:
    train, held_out = (
      [(first, first + i) for first in (low + n for n in part) for i in range(size)]
      for part in _split(ranges, eval_fraction, seed)
    )
    train = [train[i] for i in shuffled(len(train), seed)]
  return Task(
    name=f"guess_number:{low}-{high}",
    splits={
      "train": Indexed(lambda i: example(*train[i % len(train)]), range(train_size)),
      "eval": Indexed(lambda i: example(*held_out[i]), range(len(held_out))),
    },
    rewards={"found": (found, 0.0)},  # the game gives the rewards; this one is shown beside them
    accuracy=found,
    stop=() if chat else ("\n",),
    environment=partial(GuessNumber, turns, reward, chat),
    turns=turns,
  )


def found(completions: Sequence[str], secret: Sequence[int], **columns: Any) -> list[float]:
  """Returns 1.0 where the last number of the completion is the secret.

  Example:
    >>> found(completions=[" 5\\nHigher\\nGuess: 6", "6, no, 7"], secret=[6, 6])
    [1.0, 0.0]
  """
  last = [(re.findall(r"\d{1,9}", text) or ["-1"])[-1] for text in completions]
  return [float(int(number) == right) for number, right in zip(last, secret)]


class GuessNumber:
  """One game; see `guess_number_task` for the arguments."""

  def __init__(self, turns: int, reward: str, chat: bool) -> None:
    self._turns, self._reward, self._chat = turns, reward, chat

  def reset(self, example: Example, seed: int) -> Prompt | None:
    """Takes the number and its range from the example; the seed changes nothing."""
    self._secret, self._low, self._high = (
      int(example.columns[name]) for name in ("secret", "low", "high")
    )
    self._turn, self._bounds = 0, (self._low, self._high)
    return None

  def step(self, text: str) -> Step:
    """Answers a guess: higher, lower, correct, or what a guess looks like."""
    self._turn += 1
    match = GUESS.fullmatch(text)
    guess = int(match[1]) if match else None
    correct = guess == self._secret
    if guess is None:
      answer = f"Write a number from {self._low} to {self._high}"
    elif correct:
      answer = "Correct"
    else:
      answer = "Higher" if guess < self._secret else "Lower"
    done = correct or self._turn == self._turns
    metrics = {"guess/parsed": float(guess is not None), "guess/found": float(correct)}
    return Step(self._observation(answer, done), self._rewarded(guess, done), done, metrics)

  def finish(self) -> float:
    """Returns the reward of a last turn that was cut off: it holds no guess."""
    return 0.0

  def _rewarded(self, guess: int | None, done: bool) -> float | None:
    if self._reward == "final":
      return float(guess == self._secret) if done else None
    if guess is None:
      return 0.0
    low, high = self._bounds
    if guess == self._secret:
      return float(self._turns - self._turn + 1)
    self._bounds = (
      (max(low, guess + 1), high) if guess < self._secret else (low, min(high, guess - 1))
    )
    return 1 - (self._bounds[1] - self._bounds[0] + 1) / (high - low + 1)

  def _observation(self, answer: str, done: bool) -> str | list[dict[str, str]]:
    if self._chat:
      return [{"role": "user", "content": answer}]
    return f"{answer}\n" if done else f"{answer}\nGuess:"


def _split(count: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
  """Splits 0 .. count - 1 into those for training, in a random order, and those held out."""
  order = shuffled(count, seed)
  held_out = min(max(round(eval_fraction * count), 1), count - 1)
  return order[held_out:], sorted(order[:held_out])


# --- prompts --------------------------------------------------------------------------------------


def _example_games(low: int, high: int, turns: int, count: int, seed: int) -> list[list[str]]:
  """Returns the lines of won games, played by bisection after a random first guess."""
  rng = random.Random(f"guess_number/{seed}")
  return [_example_game(low, high, rng.randint(1, turns), rng) for _ in range(count)]


def _example_game(low: int, high: int, turns: int, rng: random.Random) -> list[str]:
  guess, lines = rng.randint(low, high), []
  for _ in range(turns - 1):
    sides = [side for side in ((low, guess - 1), (guess + 1, high)) if side[0] <= side[1]]
    if not sides:
      break
    lines += [f"Guess: {guess}"]
    low, high = rng.choice(sides)
    lines += ["Higher" if low > guess else "Lower"]
    guess = (low + high) // 2
  return [*lines, f"Guess: {guess}", "Correct"]


def _moved(game: list[str], by: int) -> list[str]:
  """Returns the lines of a game with its guesses moved up."""
  return [re.sub(r"\d+", lambda guess: str(int(guess[0]) + by), line) for line in game]


def _prompt(low: int, high: int, turns: int, chat: bool, games: list[list[str]]) -> Prompt:
  head = f"Guess a number from {low} to {high}."
  if not chat:
    shown = ["\n".join([head, *lines]) for lines in games]
    return "\n\n".join([*shown, f"{head}\nGuess:"])
  text = (
    f"I think of a number from {low} to {high}. You have {turns} guesses, and I answer each with "
    "Higher or Lower. Write your guess, a number and nothing else."
  )
  shown = ["\n".join(line.removeprefix("Guess: ") for line in lines) for lines in games]
  return [{"role": "user", "content": "\n\n".join([text, *(f"A game:\n{game}" for game in shown)])}]
