"""Tests second tries, on problems of reasoning-gym."""

import pytest

from grpo_jax.environments.workers import run_in_process
from grpo_jax.tasks import make_task

SUMS = {
  "dataset": "chain_sum", "config": {"max_terms": 2, "max_digits": 1}, "train_size": 2,
  "eval_size": 1,
}  # fmt: skip


def started(**settings):
  task = make_task("reasoning_gym", **SUMS, **settings)
  runner = run_in_process(task)
  example = task.splits["train"][0]
  runner.reset([example], 3, [0])
  return runner, example, example.columns["answer"]


def test_a_wrong_answer_is_told_and_answered_again():
  runner, example, answer = started(tries=2)
  first = runner.step({(0, 0): f" {answer}", (0, 1): " 99", (0, 2): ""})
  assert (first[0, 0].done, first[0, 0].reward, first[0, 0].metrics) == (True, 1.0, {"retries": 0})
  line = example.prompt.split("\n")[-1]
  for g in (1, 2):
    assert (first[0, g].done, first[0, g].reward) == (False, None)
    assert first[0, g].observation == f"Wrong. {line}"
  second = runner.step({(0, 1): f" {answer}", (0, 2): "98"})
  assert [(o.done, o.reward) for o in second.values()] == [(True, 1.0), (True, 0.0)]
  assert second[0, 1].metrics == {"retries": 1}


def test_second_tries_as_a_chat():
  runner, _, answer = started(tries=3, format="chat")
  for text in ("I think 98", "Then 99"):
    outcome = runner.step({(0, 0): text})[0, 0]
    assert outcome.observation == [{"role": "user", "content": "That is wrong. Try again."}]
  assert runner.step({(0, 0): f"It is {answer}"})[0, 0].reward == 1.0


def test_settings():
  assert make_task("reasoning_gym", **SUMS).environment is None
  with pytest.raises(ValueError, match="tries is 0: it must be at least 1"):
    make_task("reasoning_gym", **SUMS, tries=0)
  with pytest.raises(ValueError, match="has an environment, which tools would replace"):
    make_task("reasoning_gym", **SUMS, tries=2, tools=["calc"])
