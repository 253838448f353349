"""Tests the game of guessing a number."""

import itertools

import pytest

from grpo_jax.environments.workers import run_in_process
from grpo_jax.tasks import make_task


def games_of(**settings):
  task = make_task("guess_number", **settings)
  runner = run_in_process(task)
  examples = list(task.splits["eval"]) + list(task.splits["train"])
  runner.reset(examples, 1, [0] * len(examples))
  return task, runner, [example.columns["secret"] for example in examples]


def test_bisection_finds_seven_of_nine_numbers_in_three_turns():
  _, runner, secrets = games_of(train_size=7)
  assert sorted(secrets) == list(range(1, 10))
  found = 0
  for p, secret in enumerate(secrets):
    low, high, done = 1, 9, False
    while not done:
      guess = (low + high) // 2
      outcome = runner.step({(p, 0): f" {guess}"})[p, 0]
      done, answer = outcome.done, outcome.observation.split("\n")[0]
      assert answer == ("Correct" if guess == secret else "Higher" if guess < secret else "Lower")
      assert outcome.reward == (float(guess == secret) if done else None)
      low, high = (guess + 1, high) if answer == "Higher" else (low, guess - 1)
    found += outcome.reward
  assert found == 7


def test_every_game_has_the_same_prompt_and_no_secret_is_in_both_splits():
  task = make_task("guess_number", games=3, turns=2)
  prompts = {example.prompt for split in task.splits.values() for example in split}
  assert len(prompts) == 1
  secrets = [{e.columns["secret"] for e in split} for split in task.splits.values()]
  assert not secrets[0] & secrets[1]
  assert make_task("guess_number", games=3, turns=2).splits["eval"][0].prompt in prompts
  assert task.stop == ("\n",)


def test_whole_ranges_are_held_out():
  task = make_task("guess_number", low=4, high=6, ranges=10, eval_fraction=0.3, train_size=21)
  played = {}
  for name, split in task.splits.items():
    played[name] = {tuple(e.columns[c] for c in ("low", "high", "secret")) for e in split}
  for games in played.values():
    assert all(high == low + 2 and low <= secret <= high for low, high, secret in games)
  starts = {name: {low for low, *_ in games} for name, games in played.items()}
  assert len(starts["eval"]) == 3
  assert starts["eval"] | starts["train"] == set(range(4, 14))
  assert not starts["eval"] & starts["train"]
  assert len(played["train"]) == len(task.splits["train"]) == 21  # 7 ranges of 3 numbers
  assert len(played["eval"]) == len(task.splits["eval"]) == 9


def test_the_games_that_a_prompt_shows_are_moved_to_its_range():
  task = make_task("guess_number", ranges=5, games=3)
  by_range = {e.columns["low"]: e.prompt for split in task.splits.values() for e in split}
  assert set(by_range) == {1, 2, 3, 4, 5}
  lines = {low: prompt.split("\n") for low, prompt in by_range.items()}
  for low in (2, 3, 4, 5):
    for first, line in zip(lines[1], lines[low], strict=True):
      words = zip(first.split(), line.split(), strict=True)
      for a, b in ((a.rstrip("."), b.rstrip(".")) for a, b in words):
        assert b == (str(int(a) + low - 1) if a.isdigit() else a)


def test_a_game_answers_within_its_range():
  task = make_task("guess_number", ranges=50)
  runner, example = run_in_process(task), task.splits["eval"][-1]
  runner.reset([example], 1, [0])
  low, high = example.columns["low"], example.columns["high"]
  answer = runner.step({(0, 0): "?"})[0, 0].observation
  assert answer == f"Write a number from {low} to {high}\nGuess:"


def test_the_games_that_a_prompt_shows_are_right():
  for seed in range(30):
    task = make_task("guess_number", low=3, high=40, turns=4, games=4, seed=seed)
    *shown, last = task.splits["eval"][0].prompt.split("\n\n")
    assert last == "Guess a number from 3 to 40.\nGuess:"
    for game in shown:
      lines = game.split("\n")[1:]
      assert lines[-1] == "Correct"
      guesses = [int(line.removeprefix("Guess: ")) for line in lines[::2]]
      assert 1 <= len(guesses) <= 4
      assert all(3 <= guess <= 40 for guess in guesses)
      for guess, answer in zip(guesses, lines[1:-1:2]):
        assert answer == ("Higher" if guess < guesses[-1] else "Lower")


def test_what_is_not_a_guess_is_told_and_uses_a_turn():
  _, runner, _ = games_of(turns=2, train_size=1)
  outcome = runner.step({(0, 0): " five"})[0, 0]
  assert outcome.observation == "Write a number from 1 to 9\nGuess:"
  assert (outcome.done, outcome.metrics) == (False, {"guess/parsed": 0.0, "guess/found": 0.0})
  outcome = runner.step({(0, 0): "1" * 1000})[0, 0]
  assert (outcome.done, outcome.reward) == (True, 0.0)


def test_turn_rewards_are_the_part_that_an_answer_rules_out():
  _, runner, secrets = games_of(turns=4, reward="turns", train_size=7)
  p = secrets.index(8)
  # 9 numbers; after 5: 6 to 9; 5 again tells nothing; "x" neither; then the number.
  rewards = [runner.step({(p, 0): text})[p, 0].reward for text in ("5", "5", "x", "8")]
  assert rewards == pytest.approx([5 / 9, 0.0, 0.0, 1.0])


def test_with_turn_rewards_an_early_guess_is_worth_more_than_a_late_one():
  """Plays all games of two turns and more that guess the number last, among 1 to 4."""
  totals = {}
  for guesses in itertools.permutations((1, 2, 3, 4)):
    for length in range(1, 5):
      _, runner, secrets = games_of(low=1, high=4, turns=4, reward="turns", train_size=3)
      p = secrets.index(guesses[length - 1])
      rewards = [runner.step({(p, 0): f"{guess}"})[p, 0].reward for guess in guesses[:length]]
      totals.setdefault(length, []).append(sum(rewards))
  for length in (1, 2, 3):
    assert min(totals[length]) > max(totals[length + 1])


def test_the_game_as_a_chat():
  task, runner, secrets = games_of(format="chat", games=1, train_size=1)
  assert task.stop == ()
  (message,) = task.splits["eval"][0].prompt
  assert message["role"] == "user"
  assert "You have 3 guesses" in message["content"]
  guess = secrets[0] + 1
  answer = runner.step({(0, 0): f"{guess}."})[0, 0].observation
  assert answer == [{"role": "user", "content": "Lower"}]


def test_accuracy_is_the_last_number():
  task = make_task("guess_number")
  texts = ["5\nHigher\nGuess: 7", "7 5", "none"]
  assert task.accuracy(completions=texts, secret=[7] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"low": 9, "high": 9}, "low is 9 and high 9"),
    ({"low": -1}, "low is -1"),
    ({"turns": 0}, "turns is 0"),
    ({"ranges": 0}, "ranges is 0"),
    ({"eval_fraction": 1.0}, "eval_fraction 1.0"),
    ({"reward": "dense"}, "unknown reward 'dense'"),
    ({"format": "text"}, "unknown format 'text'"),
  ],
)
def test_settings_out_of_range(settings, message):
  with pytest.raises(ValueError, match=message):
    make_task("guess_number", **settings)
