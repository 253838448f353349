"""Tests that each check of runs has its illness, and plants some of them in real runs."""

import pytest

from grpo_jax.core import diagnosis
from grpo_jax.run import completions
from grpo_jax.run.health import CHECKS
from tools import illness_batches, illness_rewards, illnesses


def test_each_check_has_its_illness():
  assert set(illnesses.PLANTED) == set(CHECKS)
  assert set(illness_batches.PLANTED) == {*diagnosis.CHECKS, "not_finite"}
  assert set(illnesses.IN_COMPLETIONS) <= {check.__name__ for check in completions.CHECKS}
  for _, rewards, *_ in (*illnesses.PLANTED.values(), *illnesses.IN_COMPLETIONS.values()):
    assert all(callable(getattr(illness_rewards, name)) for name in rewards or [])


def test_a_line_of_the_table():
  found = {"hacked": (11, "likely"), "low_entropy": (3, "possible")}
  assert illnesses.row("hacked", "how", found) == (
    "| `hacked` | how | step 11, likely | `low_entropy` |"
  )
  assert illnesses.row("solved", "how", {}) == "| `solved` | how | **not found** |  |"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no_signal", "not_general", "lost_rewards", "hacked"])
def test_an_illness_in_a_real_run_is_found(tmp_path, name):
  _, rewards, changes = illnesses.PLANTED[name]
  assert name in illnesses.said(rewards, changes, tmp_path)


@pytest.mark.slow
def test_a_healthy_run_has_no_finding(tmp_path):
  assert illnesses.said(["letters"], (), tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", illness_batches.PLANTED)
def test_a_mistake_in_a_loop_is_found(name):
  _, make = illness_batches.PLANTED[name]
  assert name in illness_batches.said(make)


@pytest.mark.slow
@pytest.mark.parametrize("how", illness_batches.HEALTHY)
def test_a_healthy_loop_has_no_finding(how):
  assert illness_batches.said(illness_batches.HEALTHY[how]) == {}
