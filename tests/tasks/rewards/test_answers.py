"""Tests extracting and reading answers, and that it takes linear time on any text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks.rewards.answers import extract, final, normalize, number, plain


@pytest.mark.parametrize(
  ("completion", "answer"),
  [
    ("no mark, 18", None),
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


def test_a_completion_with_an_unclosed_mark_has_no_final_answer():
  assert final("It is 18.") == "It is 18."
  assert final("It is <answer>18") is None
  assert final("It is \\boxed {18") is None
  assert final("an empty #### ") == "an empty #### "


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["-", "−", "–", "﹣"]))
def test_all_spellings_of_an_integer_are_read_as_it(n, minus):
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


def test_normalize_equates_spellings_and_keeps_different_answers_apart():
  equal = [
    {"1/2", "0.5", "\\frac{1}{2}", ".50"},
    {"(1,2)", "( 1, 2 )", "\\left(1,\\,2\\right)"},
    {"New York", "new  york.", "\\text{New York}"},
    {"2\\sqrt{3}", "$2 \\sqrt {3}$"},
  ]
  for texts in equal:
    assert len({normalize(text) for text in texts}) == 1, texts
  different = [
    "1",
    "-1",
    "2",
    "1 2",
    "(1,2)",
    "x",
    "3x",
    "3x^2",
    "3\\pi",
    "3",
    "yes",
    "no",
    "",
    "5!",
  ]
  assert len({normalize(text) for text in different}) == len(different)


HOSTILE = [
  "\\boxed{", "\\boxed {}", "\\boxed ", "{", "}", "\\", "\\{", "<answer>", "</answer>", "<think>",
  "<answer></answer>", "#### ", "#", " ", "\n", "1", "123,", "1,", "1.", "1 ", "1/", "1e", "-",
  "$ ", "\\frac{1", "\\frac", "\\text{", "^\\circ", "^{", "a", "a-", "1 2/", "= ", "! ", "~", "\\ ",
  "\\\\", "a\u0301\u0323", "\u0301\u0323", "½", "³", "①", "１", "10^", "1\u2009", "(", "(5",
  "1 or ",  "\u200b", "1\n", "10³", "1!", "minus ", "1\\,", "<", "\\sqrt{", "*", "* ", "x^",
]  # fmt: skip


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("−5", "-5"),
    ("- 5", "-5"),
    ("10\u202f000", "10000"),
    (r"\text{18 eggs}", "18 eggs"),
    (r"1\frac{1}{2}", "1 1/2"),
    (r"\dfrac12", "1/2"),
    (r"1{,}234\,\%", "1,234%"),
    (r"\left( 90^\circ \right)", "( 90 )"),
  ],
)
def test_plain_removes_formatting(text, expected):
  assert plain(text) == expected


def test_hostile_text_takes_linear_time():
  """Reads 20,000 characters in hundredths of a second. Quadratic time would be seconds."""
  for unit in HOSTILE:
    text = (unit * 20_000)[:20_000]
    for completion in (f"5 {text}!", f"\\boxed{{<answer>{text}</answer>"):
      start = time.process_time()
      extract(completion)
      normalize(completion)
      assert time.process_time() - start < 0.5, (unit, completion[:20])


def test_nested_boxes_take_linear_time():
  start = time.perf_counter()
  assert extract("\\boxed{" * 12_000 + "18" + "}" * 12_000) == "18"
  assert time.perf_counter() - start < 1
