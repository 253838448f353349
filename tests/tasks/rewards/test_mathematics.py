"""Tests the comparison of mathematical answers: numbers of any size, and the time it takes."""

import signal
import time

import pytest

from grpo_jax.tasks.rewards import mathematics
from grpo_jax.tasks.rewards.graders import make_grader
from grpo_jax.tasks.rewards.loading import ExactlyOne

# (answer, correct answer, verdict)
# fmt: off
VERDICTS = [
  ('0.333333', '1/3', True),
  ('\\frac13', '0.333333', True),
  ('0.333', '1/3', False),
  ('3.14159', '\\pi', True),
  ('3.14', '\\pi', False),
  ('1.0000001', '1', False),
  ('0.1234567', '0.1234568', False),
  ('0.12345679', '0.1234568', True),
  ('1000000.5', '1000001', False),
  ('(0.0000001, 2)', '(0.0000002,2)', False),
  ('(10^{-20}, 2)', '(10^{-21},2)', False),
  ('\\{10^{-20}\\}', '\\{2\\cdot10^{-20}\\}', False),
  ('x=10^{-20}', 'x=2\\cdot 10^{-20}', False),
  ('10^{-20}x', '2\\cdot10^{-20}x', False),
  ('[0,10^{-20}]', '[0,10^{-21}]', False),
  ('\\begin{pmatrix}10^{-20}\\\\2\\end{pmatrix}', '\\begin{pmatrix}0\\\\2\\end{pmatrix}', False),
  ('\\frac{2^{100}+1}{3\\cdot2^{101}}', '\\frac16', False),
  ('\\sqrt{2}+10^{-30}', '\\sqrt2', False),
  ('\\sqrt{2}\\cdot\\sqrt{3}', '\\sqrt6', True),
  ('\\sin^2(1)+\\cos^2(1)', '1', True),
  ('\\sqrt{3+2\\sqrt2}', '1+\\sqrt2', True),
  ('2×10⁻²⁰', '2\\cdot10^{-20}', True),
  ('½x', '\\frac{x}{2}', True),
  ('x²+1', '1+x^2', True),
  ('√(x+1)', '\\sqrt{x+1}', True),
  ('1e20', '10^{20}', True),
  ('2e-7', '2\\times10^{-7}', True),
  ('2e-7', '3\\times10^{-7}', False),
  ('50\\%', '0.5', True),
  ('18%', '18', True),
  ('0.5%', '50%', False),
  ('50%', '0.05', False),
  ('0.5', '50', False),
  ('\\frac{1}{2}\\%', '0.5', True),
  ('5!', '120', True),
  ('5!', '5', False),
  ('log(100)', '100', False),
  ('\\log_{10}100', '2', True),
  ('(1,5)', '5', False),
  ('3 remainder 2', '2', False),
  ('3 or 4', '4', False),
  ('x<5', '5', False),
  ('|-5|', '5', True),
  ('|-5|', '-5', False),
  ('5i', '5', False),
  ('1, 5', '5', False),
  ('5,1', '1,5', True),
  ('0.\\overline{3}', '3', False),
  ('5\\bmod 3', '3', False),
  ('∅', '\\varnothing', True),
  ('(−∞,3)', '(-\\infty,3)', True),
  ('x≤3', 'x\\le 3', True),
  ('2π', '2\\pi', True),
  ('π/2', '\\frac{\\pi}{2}', True),
  ('x∈[1,2]', '[1,2]', True),
  ('٤٢', '42', True),
  ('ℝ', '\\mathbb{R}', True),
  ('ℝ', '(-\\infty,\\infty)', True),
  ('ℝ', 'R', False),
  ('x∈ℤ', 'x\\in\\mathbb{Z}', True),
  ('3 \\pm 2', '1,5', True),
  ('2\\sqrt{3}', '3.4641016', True),
  ('2\\sqrt{3}', '3.46', False),
  ('e^{10}', '22026.4657948', True),
  ('3:4', '\\frac34', True),
  ('\\binom{5}{2}', '10', True),
  ('\\binom{10}{3}\\cdot 2^5', '3840', True),
  ('1+2i', '2i+1', True),
  ('10^{100}', '10^{100}+1', False),
  ('1000000', '1000001', False),
  ('\\frac{1000000}{1000001}', '\\frac{1000001}{1000002}', False),
  ('2024!', '2024!', True),
  ('\\frac{2024!}{2023!}', '2024', True),
  ('2^{1000}', '2^{1000}+1', False),
  ('(x+1)^{10}', '(1+x)^{10}', True),
  ('x^{2024}-1', '-1+x^{2024}', True),
  ("0.0000001", "0.0000002", False),
  ("1.6\\times10^{-19}", "9.1\\times 10^{-31}", False),
  ("\\frac{1}{52!}", "\\frac{1}{51!}", False),
  ("\\frac{3^{500}+1}{3^{501}}", "\\frac{1}{3^{501}}", False),
]
HOSTILE = [
  "9!!!!!!!!!", "9" + "!" * 400, "(" * 90 + "1" + ")" * 90, "9^{9^{9^{9}}}", "(x+y+z)^{10000}",
  "\\sum_{i=1}^{10^{12}} i^{i}", "\\binom{10^{10}}{10^{9}}", "\\binom{99999999}{9999999}",
  "99999999 \\choose 9999999", "\\gcd(10^{10^{10}},3)", "\\frac{1}{9^{9^9}}", "100000000000!",
  "\\begin{vmatrix}9^{9^9}&1\\\\1&2\\end{vmatrix}", "\\sin(10^{10^{10}})", "e^{e^{e^{e^{e}}}}",
  "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{100000000}", "0.1^{9999999999}", "2^{99999999.5}",
  "(\\sqrt2+1)^{99999999}", "\\prod_{i=1}^{10^{9}} i", "9!^{9!}", "\\exp(\\exp(\\exp(100)))",
]
# fmt: on


