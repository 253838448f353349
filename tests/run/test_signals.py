"""Tests that a first signal asks for a stop after the step, and that handlers are put back."""

import os
import signal
import threading

import pytest

from grpo_jax.run.signals import Signals, Stopped


def test_a_signal_is_noted_and_the_step_goes_on(capsys):
  with Signals() as signals:
    assert signals.of_any_host(0) == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.of_any_host(0) == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # some schedulers send it twice
    assert signals.of_any_host(0) == signal.SIGTERM
  assert "SIGTERM: finishing this step, then saving\n" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(capsys):
  with Signals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.of_any_host(0) == signal.SIGINT
    assert "Ctrl-C: finishing this step, then saving (again: stop at once)" in (
      capsys.readouterr().out
    )
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_it_is_told_how_long_steps_and_saving_take(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr("grpo_jax.run.signals.time.monotonic", lambda: now[0])
  with Signals() as signals:
    signals.of_any_host(0)
    now[0] = 112.5
    signals.of_any_host(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert "finishing this step, then saving; the last one took 12.5 s" in capsys.readouterr().out
    now[0] = 120.0
    with pytest.raises(Stopped) as caught:
      signals.check(3, signals.of_any_host(2))
  now[0] = 123.5  # the files are written
  assert caught.value.since() == " (saved 11.0 s after the signal)"
  assert Stopped("of another host", signal.SIGTERM).since() == ""


def test_a_notice_of_the_preemption_service_counts_as_sigterm(monkeypatch):
  monkeypatch.setattr("grpo_jax.distributed.hosts.reached_preemption", lambda step: step == 3)
  signals = Signals()
  assert [signals.of_any_host(step) for step in range(5)] == [0, 0, 0, signal.SIGTERM, 0]


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
      stops.append((signals.of_any_host(0), signal.getsignal(signal.SIGTERM)))

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
