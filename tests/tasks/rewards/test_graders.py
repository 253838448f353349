"""Graders: the right verdict on answers as models write them, and in time on any text."""

import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks import RewardError, score
from grpo_jax.tasks.rewards.answers import extract, final, normalize, number
from grpo_jax.tasks.rewards.graders import ANSWERS, GRADERS, MATH_LENGTH, _limited, make_grader

# (what stands where the answer belongs, right answer, is it right)
# fmt: off
ROWS = [
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
WRITTEN = [
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
@pytest.mark.parametrize("written", WRITTEN)
def test_verdicts(name, written):
  wrong = [
    (text, answer)
    for text, answer, right in ROWS
    if (text or "7" not in written)  # an empty tag leaves the one before
    and verdict(name, written.format(text), answer) != float(right)
  ]
  assert wrong == []


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
def test_two_tags_and_a_tag_without_an_end(name):
  assert verdict(name, "<answer>17</answer> or rather <answer>18</answer>", "18") == 1.0
  assert verdict(name, "<answer>17</answer> or rather <answer>18</answer>", "17") == 0.0
  assert verdict(name, "It is <answer>18", "18") == 0.0
  assert verdict(name, "It is \\boxed{18", "18") == 0.0
  assert verdict(name, "It is \\boxed{18} \\boxed{17", "18") == 1.0


@pytest.mark.parametrize(
  ("completion", "answer"),
  [
    ("nothing is marked, 18", None),
    ("<answer>18</answer>", "18"),
    ("<ANSWER> 18 </Answer>", "18"),
    ("<answer>17</answer><answer>18</answer>", "18"),
    ("the <answer> tag: <answer>18</answer>", "18"),
    ("<answer>18</answer></answer>", "18"),
    ("</answer>18<answer>", None),
    ("<answer>18</answer> <answer> </answer>", "18"),
    (r"\boxed{18}", "18"),
    (r"\boxed {18} \fbox{19}", "19"),
    (r"\\boxed{18}", "18"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),
    (r"\boxed{\boxed{18}}", "18"),
    (r"\boxed{x = \{a \\ b\}}", r"x = \{a \\ b\}"),
    (r"{ \boxed{18}", "18"),
    (r"\boxed{18} then \boxed{}", "18"),
    (r"\boxed{18", None),
    (r"\boxed{17} \boxed{\frac{1}{2}", "17"),
    (r"\boxed{17} <answer>18</answer>", "18"),
    (r"<answer>17</answer> \boxed{18}", "18"),
    (r"<answer>It is \boxed{18}</answer>", "18"),
    ("#### 18", "18"),
    ("#### 17\n#### 18\nbye", "18"),
    ("#### 17 #### 18", "18"),
    ("#### 18\n####\n", "18"),
    ("##### Title\n", None),
    ("#### Step 1\n\\boxed{18}\n#### Done", "18"),
    ("", None),
  ],
)
def test_extract(completion, answer):
  assert extract(completion) == answer


def test_what_is_begun_and_not_finished_is_not_searched_as_a_whole():
  assert final("It is 18.") == "It is 18."
  assert final("It is <answer>18") is None
  assert final("It is \\boxed {18") is None
  assert final("an empty #### ") == "an empty #### "


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["-", "−", "–", "﹣"]))
def test_every_way_to_write_an_integer_is_that_integer(n, minus):
  sign, digits = minus if n < 0 else "", str(abs(n))
  for text in (
    f"{sign}{digits}",
    f"{sign}{abs(n):,}",
    f"{sign}${abs(n):,}.00",
    f"${sign}{digits}$",
    f"{sign}{digits} apples",
    f"{sign}{digits}%",
    f"{sign}\\frac{{{2 * abs(n)}}}{{2}}",
    f"y = {sign}{digits}.",
  ):
    assert number(text) == n, text
    assert normalize(text) == n, text
  assert number(f"first 3, then {sign}{digits}") == n


