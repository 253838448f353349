"""Tests the verdicts of the graders on answers as models write them, and their time limits."""

import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from grpo_jax.tasks import RewardError, score
from grpo_jax.tasks.rewards.golds import MAX_MATH_LENGTH as MATH_LENGTH
from grpo_jax.tasks.rewards.graders import (
  ANSWERS,
  GRADERS,
  make_grader,
)
from grpo_jax.tasks.rewards.mathematics import _within
from tests.tasks.rewards.test_answers import HOSTILE

# (answer of the completion, correct answer, verdict)
# fmt: off
VERDICTS = [
  ("18", "18", True),
  ("1,234", "1234", True),
  ("$18", "18", True),
  ("18 dollars", "18", True),
  ("−5", "−5", True),
  ("−5", "-5", True),
  ("−5", "5", False),
  ("-5", "5", False),
  ("5", "-5", False),
  ("3 boxes with 6 each make 18", "18", True),
  ("18 is wrong, it is 17", "18", False),
  ("1,234", "1", False),
  ("1,234", "234", False),
  ("1{,}234", "1234", True),
  ("1\\,234", "1,234", True),
  ("12,345,678", "12345678", True),
  ("$1,234.50", "1234.5", True),
  ("\\$18.00", "18", True),
  ("-$18", "-18", True),
  ("$-18$", "-18", True),
  ("–5", "-5", True),
  ("- 5", "-5", True),
  ("18.", "18", True),
  ("18.0", "18", True),
  ("18.5", "18", False),
  (".5", "0.5", True),
  (".5", "5", False),
  ("18%", "18", True),
  ("18\\%", "18", True),
  ("18 km/h", "18", True),
  ("18 cm^2", "18", True),
  ("18 \\text{ square feet}", "18", True),
  ("\\text{18 eggs}", "18", True),
  ("90^\\circ", "90", True),
  ("x = 18", "18", True),
  ("**18**", "18", True),
  ("1/2", "0.5", True),
  ("\\frac{1}{2}", "0.5", True),
  ("\\dfrac12", "1/2", True),
  ("-\\frac{1}{2}", "-0.5", True),
  ("-\\frac{1}{2}", "0.5", False),
  ("1 1/2", "1.5", True),
  ("1\\frac{1}{2} cups", "3/2", True),
  ("3/4", "4", False),
  ("3/4", "3", False),
  ("\\sqrt{2}", "2", False),
  ("3\\pi", "3", False),
  ("7 dozen eggs", "7", True),
  ("4 million", "4", True),
  ("2^{10}", "10", False),
  ("2^{10}", "2", False),
  ("3 \\times 6", "6", False),
  ("20 - 2", "2", False),
  ("20-2", "-2", False),
  ("3x + 2", "2", False),
  ("12:30", "30", False),
  ("1,2,3", "3", False),
  ("CO2", "2", False),
  ("none", "0", False),
  ("", "0", False),
]
TEMPLATES = [
  "So it is this.\n<answer>{}</answer>",
  "Four groups, \\boxed{{{}}}.",
  "<answer>\\boxed{{{}}}</answer>",
  "3 + 15 = 18\n#### {}",
  "<answer>7</answer> No, wait.\n<answer>{}</answer>",
]
# fmt: on


def verdict(name, completion, answer):
  (value,) = GRADERS[name](completions=[completion], answer=[answer])
  return value


