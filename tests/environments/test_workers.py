"""Tests runners of environments: the same answers in both, and a fault costs one episode."""

import json
import os
import time
import warnings
from functools import partial

import pytest

from grpo_jax.environments.base import EnvironmentFault
from grpo_jax.environments.workers import EnvironmentWorkers, WorkerError, run_in_process
from grpo_jax.tasks.base import Example, Task
from tests.helpers import environments

EXAMPLES = [Example("p", {}, "p"), Example("q", {}, "q")]


@pytest.fixture(scope="module")
def workers():
  make = partial(environments.task)
  # Some of these environments kill their own process, which an isolated one cannot.
  with EnvironmentWorkers(make, workers=2, timeout=0.5, isolate=False) as runner:
    yield runner


@pytest.fixture(scope="module")
def runners(workers):
  return [workers, run_in_process(environments.task())]


def test_both_runners_answer_the_same(runners):
  answers = []
  for runner in runners:
    assert runner.reset(EXAMPLES, group=2, seeds=[7, 8]) == [None, None]
    first = runner.step({(0, 0): "a", (0, 1): "b", (1, 1): "done"})
    second = runner.step({(1, 0): "c", (0, 0): "done"})
    answers.append([first, second])
    assert [*first] == [(0, 0), (0, 1), (1, 1)]  # in the order of the texts
  assert answers[0] == answers[1]
  first, second = answers[0]
  assert [o.observation for o in first.values()] == ["a 7 1", "b 7 1", "done 8 1"]
  assert [o.done for o in first.values()] == [False, False, True]
  assert second[0, 0].observation == "done 7 2"
  assert second[0, 0].reward == 2.0
  assert not any(o.failure for o in (*first.values(), *second.values()))


def test_a_reset_may_give_the_prompt_of_its_group(runners):
  examples = [Example("p", {"orders": "prompt"}, "p"), Example("q", {}, "q")]
  for runner in runners:
    assert runner.reset(examples, group=3, seeds=[7, 8]) == ["p 7", None]


class WithoutSeed:
  def reset(self, example):
    return f"{example.prompt}!"

  def step(self, text):
    return text, None, True


class WithoutStep:
  def reset(self, example):
    return None


class Strange:
  """Returns a reward that raises when it is looked at."""

  ndim = 0

  def item(self):
    raise OSError("gone")

  def reset(self, example):
    return None

  def step(self, text):
    return text, self, True


def test_strange_environments_cost_their_episodes():
  for make, message in [
    (WithoutStep, "class 'WithoutStep' has no method step"),
    (lambda: None, "class 'NoneType' has no method reset"),
    (lambda: 1 / 0, "constructor raised ZeroDivisionError"),
    (Strange, "step gave something that raised OSError: gone"),
  ]:
    runner = run_in_process(Task("strange", {}, {}, len, environment=make))
    assert runner.reset([EXAMPLES[0]], 1, [0]) == [None]
    with pytest.warns(RuntimeWarning, match="lost 1 of 1 episodes"):
      assert message in runner.step({(0, 0): "a"})[0, 0].failure


def test_an_environment_without_chance_needs_no_seed():
  runner = run_in_process(Task("plain", {}, {}, len, environment=WithoutSeed))
  assert runner.reset([EXAMPLES[0]], 2, [0]) == ["p!"]
  assert runner.step({(0, 0): "a"})[0, 0].failure is None


def test_a_group_whose_prompts_differ_is_named(runners):
  examples = [EXAMPLES[0], Example("q", {"orders": "differ"}, "q")]
  for runner in runners:
    with pytest.raises(EnvironmentFault, match="different prompts for the group of prompt 1"):
      runner.reset(examples, group=2, seeds=[0, 0])


def test_a_reset_that_fails_costs_its_episodes(runners):
  orders = ["raise", "sleep"]
  for runner, count in zip(runners, (2, 1)):
    examples = [Example("p", {"orders": order}, "p") for order in orders[:count]]
    assert runner.reset([*examples, EXAMPLES[1]], 1, [0] * (count + 1)) == [None] * (count + 1)
    with pytest.warns(RuntimeWarning, match="the environment's reset"):
      outcomes = runner.step({(p, 0): "a" for p in range(count + 1)})
    failures = [outcome.failure for outcome in outcomes.values()]
    assert failures[0] == "reset raised KeyError: 'no such problem'"
    assert failures[-1] is None
    assert failures[1:-1] == ["reset took more than 0.5 s"] * (count - 1)


