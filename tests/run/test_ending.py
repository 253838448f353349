"""Tests the conditions that end a run early: their grammar, their values, the clock."""

import math

import pytest

from grpo_jax.run import ending
from grpo_jax.run.ending import Condition, Ending


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("eval/accuracy>0.9", ("eval/accuracy", ">", 0.9)),
    (" eval/pass@8  >=  .5 ", ("eval/pass@8", ">=", 0.5)),
    ("kl<1e-3", ("kl", "<", 1e-3)),
    ("rewards/f_1/mean <= -2.", ("rewards/f_1/mean", "<=", -2.0)),
    ("reward>+1E2", ("reward", ">", 100.0)),
  ],
)
def test_conditions_are_read(text, expected):
  assert Condition.parse(text) == Condition(*expected)


@pytest.mark.parametrize(
  "text",
  [
    "reward", "reward>", ">0.5", "reward = 1", "reward == 1", "reward != 1", "reward => 1",
    "reward > kl", "reward > 0.5 and kl < 1", "reward > 1; import os", "reward > nan",
    "reward > inf", "reward > 1e999", "reward > 0x10", "reward > 1_000", "reward >> 1",
    "__import__('os').system('x') > 1 > 0", "(reward) > 1 or 1", "reward > 1 # x", "0 < reward",
    "reward > ١", "reward\n> 1\n2",
  ],
)  # fmt: skip
def test_everything_else_is_refused(text):
  with pytest.raises(ValueError, match=r"stop\.when is .*such as 'eval/accuracy>0\.9'"):
    Condition.parse(text)


@pytest.mark.parametrize(
  ("relation", "holds"),
  [(">", (False, False, True)), (">=", (False, True, True)), ("<", (True, False, False)),
   ("<=", (True, True, False))],
)  # fmt: skip
def test_relations(relation, holds):
  condition = Condition("x", relation, 0.5)
  assert tuple(condition.holds(value) for value in (0.4, 0.5, 0.6)) == holds
  assert not condition.holds(None)
  assert not condition.holds(math.nan)


def test_an_ending_says_why(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
  never = Ending(0.0, "")
  limit, accuracy = Ending(0.5, "", begun=0.0), Ending(0.0, "eval/accuracy>=0.9")
  latest = {"eval/accuracy": (4, 0.89), "reward": (5, 1.0)}
  assert not never.reached(latest)
  assert not limit.reached(latest)
  assert not accuracy.reached(latest)
  assert not accuracy.reached({})
  now[0], latest["eval/accuracy"] = 1800.0, (8, 0.9)
  assert not never.reached(latest)
  assert limit.reached(latest)
  assert limit.reason == "stop.after_hours is 0.5, and it has run for 0.5 hours"
  assert accuracy.reached(latest)
  assert accuracy.reason == "stop.when is eval/accuracy>=0.9, and it is 0.9 (step 8)"


def test_all_hosts_end_together(monkeypatch):
  """The reason of the host that has one becomes that of all."""
  monkeypatch.setattr(ending.hosts, "gathered_json", lambda own: [*own, "late", ""])
  waiting = Ending(1.0, "")
  assert waiting.reached({})
  assert waiting.reason == "late"