@pytest.mark.parametrize("name", ["numeric", "math"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_verdicts(name, template):
  wrong = [
    (text, answer)
    for text, answer, correct in VERDICTS
    if (text or "7" not in template)  # an empty tag does not replace the earlier one
    and verdict(name, template.format(text), answer) != float(correct)
  ]
  assert wrong == []


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
def test_the_last_closed_mark_is_graded(name):
  assert verdict(name, "<answer>17</answer> or rather <answer>18</answer>", "18") == 1.0
  assert verdict(name, "<answer>17</answer> or rather <answer>18</answer>", "17") == 0.0
  assert verdict(name, "It is <answer>18", "18") == 0.0
  assert verdict(name, "It is \\boxed{18", "18") == 0.0
  assert verdict(name, "It is \\boxed{18} \\boxed{17", "18") == 1.0


def test_correct_answers_of_any_type():
  golds = [18, 18.0, np.int64(18), np.float32(18), Fraction(18), "18", "2 * 9 = 18\n#### 18", None]
  values = GRADERS["numeric"](completions=["It is 18."] * 8, answer=golds)
  assert values == [1.0] * 7 + [None]
  assert GRADERS["numeric"](completions=["0.1"], answer=[0.1]) == [1.0]
  assert verdict("math", "\\boxed{18}", "so \\boxed{18}") == 1.0
  assert verdict("math", "\\boxed{18}", 18) == 1.0
  for bad in ("eighteen", "3 or 4", "\\pi/2", True):
    with pytest.raises(RewardError, match=r"number.* The grader 'exact' or 'math' reads this one"):
      score({"n": (GRADERS["numeric"], 1.0)}, ["p"], [["18"]], {"answer": [bad]})


def test_tolerance_is_relative():
  within = make_grader("numeric", tolerance=0.01)
  assert within(completions=["99", "101", "98.9", "-100"], answer=[100] * 4) == [1, 1, 0, 0]
  assert within(completions=["0", "0.001"], answer=[0, 0]) == [1, 0]


def test_exact_compares_text():
  correct = ["Paris", " paris. ", "<answer>PARIS</answer>", "\\boxed{\\text{Paris}}"]
  wrong = ["It is Paris", "Pari", "", "<answer>Paris", "Paris Paris"]
  values = GRADERS["exact"](completions=correct + wrong, answer=["Paris"] * 9)
  assert values == [1.0] * 4 + [0.0] * 5
  assert verdict("exact", "18.0", "18") == 0.0
  assert verdict("exact", "−5", -5) == 1.0


# fmt: off
MATHEMATICS = [
  ("2\\sqrt{3}", "\\sqrt{12}", True),
  ("(x+1)^2", "x^2+2x+1", True),
  ("\\{2, 1\\}", "\\{1,2\\}", True),
  ("(2, 1)", "(1, 2)", False),
  ("10^{3}", "1000", True),
  ("50\\%", "0.5", True),
  ("\\frac{\\pi}{2}", "\\pi/2", True),
  ("3,2", "2", False),
  ("3 x", "3", False),
  ("B", "\\text{(B)}", True),
  ("A", "\\text{(B)}", False),
  ("x \\le 3", "x\\leq 3", True),
  ("0.333", "1/3", False),
]
# fmt: on


@pytest.mark.parametrize(("answer", "gold", "correct"), MATHEMATICS)
def test_math(answer, gold, correct):
  assert verdict("math", f"\\boxed{{{answer}}}", gold) == float(correct)


def test_math_needs_a_marked_short_answer():
  assert verdict("math", "It is 18.", "18") == 0.0
  assert verdict("math", "\\boxed{" + "1+" * MATH_LENGTH + "1}", MATH_LENGTH + 1) == 0.0
  assert verdict("math", "\\boxed{18}", None) is None


def test_math_works_in_any_thread():
  values = []
  thread = threading.Thread(
    target=lambda: values.append(verdict("math", "\\boxed{2\\sqrt{3}}", "\\sqrt{12}"))
  )
  thread.start()
  thread.join()
  assert values == [1.0]


def test_math_has_a_time_limit_in_the_main_thread(monkeypatch):
  monkeypatch.setattr("grpo_jax.tasks.rewards.mathematics.MAX_SECONDS", 1)
  start = time.monotonic()
  assert verdict("math", "\\boxed{\\sum_{i=1}^{1000000000} i^{7.5}}", "5") == 0.0
  assert time.monotonic() - start < 5


def test_the_alarm_repeats_while_its_exception_is_swallowed():
  swallowed = []

  def swallow():
    while len(swallowed) < 3:
      try:
        while True:
          time.sleep(0.01)
      except BaseException as error:  # as libraries do
        swallowed.append(error)
    while True:
      time.sleep(0.01)

  before = signal.getsignal(signal.SIGALRM)
  assert not _within(swallow, 0.1)
  assert len(swallowed) == 3
  assert signal.getsignal(signal.SIGALRM) is before
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
  assert _within(lambda: True, 1.0) is True


def test_a_missing_math_verify_is_named(monkeypatch):
  from grpo_jax.tasks.rewards import mathematics

  mathematics.require_math_verify.cache_clear()
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"needs math_verify: pip install 'grpo_jax\[tasks\]'"):
    make_grader("math")


# fmt: off
FORMATS = [
  ("<think>a</think><answer>b</answer>", 1),
  ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
  ("<think>a</think><answer>b</answer> bye", 0),
  ("hello <think>a</think><answer>b</answer>", 0),
  ("<think>a</think> so <answer>b</answer>", 0),
  ("<think>a</think><answer>b", 0),
  ("<think>a<answer>b</answer></think>", 0),
  ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
  ("<think>a</think><think>a</think><answer>b</answer>", 0),
  ("<think>a <think> a</think><answer>b</answer>", 0),
  ("<think>a</think><answer>b</answer></answer>", 0),
  ("<think>the <answer> tag</think><answer>b</answer>", 0),
  ("<think>a</think><answer>b</think></answer>", 0),
  ("<answer>b</answer><think>a</think>", 0),
  ("<think> </think><answer>b</answer>", 0),
  ("<think>a</think><answer></answer>", 0),
  ("", 0),
]
# fmt: on


@pytest.mark.parametrize(("completion", "value"), FORMATS)
def test_format(completion, value):
  assert GRADERS["format"](completions=[completion]) == [value]
  if completion.startswith("<think>"):
    opened = make_grader("format", opened=True)
    assert opened(completions=[completion.removeprefix("<think>"), completion]) == [value, 0]
  other = completion.replace("think>", "reasoning>")
  assert make_grader("format", tags=["reasoning", "answer"])(completions=[other]) == [value]


def test_soft_overlong_is_equation_13_of_dapo():
  """Takes the paper's L_max = 20480, L_cache = 4096: 0 up to 16384, then -1/4096 per token."""
  penalty = make_grader("soft_overlong", max_length=20480, buffer=4096)
  rewards = penalty(completion_lengths=[1, 16384, 16385, 18432, 20480, 20481])
  assert rewards == [0, 0, -1 / 4096, -0.5, -1, -1]


def test_length_rewards_count_tokens_and_not_characters():
  rewards = {
    "soft_overlong": (make_grader("soft_overlong", max_length=4, buffer=2), 1.0),
    "length": (make_grader("length", target=2), 10.0),
  }
  texts = [["some long text", "x"], ["", "yy"]]
  total, _ = score(rewards, ["p", "q"], texts, {"answer": ["a", "b"]}, [[2, 3], [1, 4]])
  np.testing.assert_array_equal(total, [[0, -5.5], [-5, -11]])
  with pytest.raises(RewardError, match="requires completion_lengths, which is not available"):
    score(rewards, ["p", "q"], texts, {})


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("numerik", {}, "did you mean 'numeric'"),
    ("length", {}, "needs the setting 'target'"),
    ("length", {"target": 0}, "target is 0"),
    ("length", {"goal": 5}, "unknown setting of grader 'length' 'goal'"),
    ("exact", {"case": True}, "unknown setting of grader 'exact' 'case'"),
    ("numeric", {"tolerance": -1}, "tolerance is -1"),
    ("soft_overlong", {"max_length": 5, "buffer": 6}, "0 < buffer <= max_length"),
    ("soft_overlong", {"max_length": 5, "buffer": 0}, "0 < buffer <= max_length"),
    ("format", {"tags": "think"}, "tags is 'think'"),
  ],
)
def test_wrong_settings(name, settings, message):
  with pytest.raises(ValueError, match=message):
    make_grader(name, **settings)


