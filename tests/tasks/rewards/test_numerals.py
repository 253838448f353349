"""Tests which texts are one number, and which are something else that contains numbers."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks.rewards.characters import read_characters
from grpo_jax.tasks.rewards.numerals import normalize, number

# fmt: off
# Text -> the number that it is.
NUMBERS = {
  '½': '1/2',
  '18½': '37/2',
  '1⁄2': '1/2',
  '-½': '-1/2',
  '2 ½': '5/2',
  '⅓': '1/3',
  '⅞ cup': '7/8',
  '⅟5': '1/5',
  '４２': '42',
  '٤٢': '42',
  '१८': '18',
  '۴۲': '42',
  '৪২': '42',
  '๔๒': '42',
  '⑤': '5',
  '⑴': '1',
  '𝟒𝟐': '42',
  '－５': '-5',
  '＄４２': '42',
  '４２％': '42',
  '１，２３４．５': '2469/2',
  '٤٫٢': '21/5',
  '١٬٢٣٤': '1234',
  '18 cm²': '18',
  '18 cm^2': '18',
  '18 m2': '18',
  '18 m^{2}': '18',
  '18m': '18',
  '18 m': '18',
  '18km': '18',
  '18 km/h': '18',
  '18 miles/hour': '18',
  '18 m/s': '18',
  '18 kg': '18',
  '18°': '18',
  '18°C': '18',
  '18 ℃': '18',
  '1,00,000': '100000',
  '12,34,567': '1234567',
  '1,234,567.5': '2469135/2',
  '10³': '1000',
  '10^{3}': '1000',
  '10^3': '1000',
  '10⁻²': '1/100',
  '3×10⁸': '300000000',
  '3 × 10^8': '300000000',
  '3 \\times 10^{8}': '300000000',
  '1.6\\times10^{-19}': '1/6250000000000000000',
  '6.02\\cdot 10^{23}': '602000000000000000000000',
  '-3×10⁸': '-300000000',
  '5 x 10^3': '5000',
  '5*10**3': '5000',
  '1.5e3': '1500',
  '1E-3': '1/1000',
  'negative 5': '-5',
  'minus 5': '-5',
  '-5': '-5',
  '- 5': '-5',
  '= -5': '-5',
  'x = - 5': '-5',
  '+5': '5',
  '-$5': '-5',
  '$-5': '-5',
  '-$5.50': '-11/2',
  '(18)': '18',
  '[18]': '18',
  '(-5)': '-5',
  '{18}': '18',
  '**18**': '18',
  '*18*': '18',
  '`18`': '18',
  '"18"': '18',
  '“18”': '18',
  '$18$': '18',
  '$18': '18',
  '18$': '18',
  '18€': '18',
  '18 €': '18',
  '£18.': '18',
  'The answer is 18.': '18',
  'The answer is **18**.': '18',
  'It is 18, of course.': '18',
  'So he has 18 eggs left': '18',
  'Great!\n18': '18',
  'Sure! 18 eggs': '18',
  '18-year-old': '18',
  '18 - the number of eggs': '18',
  '答案是18。': '18',
  '答案是18个': '18',
  '答えは18です': '18',
  'الجواب ١٨': '18',
  'x = 18': '18',
  'x=18': '18',
  'x ≈ 18': '18',
  '≈ 18': '18',
  '~18': '18',
  'about 18': '18',
  'Answer: 18': '18',
  'Answer:18': '18',
  '5 + 13 = 18': '18',
  '3 × 6 = 18': '18',
  '= 18': '18',
  '=> 18': '18',
  '\\Rightarrow 18': '18',
  '→ 18': '18',
  '∴ 18': '18',
  '<b>18</b>': '18',
  '</think>18': '18',
  '</think>\n\n18': '18',
  '#18': '18',
  '(B) 18': '18',
  '18 dollars per week': '18',
  '$18 a day': '18',
  '18 percent': '18',
  '18%': '18',
  '18\\%': '18',
  '18 % ': '18',
  '18 (eighteen)': '18',
  'eighteen (18)': '18',
  '18 eggs (a dozen and six)': '18',
  '5 = x': '5',
  '18 = the total': '18',
  '3 + 15 = 18\n18': '18',
  '1\n2\n18': '18',
  'Step 1: 3\nStep 2: 18': '18',
  '18?': '18',
  '18: the total': '18',
  '18;': '18',
  '3/4': '3/4',
  '3 / 4': '3/4',
  '1 1/2': '3/2',
  '-1 1/2': '-3/2',
  '1\\frac{1}{2}': '3/2',
  '-\\frac{3}{4}': '-3/4',
  '\\frac12': '1/2',
  '.5': '1/2',
  '-.5': '-1/2',
  '0.5.': '1/2',
  '18th': '18',
  '1st': '1',
  '10 pm': '10',
  '10am': '10',
  '18 million': '18',
  '7 dozen': '7',
  '18 square feet': '18',
  '18\u200b': '18',
  '18\xa0eggs': '18',
  '10\u202f000': '10000',
  '5 hours and some': '5',
  'He is 18 and happy': '18',
  'comes to 18': '18',
  'equal to 18': '18',
  'a total of 18': '18',
  '\\text{18 eggs}': '18',
  '18 \\text{ cm}^2': '18',
  '90^\\circ': '90',
  '18 😀': '18',
  '✅ 18': '18',
  '• 18': '18',
  '- 18': '-18',
  'In total, 18': '18',
  'So 18': '18',
  'It equals 18': '18',
  '18 is the answer': '18',
  '18 eggs. That is it.': '18',
  '\\$18': '18',
  '18\\,\\text{km}': '18',
  '18~\\text{km}': '18',
  '18 L': '18',
  '5 g': '5',
  'Therefore: 18': '18',
  'the answer is $18$.': '18',
  '(in dollars) 18': '18',
  '18 of them': '18',
  '18 days/week': '18',
}
# No number: reading the last one of these would misstate the answer.
NOT_NUMBERS = [
  '18万', '18億', '18半', '3分之1', '1点8', '18௰', '௰18', '1#8', '1•8', '1Ⅲ8', '1?8', '3年8',
  'log(100)', 'log (100)', '\\log_{10} 100', '\\ln 5', 'sin 30', '\\sin(30)', 'arcsin 1',
  'cos 60', '\\binom{5}{2}', '5!', '5!!', '\\lfloor 5.5\\rfloor', '⌊5.5⌋', '\\lceil 5 \\rceil',
  '-(-5)', '--5', '+-5', '-+5', '5i', '3+5i', '5 i', '0.\\overline{3}', '0.\\dot{3}', '0.(3)',
  '0.333...', '0.333…', '5 mod 3', '5 \\bmod 3', '5 \\pmod{3}', '17 % 5', '3 remainder 2',
  '3 R 2', '3 r 2', '3R2', '3 r. 2', '3 rem 2', 'x < 5', 'x > 5', 'x ≤ 5', 'x \\leq 5',
  'x \\ge 5', 'x ≠ 5', 'x != 5', '<5', '< 5', '>= 5', '≥5', '(1, 5)', '(1,5)', '[1, 5]', '[1,5)',
  '{1, 5}', '\\{1, 5\\}', '\\{5\\}', '1, 5', '1,5', '1; 5', '1 and 5', '3 or 4', '3-5', '3–5',
  '3—5', '3 - 5', '3 to 5', 'from 3 to 5', 'between 3 and 5', '3..5', '3...5', '3 through 5',
  '3:4', '3 : 4', '3 to 4', '10:30', '10:30 am', '2024-05-01', '2024/05/01', '5/6/2024',
  '01.02.2024', '±5', '± 5', '5 ± 1', '\\pm 5', '5 \\pm 0.1', '10³x', 'x²', 'x^2', '5²', '5^2',
  '2^{10}', '2**10', '2 ** 10', '2*3', '2 * 3', '2×3', '2·3', '6÷2', '2 3', '10 000', '3x',
  '3x + 2', '2x', '3 x', '5y', '3\\pi', '3π', '3 pi', '3pi', '\\pi/2', '√2', '√(2)', '\\sqrt{2}',
  '\\sqrt 2', '\\sqrt[3]{5}', '2√3', '2\\sqrt{3}', '∛8', 'e^2', 'e^{5}', 'f(5)', 'f(2)', 'P(5)',
  '2(5)', '(5)(3)', '(2)3', '5(3)', 'not 5', "isn't 5", 'not equal to 5', 'x₁', 'x_1', '10₂',
  '101_2', '1010_{2}', '101 base 2', '101 in base 2', '1.2.3', '1.234,5', "1'234", '1_000',
  '1,2,3', '12,34', '1,2345', '3 out of 5', '3 of 5', '5 less than x', '3 less than 5',
  'more than 5', 'less than 5', 'at most than 5', 'half of 5', 'square root of 5',
  'the square of 5', '5 squared', '5 cubed', '5 factorial', '5 choose 2', '3 minus 5', '3 plus 5',
  '3 times 5', '10 divided by 5', '18 and a half', '18 and 1/2', '2 thirds', '5 halves', '3/4/5',
  '1/0', '5/x', '5/(2)', '5 / x', 'x/5', '\\frac{5}{x}', '\\frac{x}{5}', '\\frac{1}{\\sqrt{5}}',
  '(5, x)', '(5, \\infty)', '[5, ∞)', '(-\\infty, 5)', '(-∞, 5]', 'x=1, y=5', 'x = 1, y = 5',
  'x = 1 and y = 5', 'x=1; y=5', '3 apples or 4 apples', '3 apples and 4 pears', '1 & 5', '5 & 1',
  '\\gcd(10, 5)', 'max(1, 5)', 'max 5', '\\sum_{i=1}^{5} i', '\\int_0^5 x', '5\\%\\times 3', '5e',
  '5e3x', '1e9999', '5E', '0x1F', '5 x 3', '5 × 3', '5 \\times 3', '5 \\cdot 3', '5 +', '5+x',
  '5 + x', 'x+5', 'x + 5', 'x - 5', 'x-5', '5 - x', '*5*3', '5′', "5'6", '5\'6"', "5°30'", '₅',
  '⁵', '²', '5⁵', 'x⁵', '①②', '1①', '½½', '5½5', '.', '-', '$', '%', 'NaN', 'inf', '∞', '-∞',
  'five', 'V', 'Ⅴ', '5\\_1', '\\overline{5}', '5\\overline{3}', '\\hat{5}', '5\\sqrt{}', 'not 18',
  'covid-19', 'twenty-5', 'n = 5 or 6', '5 or more', '5, 6', '5,x', '5; x', '5.x', 'v1.5.2',
  '\\neg 5', '¬5', '∠5', '∑5', '∏5', '∫5', '∂5', '5∘3', '5∪3', '5∈A', '5∣10', '3^5', '3^{5}',
  '3^(5)', '10^3^2', '2\\cdot 3^{10}', 'ln5', 'log5', 'log2(5)', '(x-5)', '(x, y) = (1, 5)',
  'minus minus 5', '3 % of 5', '20% of 5', '5i + 3', '3 + 5', '3+5=', 'a_5', 'a5', '5a', '(5+3)',
  '(5) + 3', '{{5, 3}}', '5th root of 3', '3 per 5', '3 by 5', '3 in 5', '3 vs 5', '~3 ~ 5',
  '3~5', '5^\\circ + 3', '5! = x', '\\left', '\\lvert -5 \\rvert', '|-5|', '|−5|', '|5|', '| 5 |',
  '|x|=|5|', '\\left|-5\\right|', '\\lvert -5 \\rvert', 'Total – 18',
]
# fmt: on


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_read_exactly(text, value):
  assert number(text) == Fraction(value)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_only_contains_numbers_is_not_one(text):
  assert number(text) is None
  assert not isinstance(normalize(text), Fraction)
  assert number(f"The answer is {text}") is None


DIGITS = [
  "٠١٢٣٤٥٦٧٨٩",
  "०१२३४५६७८९",
  "０１２３４５６７８９",
  "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗",
  "০১২৩৪৫৬৭৮৯",
  "๐๑๒๓๔๕๖๗๘๙",
]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**12), st.sampled_from(DIGITS))
def test_digits_of_every_script_are_read(n, digits):
  text = str(n).translate(str.maketrans("0123456789", digits))
  assert number(text) == number(f"= {text} km") == number(f"−{text}") * -1 == n


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 999), st.integers(0, 999))
def test_a_power_never_passes_for_its_base_or_its_digits(base, exponent):
  raised = str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
  for text in (f"{base}{raised}", f"{base}^{exponent}", f"{base}^{{{exponent}}}"):
    assert number(text) == (Fraction(10) ** exponent if base == 10 else None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from(
  ["+", "-", "*", "×", "÷", " / x + ", ", ", "; ", ":", " or ", " to ", " and ", "–", "..", " ± ",
   " mod ", " remainder ", " R ", " < ", "!", " x ", "^", " of ", " out of ", " vs ", "|", "∪", "·",
   "\\times ", "\\cdot ", "\\bmod ", "\\pm "]
))  # fmt: skip
def test_two_joined_numbers_are_not_one(a, b, operator):
  for text in (f"{a}{operator}{b}", f"({a}{operator}{b})", f"x = {a}{operator}{b}"):
    assert number(text) is None, text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error_and_the_same_way_twice(text):
  assert normalize(text) == normalize(text)
  assert number(text) is None or isinstance(number(text), Fraction)
  assert read_characters(read_characters(text)) == read_characters(text)


def test_the_same_text_in_other_characters_is_equal():
  for one, other in (("cafe\u0301", "caf\u00e9"), ("x²", "x^{2}"), ("ﬁve", "five"),
                     ("（1，2）", "(1,2)"),
                     ("10⁻³", "10^{-3}"), ("a₁₂", "a_{12}"), ("18\u00a0km", "18 km")):  # fmt: skip
    assert normalize(one) == normalize(other)
  assert normalize("x²") != normalize("x2")