WRONG = {
  "raise": "step raised KeyError: 'missing'",
  "exit": "step raised SystemExit: 3",
  "two": "a tuple of 2: it must return a Step, or a tuple (observation, reward, done)",
  "four": "step returned a tuple of 4",
  "none": "step returned None (NoneType)",
  "list": "step returned ['a', 1.0, False] (list)",
  "text reward": "the reward '1.0' (str): it must be a finite number of at most 1e+15 either way",
  "nan": "the reward nan (float)",
  "inf": "the reward inf (float)",
  "huge": "the reward 1000",
  "done 1": "step returned done=1 (int): it must be True or False",
  "number": "the observation 3 (int): it must be text, or a list of chat messages",
  "bytes": "the observation b'a' (bytes)",
  "message": "the observation {'role': 'user', 'content': 'a'} (dict)",
  "no role": "the observation [{'content': 'a'}] (list)",
  "not plain": "not plain data",
  "long": "the observation of 10,000,000 characters: at most 1,000,000 are allowed",
  "metrics": "step returned metrics={'x': 'y'} (dict): it must be name -> number",
}


@pytest.mark.parametrize("isolated", [True, False])
def test_what_a_step_must_not_do_costs_its_episode(runners, isolated):
  runner = runners[0 if isolated else 1]
  runner.reset([Example(text, {}, text) for text in WRONG], group=2, seeds=[0] * len(WRONG))
  texts = {(p, 0): text for p, text in enumerate(WRONG)}
  texts |= {(p, 1): "fine" for p in range(len(WRONG))}
  with pytest.warns(RuntimeWarning):
    outcomes = runner.step(texts)
  for p, (text, message) in enumerate(WRONG.items()):
    assert message in outcomes[p, 0].failure, text
    assert outcomes[p, 0].done
    assert outcomes[p, 0].reward is None
    assert outcomes[p, 1].failure is None
    assert outcomes[p, 1].observation == "fine 0 1"
  # It stays lost, and the others go on.
  with pytest.warns(RuntimeWarning):
    outcomes = runner.step({(0, 0): "fine", (0, 1): "fine"})
  assert outcomes[0, 0].failure == WRONG["raise"]
  assert outcomes[0, 1].observation == "fine 0 2"


def test_what_a_step_may_return(runners):
  for runner in runners:
    runner.reset([EXAMPLES[0]] * 3, group=1, seeds=[0] * 3)
    outcomes = runner.step({(0, 0): "array", (1, 0): "messages", (2, 0): "surrogate"})
    assert (outcomes[0, 0].reward, outcomes[0, 0].done) == (0.5, True)
    assert outcomes[1, 0].observation == [{"role": "user", "content": "a"}]
    assert outcomes[2, 0].observation == "a?"  # half a surrogate pair is not text


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("sleep", "step took more than 0.5 s"),
    ("spin", "step took more than 0.5 s"),
    ("swallow", "step took more than 0.5 s"),
    ("hang in c", "step took more than 0.5 s"),
    ("die", "step ended its process (exit code 3)"),
    ("kill", "step ended its process (signal SIGKILL)"),
  ],
)
def test_a_hang_or_a_crash_costs_its_own_episode(workers, text, reason):
  """Plays the other five on where they were, also those of the same process."""
  workers.reset(EXAMPLES, group=3, seeds=[1, 2])
  keys = [(p, g) for p in range(2) for g in range(3)]
  workers.step(dict.fromkeys(keys, "a"))
  workers.step(dict.fromkeys(keys[1:], "b"))
  began = time.monotonic()
  with pytest.warns(RuntimeWarning, match="lost 1 of 5 episodes"):
    outcomes = workers.step(dict.fromkeys(keys[2:], "c") | {(0, 1): text})
  assert time.monotonic() - began < 15
  assert outcomes[0, 1].failure == reason
  for p, g in keys[2:]:
    assert outcomes[p, g].observation == f"c {p + 1} 3"
    assert outcomes[p, g].failure is None
  assert workers.step({(0, 0): "b"})[0, 0].observation == "b 1 2"


def test_several_faults_in_one_batch(workers):
  workers.reset(EXAMPLES, group=4, seeds=[1, 2])
  bad = {(0, 0): "die", (0, 1): "hang in c", (1, 0): "kill", (1, 3): "raise"}
  keys = [(p, g) for p in range(2) for g in range(4)]
  with pytest.warns(RuntimeWarning):
    outcomes = workers.step({key: bad.get(key, "a") for key in keys})
  for key in keys:
    assert (outcomes[key].failure is not None) == (key in bad)


def test_an_episode_that_cannot_be_played_again_is_lost(workers):
  workers.reset([EXAMPLES[0]], group=5, seeds=[1])
  workers.step({(0, g): "vary" if g == 2 else "a" for g in range(5)})
  with pytest.warns(RuntimeWarning):
    outcomes = workers.step({(0, 0): "die", (0, 4): "b", (0, 3): "c"})
  assert outcomes[0, 3].observation == "c 1 2"
  assert outcomes[0, 4].observation == "b 1 2"
  with pytest.warns(RuntimeWarning):
    outcomes = workers.step({(0, 2): "a", (0, 1): "b"})
  assert "played again it did not answer the same" in outcomes[0, 2].failure
  assert outcomes[0, 1].failure is None