def test_equal_answers_get_the_same_vote():
  assert ANSWERS["numeric"]("It is $18.") == ANSWERS["numeric"]("<answer>18.0 eggs</answer>") == 18
  assert ANSWERS["numeric"]("I do not know") is ANSWERS["numeric"]("<answer>18") is None
  assert ANSWERS["math"]("\\boxed{(1, 2)}") == ANSWERS["math"]("<answer>$(1,2)$</answer>")
  assert ANSWERS["math"]("It is 18.") is None
  assert ANSWERS["exact"]("Paris.") == ANSWERS["exact"]("<answer>paris</answer>")
  assert ANSWERS["exact"]("\\boxed{") is None


def test_very_long_answers_are_wrong():
  for text in ("1" * 100_000, "1," * 50_000, "123," * 25_000 + "123", "<think>" * 20_000):
    for name in ("exact", "numeric", "math"):
      assert verdict(name, f"<answer>{text}</answer>", "1") == 0.0
      assert verdict(name, text, "1") == 0.0


def test_the_format_takes_linear_time_on_hostile_text():
  for unit in HOSTILE:
    text = f"<think>{(unit * 50_000)[:50_000]}"
    start = time.process_time()
    GRADERS["format"](completions=[text])
    assert time.process_time() - start < 0.5, unit
