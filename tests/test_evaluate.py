"""Tests estimators by hand and by enumeration, and that every problem counts exactly once."""

import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax import evaluate as evaluation
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.evaluate import evaluate, maj_at_k, pass_at_k, standard_error, table
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.graders import ANSWERS, GRADERS
from grpo_jax.tasks.rewards.workers import Scores, score_in_process


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
  for n in range(1, 7):
    for correct in range(n + 1):
      answers = [True] * correct + [False] * (n - correct)
      for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_numbers(bad):
  with pytest.raises(ValueError, match="need 1 <= k <= n"):
    pass_at_k(*bad)


def plurality(votes):
  """Returns the most frequent vote, of several the first; None where nothing is a vote."""
  cast = [vote for vote in votes if vote is not None]
  return max(cast, key=lambda vote: (cast.count(vote), -cast.index(vote)), default=None)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_maj_at_k_is_unbiased(k):
  """Over all sequences of n = 4 answers with their chances: the mean is that of one vote of k."""
  chances = {"right": 0.4, "wrong": 0.35, None: 0.25}

  def mean(length, value):
    return sum(
      math.prod(chances[vote] for vote in votes) * value(votes)
      for votes in itertools.product(chances, repeat=length)
    )

  expected = mean(k, lambda votes: float(plurality(votes) == "right"))
  actual = mean(4, lambda votes: maj_at_k(votes, [vote == "right" for vote in votes], k))
  assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
  ("votes", "right", "k", "expected"),
  [
    ("abb", [1, 0, 0], 3, 0.0),
    ("abb", [0, 1, 1], 3, 1.0),
    ("abba", [1, 0, 0, 1], 4, 1.0),  # a tie: a came first
    ("baab", [1, 0, 0, 1], 4, 1.0),
    ([None, None, "a"], [0, 0, 1], 3, 1.0),  # one vote against two that are none
    ([None, None, None], [1, 1, 1], 3, 0.0),
    ("abcd", [1, 0, 0, 1], 2, 0.5),  # blocks ab and cd
    ("aabb", [1, 1, 0, 0], 3, 1.0),  # the last is left over
    ("ab", [0.5, 0], 1, 0.25),
  ],
)
def test_maj_at_k_by_hand(votes, right, k, expected):
  assert maj_at_k(list(votes), right, k) == expected


@pytest.mark.parametrize("k", [0, 3])
def test_maj_at_k_refuses_impossible_numbers(k):
  with pytest.raises(ValueError, match="need 1 <= k <= n"):
    maj_at_k(["a", "b"], [1, 0], k)


