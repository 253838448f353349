"""Tests the time limit of a call: what it interrupts, and what it leaves as it was."""

import signal
import time

import pytest

from grpo_jax.environments.time_limit import OutOfTime, call_within


def swallow():
  """Hangs, and swallows the first interruptions."""
  for _ in range(3):
    try:
      time.sleep(60)
    except BaseException:
      continue
  time.sleep(60)


@pytest.mark.parametrize(
  "call", [lambda: time.sleep(60), lambda: [0 for _ in iter(int, 1)], swallow]
)
def test_a_call_is_interrupted(call):
  handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
  with pytest.raises(OutOfTime):
    call_within(0.1, call)
  assert time.monotonic() - began < 10
  assert signal.getsignal(signal.SIGALRM) is handler
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_call_in_time_returns_its_value():
  assert call_within(60.0, max, 3, 4) == call_within(None, max, 3, 4) == 4
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def inner(seconds):
  """Sleeps under a limit of its own, which it survives, and then for ever."""
  try:
    call_within(seconds, time.sleep, 60)
  except OutOfTime:
    time.sleep(60)


@pytest.mark.parametrize("seconds", [0.05, 60.0])
def test_the_limit_of_an_outer_call_goes_on(seconds):
  began = time.monotonic()
  with pytest.raises(OutOfTime):
    call_within(0.3, inner, seconds)
  assert 0.3 <= time.monotonic() - began < 10