def test_normalize_keeps_different_answers_apart():
  alike = [
    {"1/2", "0.5", "\\frac{1}{2}", ".50"},
    {"(1,2)", "( 1, 2 )", "\\left(1,\\,2\\right)"},
    {"New York", "new  york.", "\\text{New York}"},
    {"2\\sqrt{3}", "$2 \\sqrt {3}$"},
  ]
  for texts in alike:
    assert len({normalize(text) for text in texts}) == 1, texts
  apart = ["1", "-1", "2", "1 2", "(1,2)", "x", "3x", "3x^2", "3\\pi", "3", "yes", "no", "", "5!"]
  assert len({normalize(text) for text in apart}) == len(apart)


def test_gold_answers_of_any_kind():
  kinds = [18, 18.0, np.int64(18), np.float32(18), Fraction(18), "18", "2 * 9 = 18\n#### 18", None]
  values = GRADERS["numeric"](completions=["It is 18."] * 8, answer=kinds)
  assert values == [1.0] * 7 + [None]
  assert GRADERS["numeric"](completions=["0.1"], answer=[0.1]) == [1.0]
  assert verdict("math", "\\boxed{18}", "so \\boxed{18}") == 1.0
  assert verdict("math", "\\boxed{18}", 18) == 1.0
  for bad in ("eighteen", "3 or 4", "\\pi/2", float("nan"), [1]):
    with pytest.raises(RewardError, match="which is not a number: use the grader 'math'"):
      score({"n": (GRADERS["numeric"], 1.0)}, ["p"], [["18"]], {"answer": [bad]})


def test_tolerance_is_relative():
  within = make_grader("numeric", tolerance=0.01)
  assert within(completions=["99", "101", "98.9", "-100"], answer=[100] * 4) == [1, 1, 0, 0]
  assert within(completions=["0", "0.001"], answer=[0, 0]) == [1, 0]


def test_exact_is_about_text():
  right = ["Paris", " paris. ", "<answer>PARIS</answer>", "\\boxed{\\text{Paris}}"]
  wrong = ["It is Paris", "Pari", "", "<answer>Paris", "Paris Paris"]
  values = GRADERS["exact"](completions=right + wrong, answer=["Paris"] * 9)
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


@pytest.mark.parametrize(("found", "wanted", "right"), MATHEMATICS)
def test_mathematics(found, wanted, right):
  assert verdict("math", f"\\boxed{{{found}}}", wanted) == float(right)


def test_mathematics_wants_a_mark_and_a_short_answer():
  assert verdict("math", "It is 18.", "18") == 0.0
  assert verdict("math", "\\boxed{" + "1+" * MATH_LENGTH + "1}", MATH_LENGTH + 1) == 0.0
  assert verdict("math", "\\boxed{18}", None) is None


def test_mathematics_works_in_any_thread():
  values = []
  thread = threading.Thread(
    target=lambda: values.append(verdict("math", "\\boxed{2\\sqrt{3}}", "\\sqrt{12}"))
  )
  thread.start()
  thread.join()
  assert values == [1.0]


def test_mathematics_ends_in_time_in_the_main_thread(monkeypatch):
  monkeypatch.setattr("grpo_jax.tasks.rewards.graders.MATH_SECONDS", 1)
  began = time.monotonic()
  assert verdict("math", "\\boxed{\\sum_{i=1}^{1000000000} i^{7.5}}", "5") == 0.0
  assert time.monotonic() - began < 5


def test_an_alarm_that_is_not_heard_rings_again():
  swallowed = []

  def deaf():
    while len(swallowed) < 3:
      try:
        while True:
          time.sleep(0.01)
      except BaseException as error:  # as libraries do
        swallowed.append(error)
    while True:
      time.sleep(0.01)

  before = signal.getsignal(signal.SIGALRM)
  assert not _limited(deaf, 0.1)
  assert len(swallowed) == 3
  assert signal.getsignal(signal.SIGALRM) is before
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
  assert _limited(lambda: True, 1.0)