def test_standard_error_by_hand():
  assert standard_error(np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx(math.sqrt(1 / 3) / 2)
  assert math.isnan(standard_error(np.array([1.0])))


@pytest.fixture(scope="module")
def run():
  return build(load("experiments/tiny.py", ["--config.task.settings.eval_size=11"]))


@pytest.fixture(scope="module")
def params(run):
  return run.to_sampling_params(run.initial_state().params)


def test_padding_the_last_batch_counts_no_problem_twice(run, params):
  examples = run.task.splits["eval"]
  whole, parts = (
    evaluate(run.sampler, params, run.task, examples, samples=4, batch_prompts=size)
    for size in (16, 8)
  )
  assert whole.metrics == parts.metrics
  assert whole.metrics["eval/n"] == 11
  assert len(whole.samples) == len(parts.samples) == 11 * (1 + 4)
  assert [s["completion"] for s in whole.samples] == [s["completion"] for s in parts.samples]
  assert set(whole.metrics) >= {"eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/pass@4_se"}


def test_samples_follow_the_key(run, params):
  examples = run.task.splits["eval"][:8]
  answers = [
    [
      s["completion"]
      for s in evaluate(
        run.sampler, params, run.task, examples, samples=1, batch_prompts=8, key=jax.random.key(k)
      ).samples
    ]
    for k in (0, 0, 1)
  ]
  assert answers[0] == answers[1]
  assert answers[0][:8] == answers[2][:8]  # greedy
  assert answers[0][8:] != answers[2][8:]


NUMBERS = [0, 1, 2, 3, 4]
TASK = Task(
  name="say the number",
  splits={"train": [], "eval": [Example(str(n), {"answer": n}, str(n)) for n in NUMBERS]},
  rewards={"numeric": (GRADERS["numeric"], 1.0)},
  accuracy=GRADERS["numeric"],
  answer=ANSWERS["numeric"],
)


class Parrot:
  """Samples known answers: greedy ones right below 2; of five samples, see `says`."""

  says = (
    ("0", "0", "0", "0", "0"),
    ("1.0", "2", "$1", "2", "one 1"),  # one right more than wrong, written in three ways
    ("3", "2", "3", "2", "none"),  # a tie, and the wrong one came first
    ("1", "none", "none", "none", "3"),
    ("5", "5", "4", "none", "4"),  # the same
  )

  def __call__(self, params, prompts, key, *, group, temperature, first_prompt):
    assert (group, temperature) in ((1, 0.0), (5, 0.7))
    numbers = [int(prompt) for prompt in prompts]
    if group == 1:
      texts = [[str(n) if n < 2 else "I do not know"] for n in numbers]
    else:
      texts = [list(self.says[n]) for n in numbers]
    lengths = np.array([[n + 1] * group for n in numbers])
    return SimpleNamespace(texts=texts, lengths=lengths, ended=lengths < 5)


@pytest.mark.parametrize("batch_prompts", [2, 5])
def test_every_number_by_hand(batch_prompts):
  """n = 5 problems. Right greedy: 0, 1; lengths 1 to 5, the last one cut off; samples above."""
  actual = evaluate(
    Parrot(), None, TASK, TASK.splits["eval"], samples=5, temperature=0.7,
    batch_prompts=batch_prompts,
  )  # fmt: skip
  correct = [5, 3, 2, 1, 2]
  expected = {
    "eval/n": 5,
    "eval/samples": 5,
    "eval/missing": 0,
    "eval/accuracy": 0.4,
    "eval/accuracy_se": math.sqrt(0.3 / 5),
    "eval/mean_length": 3,
    "eval/mean_length_se": math.sqrt(2.5 / 5),
    "eval/clipped_ratio": 0.2,
    "eval/clipped_ratio_se": 0.2,
    "eval/pass@1": 13 / 25,
    "eval/pass@2": np.mean([1 - math.comb(5 - c, 2) / 10 for c in correct]),
    "eval/pass@4": np.mean([1 - math.comb(5 - c, 4) / 5 for c in correct]),
    "eval/pass@5": 1.0,
    "eval/pass@5_se": 0.0,
    # Of the first four: 0, a tie that 1 wins, a tie that 3 wins, 1 (the only vote), 5.
    "eval/maj@4": 0.4,
    "eval/maj@4_se": math.sqrt(0.3 / 5),
    # Of all five: 0, 1, 3, a tie that 1 wins, a tie that 5 wins.
    "eval/maj@5": 0.4,
    "eval/maj@5_se": math.sqrt(0.3 / 5),
  }
  assert {name: actual.metrics[name] for name in expected} == pytest.approx(expected)
  assert set(actual.metrics) - set(expected) == {
    "eval/pass@1_se",
    "eval/pass@2_se",
    "eval/pass@4_se",
  }
  assert len(actual.samples) == 5 * 6
  assert actual.samples[5 + 5 * 1 + 4] == {
    "prompt": "1", "key": "1", "columns": {"answer": 1}, "answer": 1, "completion": "one 1",
    "accuracy": 1.0, "length": 2, "ended": True,
  }  # fmt: skip


def test_votes_of_any_text_are_normalized():
  """A task whose `answer` gives text: New York won by two spellings against Paris twice."""
  texts = ["Paris", "new  york.", "New York", "NEW YORK", "Paris"]
  task = Task(
    name="city",
    splits={},
    rewards={"exact": (GRADERS["exact"], 1.0)},
    accuracy=GRADERS["exact"],
    answer=lambda text: text,
  )

  def sampler(params, prompts, key, *, group, temperature, first_prompt):
    ones = np.ones((1, group), int)
    return SimpleNamespace(texts=[texts[:group]], lengths=ones, ended=ones > 0)

  example = Example("Where?", {"answer": "New York"}, "where")
  actual = evaluate(sampler, None, task, [example], samples=5, batch_prompts=1)
  assert actual.metrics["eval/maj@5"] == 1.0
  assert actual.metrics["eval/accuracy"] == 0.0


def test_what_was_not_judged_counts_as_wrong_and_is_counted():
  def scorer(*batch, **options):
    scores = score_in_process(TASK)(*batch, **options)
    accuracy = np.where(np.array([[prompt == "0"] for prompt in batch[0]]), np.nan, scores.accuracy)
    return Scores(scores.total, scores.per_name, accuracy, int(np.isnan(accuracy).sum()))

  actual = evaluate(Parrot(), None, TASK, TASK.splits["eval"], batch_prompts=5, scorer=scorer)
  assert actual.metrics["eval/accuracy"] == pytest.approx(0.2)
  assert actual.metrics["eval/missing"] == 1
  with pytest.raises(ValueError, match="no problems to evaluate on"):
    evaluate(Parrot(), None, TASK, [])


def test_a_table_of_before_and_after():
  after = {"eval/n": 4.0, "eval/accuracy": 0.75, "eval/accuracy_se": 0.25, "eval/pass@1": 0.5}
  before = {"eval/n": 4.0, "eval/accuracy": 0.5, "eval/accuracy_se": math.nan, "eval/missing": 2.0}
  assert table(after, "sums").splitlines() == [
    "sums (n = 4 problems)",
    "  accuracy         0.750 ± 0.250",
    "  pass@1           0.500",
  ]
  assert table(after, "sums", before).splitlines() == [
    "sums (n = 4 problems)",
    "                   before             after",
    "  accuracy         0.500              0.750 ± 0.250",
    "  missing          2.000              -",
    "  pass@1           -                  0.500",
  ]


def test_the_command_keeps_numbers_and_samples(tmp_path, capsys):
  """An untrained model by its config; end_to_end/test_train.py has a run."""
  arguments = [
    "--config", "experiments/tiny.py", "--samples", "4", "--json", "--out", str(tmp_path / "kept"),
    "--config.task.settings.eval_size=3", "--config.eval.batch_prompts=8",
    "--config.rewards.workers=0",
  ]  # fmt: skip
  assert evaluation.main(arguments) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed == json.loads((tmp_path / "kept" / "step_000000.json").read_text())
  assert printed["eval/n"] == 3
  assert printed["step"] == 0
  assert printed["task"] == "letters"
  assert {"eval/accuracy_se", "eval/mean_length_se", "eval/pass@4_se"} <= set(printed)
  lines = (tmp_path / "kept" / "step_000000_samples.jsonl").read_text().splitlines()
  assert len(lines) == 3 * (1 + 4)
  assert set(json.loads(lines[0])) == {
    "prompt", "completion", "key", "columns", "accuracy", "length", "ended"
  }  # fmt: skip


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "give --workdir (a run) or --config"),
    (["--config", "experiments/tiny.py", "--workdir", "x"], "one of them"),
    (["--workdir", "no_such_folder"], "not a work directory"),
    (["--config", "experiments/tiny.py", "--config.task.settings.eval_size=0"], "nothing out"),
  ],
)
def test_the_command_says_what_is_wrong(arguments, says, capsys):
  assert evaluation.main(arguments) == 2
  assert says in capsys.readouterr().err
