"""Tests the estimate of a run's FLOPs, worked out by hand for the tiny model, and its text."""

import dataclasses

import pytest

from grpo_jax import summary
from grpo_jax.build import build
from grpo_jax.core.algorithms import ALGORITHMS
from tests.helpers.plans import load

# random:tiny has 2 layers of hidden size 64, 4 heads and 2 key-value heads of 16, an MLP of 128 and
# a tied vocabulary of 257.
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64  # matrices, two norms
BODY, HEAD = 2 * LAYER + 64, 257 * 64
# 8 prompts of 8 tokens, 16 completions of 6 tokens, the last of which needs no layer.
USES = BODY * (8 * 8 + 16 * 5) + HEAD * 16 * 6


@pytest.fixture(scope="module")
def run():
  return build(load())


def test_parameters(run):
  assert summary.count_parameters(run.weights) == BODY + HEAD


def test_a_step_samples_and_learns(run):
  """2 FLOPs per weight and token to sample, and 6 to learn from half of the groups."""
  assert summary.step_flops(load(), run) == (2 + 6 * 0.5) * USES


def test_remat_recomputes_the_forward_pass(run):
  assert summary.step_flops(load("model.remat=layers"), run) == (2 + 8 * 0.5) * USES


def test_a_kl_term_scores_and_learns_from_all_groups(run):
  kl = dataclasses.replace(run, algorithm=ALGORITHMS["grpo"])
  assert kl.algorithm.beta > 0
  assert summary.step_flops(load(), kl) == (2 + 6 + 2) * USES


def test_a_teacher_of_the_same_size_scores_once_more(run):
  taught = build(load("algorithm.name=opd", "teacher.source=random:tiny"))
  assert summary.step_flops(load(), taught) == (2 + 6 + 2) * USES


def test_an_evaluation_generates_greedy_answers_and_samples(run):
  problems = len(run.task.splits["eval"])
  greedy = BODY * (problems * 8 + problems * 5) + HEAD * problems * 6
  assert summary.evaluation_flops(load("eval.samples=0"), run) == 2 * greedy
  both = BODY * (2 * problems * 8 + 4 * problems * 5) + HEAD * 4 * problems * 6
  assert summary.evaluation_flops(load("eval.samples=3"), run) == 2 * both


def test_the_rate_is_that_of_the_fastest_matmul(monkeypatch):
  times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
  monkeypatch.setattr(summary.time, "perf_counter", lambda: next(times))
  assert summary.matmul_rate(size=8, repeats=3) == 2 * 8**3 / 2.0


def test_the_text(run, monkeypatch):
  """8 devices at half of 1e6 FLOP/s."""
  monkeypatch.setattr(summary, "matmul_rate", lambda: 1e6)
  c = load("steps=40", "eval.every=20")
  text = summary.describe(c, run, start=10)
  flops = 30 * summary.step_flops(c, run) + 4 * summary.evaluation_flops(c, run)
  assert f"about {summary.format_duration(flops / (8 * 1e6 * 0.5))} by" in text
  for words in (
    "random:tiny: 0.1 M parameters, 2 layers",
    f"{len(run.task.splits['train'])} training problems",
    "8 prompts x 2 completions, prompts of 8 and completions of up to 6 tokens",
    "10 to 40 on 8 x cpu",
  ):
    assert words in text