def verdict(answer, gold):
  return make_grader("math")(completions=[f"\\boxed{{{answer}}}"], answer=[gold])[0]


@pytest.mark.parametrize(("answer", "gold", "equal"), VERDICTS)
def test_verdicts(answer, gold, equal):
  assert verdict(answer, gold) == float(equal)


def test_hostile_answers_are_wrong_at_once():
  verdict("2\\sqrt{3}", "\\sqrt{12}")  # loads the parser
  start = time.monotonic()
  for gold in ("5", "\\sqrt{2}"):
    assert [text for text in HOSTILE if verdict(text, gold)] == []
  assert time.monotonic() - start < 10  # it takes 2 s


def test_equal_pairs_are_compared_once_by_reward_and_accuracy(monkeypatch):
  compared = []

  def is_same(expected, answer):
    compared.append((expected, answer))
    return expected == answer

  monkeypatch.setattr(mathematics, "_is_same", is_same)
  monkeypatch.setattr(mathematics, "_verdicts", {})
  batch = {"completions": ["\\boxed{1}", "\\boxed{2}", "3"] * 8, "answer": ["1"] * 24}
  assert make_grader("math")(**batch) == [1.0, 0.0, 0.0] * 8
  assert ExactlyOne(make_grader("math"))(**batch) == [1.0, 0.0, 0.0] * 8
  assert compared == [("1", "1"), ("1", "2")]


def test_the_time_that_one_call_loses_is_bounded(monkeypatch):
  """Gives a comparison at most a third of the time that is left; short answers come first."""

  def is_same(expected, answer):
    while answer.startswith("slow"):
      time.sleep(0.001)
    return True

  monkeypatch.setattr(mathematics, "_is_same", is_same)
  monkeypatch.setattr(mathematics, "_verdicts", {})
  monkeypatch.setattr(mathematics, "MAX_LOST_SECONDS", 0.6)
  answers = [f"slow {i}" for i in range(30)] + ["fast"]
  start = time.monotonic()
  assert mathematics.same_mathematics(["1"] * 31, answers) == [False] * 30 + [True]
  assert time.monotonic() - start < 2


def test_an_alarm_that_rings_too_early_or_too_late_is_ignored():
  for _ in range(200):  # shorter than it takes to begin and to end a comparison
    assert mathematics._within(lambda: time.sleep(0.0001) or True, 0.0001) in (None, True)
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_memory_of_verdicts_is_bounded(monkeypatch):
  monkeypatch.setattr(mathematics, "_verdicts", {})
  monkeypatch.setattr(mathematics, "MAX_VERDICTS", 3)
  texts = [str(i) for i in range(5)]
  assert mathematics.same_mathematics(texts, texts) == [True] * 5
  assert len(mathematics._verdicts) == 3
