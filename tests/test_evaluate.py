"""Evaluation: estimators by hand, and every problem counted exactly once."""

import itertools
import math

import jax
import numpy as np
import pytest

from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.evaluate import evaluate, pass_at_k, standard_error, table


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
  for n in range(1, 7):
    for correct in range(n + 1):
      answers = [True] * correct + [False] * (n - correct)
      for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        want = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("bad", [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_numbers(bad):
  with pytest.raises(ValueError, match="need 1 <= k <= n"):
    pass_at_k(*bad)


def test_standard_error_by_hand():
  assert standard_error(np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx(math.sqrt(1 / 3) / 2)
  assert math.isnan(standard_error(np.array([1.0])))


@pytest.fixture(scope="module")
def run():
  return build(load("experiments/tiny.py", ["--config.task.settings.eval_size=11"]))


def test_padding_the_last_batch_counts_no_problem_twice(run):
  params = run.for_sampling()(run.initial_state().params)
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


def test_greedy_accuracy_counts_what_the_task_calls_right(run):
  class Fixed:
    """A sampler whose answers are known: right for every third problem."""

    stop_ids = np.array([256])

    def __call__(self, params, prompts, key, *, group, temperature, first_prompt):
      assert temperature == 0.0
      texts = [["ok" if int(p.rstrip(":")) % 3 == 0 else "no7"] for p in prompts]
      shape = (len(prompts), 1, 4)
      tokens = np.full(shape, 5)
      tokens[0, 0, 2] = 256  # the first of each batch ends by itself
      mask = np.ones(shape, bool)
      mask[0, 0, 3] = False
      return type("Out", (), {"texts": texts, "tokens": tokens, "mask": mask})

  examples = run.task.splits["eval"]  # numbers 100 to 110: 102, 105 and 108 are right
  result = evaluate(Fixed(), None, run.task, examples, batch_prompts=4)
  assert result.metrics["eval/accuracy"] == pytest.approx(3 / 11)
  assert result.metrics["eval/mean_length"] == pytest.approx((11 * 4 - 3) / 11)
  assert result.metrics["eval/clipped_ratio"] == pytest.approx(8 / 11)
  assert "0.273 ± 0.141" in table(result.metrics, "x")


def test_samples_follow_the_key(run):
  params = run.for_sampling()(run.initial_state().params)
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
