"""Tests that a first signal asks for a stop after the step, and that handlers are put back."""

import os
import signal
import threading

import pytest

from grpo_jax.run.signals import Signals, Stopped


def test_a_signal_is_noted_and_the_step_goes_on(capsys):
  with Signals() as signals:
    assert signals.of_any_host() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.of_any_host() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # some schedulers send it twice
    assert signals.of_any_host() == signal.SIGTERM
  assert "SIGTERM: finishing this step, then saving\n" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(capsys):
  with Signals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.of_any_host() == signal.SIGINT
    assert "Ctrl-C: finishing this step, then saving (again: stop at once)" in (
      capsys.readouterr().out
    )
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  with Signals():
    assert all(signal.getsignal(number) != handler for number, handler in before.items())
    os.kill(os.getpid(), signal.SIGINT)
  assert {number: signal.getsignal(number) for number in before} == before


def test_outside_the_main_thread_signals_are_left_alone():
  before, stops = signal.getsignal(signal.SIGTERM), []

  def enter():
    with Signals() as signals:
      stops.append((signals.of_any_host(), signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert stops == [(0, before)]


def test_a_check_raises_only_after_a_signal():
  signals = Signals()
  signals.check(3, 0)
  with pytest.raises(Stopped, match="stopped after step 3, which is saved") as caught:
    signals.check(3, signal.SIGTERM)
  assert caught.value.exit_code == 143


def test_stopped_carries_the_exit_code_of_shells():
  assert Stopped("x", signal.SIGINT).exit_code == 130
  assert Stopped("x", signal.SIGTERM).exit_code == 143