def test_an_episode_that_is_lost_when_it_is_restored_says_why(workers):
  """Sends its next turn in the same batch."""
  workers.reset([EXAMPLES[0]], group=3, seeds=[1])
  workers.step({(0, 2): "vary", (0, 0): "a"})
  with pytest.warns(RuntimeWarning):
    outcomes = workers.step({(0, 0): "die", (0, 2): "b", (0, 1): "c"})
  assert "played again it did not answer the same" in outcomes[0, 2].failure
  assert outcomes[0, 0].failure == "step ended its process (exit code 3)"
  assert outcomes[0, 1].failure is None
  with pytest.warns(RuntimeWarning):
    assert "played again" in workers.step({(0, 2): "b"})[0, 2].failure


def test_episodes_out_of_budget_are_finished(runners):
  for runner in runners:
    runner.reset(EXAMPLES, group=2, seeds=[0, 0])
    runner.step({(0, 0): "done"})
    assert runner.finish([(0, 0), (0, 1)]) == {(0, 0): None, (0, 1): 0.5}
    with pytest.raises(ValueError, match=r"episode \(0, 1\) is over"):
      runner.step({(0, 1): "a"})


def test_arguments_are_checked(workers):
  with pytest.raises(ValueError, match="there is no episode"):
    workers.step({(9, 9): "a"})
  with pytest.raises(ValueError, match="2 examples but 1 seeds"):
    workers.reset(EXAMPLES, 1, [0])
  with pytest.raises(ValueError, match="workers is 0 and timeout 30"):
    EnvironmentWorkers(partial(environments.task), workers=0)
  with pytest.raises(ValueError, match="cannot be built in another process"):
    EnvironmentWorkers(lambda: environments.task())
  no_environment = Task("plain", {}, {}, len)
  with pytest.raises(ValueError, match="task 'plain' has no environment"):
    run_in_process(no_environment)


def test_a_task_that_a_worker_cannot_build_is_an_error():
  make = partial(environments.task, error="no such file")
  with (
    EnvironmentWorkers(make) as runner,
    pytest.raises(WorkerError, match="could not build the task: ValueError: no such file"),
  ):
    runner.reset(EXAMPLES, 1, [0, 0])


def test_isolated_workers_have_no_network_and_no_secrets(monkeypatch):
  monkeypatch.setenv("SECRET", "key")
  with EnvironmentWorkers(partial(environments.task), timeout=5.0) as runner:
    runner.reset(EXAMPLES, 1, [0, 0])
    with pytest.warns(RuntimeWarning):
      outcomes = runner.step({(0, 0): "secret", (1, 0): "connect"})
  assert outcomes[0, 0].observation == "None"
  assert "PermissionError" in outcomes[1, 0].failure
  assert "set rewards.isolate=false" in outcomes[1, 0].failure


def test_a_worker_that_ended_between_two_turns_is_replaced(workers):
  workers.reset(EXAMPLES, group=2, seeds=[1, 2])
  workers.step({(0, 0): "a", (1, 1): "a"})
  os.kill(workers._workers[0]._process.pid, 9)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    outcomes = workers.step({(0, 0): "b", (0, 1): "b", (1, 1): "b"})
  assert [o.observation for o in outcomes.values()] == ["b 1 2", "b 1 1", "b 2 2"]


@pytest.mark.parametrize(
  "message",
  [
    b"not JSON",
    json.dumps(["done", [[5, 5], "outcome", ["a", 1.0, False, None, {}]]]).encode(),
    json.dumps(["done", [[0, 0], "outcome", ["a", "1", False, None, {}]]]).encode(),
    json.dumps(["done", [[0, 0], "prompt", "a"]]).encode(),
    json.dumps(["done", [[0, 0], "outcome", [1, 2]]]).encode(),
    json.dumps(["rewards", 3]).encode(),
    json.dumps([["at"], 3]).encode(),
    json.dumps(["at", [7, 7]]).encode(),
    json.dumps(["at", [0, 0]]).encode(),
  ],
)
def test_a_message_that_is_not_an_answer_costs_the_episode(workers, message, monkeypatch):
  workers.reset([EXAMPLES[0]], group=1, seeds=[1])
  worker = workers._workers[0]
  handle, forged = worker._handle, []

  def forge(kind, value):
    if kind == "done" and not forged:
      forged.append(True)
      return handle(*json.loads(message))
    return handle(kind, value)

  monkeypatch.setattr(worker, "_handle", forge)
  with pytest.warns(RuntimeWarning):
    outcome = workers.step({(0, 0): "a"})[0, 0]
  assert "sent something that is not an answer" in outcome.failure


def test_an_interrupted_call_leaves_no_answer_for_the_next_one(workers, monkeypatch):
  from grpo_jax.environments import workers as module

  workers.reset(EXAMPLES, 1, [0, 0])

  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
      workers.step({(0, 0): "a"})
  workers.reset(EXAMPLES, 1, [3, 3])
  assert workers.step({(0, 0): "a"})[0, 0].observation == "a 3 1"