def test_what_to_install_for_mathematics(monkeypatch):
  from grpo_jax.tasks.rewards import graders

  graders._need_math_verify.cache_clear()
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
  """L_max = 20480 and L_cache = 4096, as in the paper: 0 to 16384, then -1/4096 a token."""
  penalty = make_grader("soft_overlong", max_length=20480, buffer=4096)
  got = penalty(completion_lengths=[1, 16384, 16385, 18432, 20480, 20481])
  assert got == [0, 0, -1 / 4096, -0.5, -1, -1]


def test_rewards_of_length_are_given_tokens_and_not_characters():
  rewards = {
    "soft_overlong": (make_grader("soft_overlong", max_length=4, buffer=2), 1.0),
    "length": (make_grader("length", target=2), 10.0),
  }
  texts = [["some long text", "x"], ["", "yy"]]
  total, _ = score(rewards, ["p", "q"], texts, {"answer": ["a", "b"]}, [[2, 3], [1, 4]])
  np.testing.assert_array_equal(total, [[0, -5.5], [-5, -11]])
  with pytest.raises(RewardError, match="asks for completion_lengths, which is not given"):
    score(rewards, ["p", "q"], texts, {})


@pytest.mark.parametrize(
  ("name", "arguments", "says"),
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
def test_settings_that_are_no_good(name, arguments, says):
  with pytest.raises(ValueError, match=says):
    make_grader(name, **arguments)


def test_votes_agree_with_the_verdicts():
  assert ANSWERS["numeric"]("It is $18.") == ANSWERS["numeric"]("<answer>18.0 eggs</answer>") == 18
  assert ANSWERS["numeric"]("I do not know") is ANSWERS["numeric"]("<answer>18") is None
  assert ANSWERS["math"]("\\boxed{(1, 2)}") == ANSWERS["math"]("<answer>$(1,2)$</answer>")
  assert ANSWERS["math"]("It is 18.") is None
  assert ANSWERS["exact"]("Paris.") == ANSWERS["exact"]("<answer>paris</answer>")
  assert ANSWERS["exact"]("\\boxed{") is None


HOSTILE = [
  "\\boxed{", "\\boxed {}", "\\boxed ", "{", "}", "\\", "\\{", "<answer>", "</answer>", "<think>",
  "<answer></answer>", "#### ", "#", " ", "\n", "1", "123,", "1,", "1.", "1 ", "1/", "1e", "-",
  "$ ", "\\frac{1", "\\frac", "\\text{", "^\\circ", "^{", "a", "a-", "1 2/", "= ", "! ", "~", "\\ ",
  "\\\\", "a\u0301\u0323", "1\\,", "<", "\\sqrt{", "*", "* ", "x^",
]  # fmt: skip


def test_no_text_takes_long():
  """50,000 characters of anything: hundredths of a second each, where n^2 would be many seconds."""
  for unit in HOSTILE:
    text = (unit * 50_000)[:50_000]
    for completion in (f"5 {text}!", f"\\boxed{{<answer>{text}</answer>"):
      began = time.process_time()
      extract(completion)
      normalize(completion)
      GRADERS["format"](completions=[completion])
      assert time.process_time() - began < 0.5, (unit, completion[:20])


def test_a_hundred_thousand_digits_are_no_number():
  for text in ("1" * 100_000, "1," * 50_000, "123," * 25_000 + "123", "<think>" * 20_000):
    for name in ("exact", "numeric", "math"):
      assert verdict(name, f"<answer>{text}</answer>", "1") == 0.0
      assert verdict(name, text, "1") == 0.0


def test_nested_boxes_that_are_closed_take_no_longer():
  began = time.perf_counter()
  assert extract("\\boxed{" * 12_000 + "18" + "}" * 12_000) == "18"
  assert time.perf_counter() - began < 1
