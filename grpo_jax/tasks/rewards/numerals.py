"""Reads numbers in text, exactly. Text outside the rules is not a number.

Every function here takes time linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction

from grpo_jax.tasks.rewards.characters import read_characters
from grpo_jax.tasks.rewards.surroundings import CURRENCY, may_follow, sign_before

UNWRAP = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{\s?(-?[\d.,]+)\s?\}\s?\{\s?([\d.,]+)\s?\}|(\d)\s?(\d))")
SYMBOLS = re.compile(
  r"\\(?P<keep>[$%#&_])|(?P<comma>\{,\})|\\[!,()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])"
  r"|\^\s?\{?(?:\\circ|°)\}?|[\\~](?=[ ~\n]|$)|\\[;:]"
)
NUMBER = re.compile(
  r"""
  (?<![\w^]) (?<!\d\.) (?<![\^_]\{) (?<!\^[-+]) (?<![\^_]\{[-+])     # not in x2, 1.2.3, m^2, 10^-2
  (?: (?P<whole>\d++) [ ] (?=\d++[ ]?/[ ]?\d) )?                     # 1 1/2
  (?P<value> \d++ (?:,\d++)*+ (?:\.\d++)?+ (?:e[-+]?\d{1,3}(?!\w))?+ | (?<!\.)\.\d++ )
  (?: [ ]?/[ ]? (?P<over>\d++(?:\.\d++)?+) )?+
  """,
  re.VERBOSE | re.ASCII | re.IGNORECASE,
)
POWER_OF_TEN = re.compile(  # 1.6 \times 10^{-19}, 10**3
  r"(?<![\w.,^])(?:(\d++(?:\.\d++)?+) ?(?:[x×*·]|\\times|\\cdot) ?)?+"
  r"10 ?(?:\^|\*\*) ?(?:\{ ?([-+]?\d{1,3}) ?\}|\( ?([-+]?\d{1,3}) ?\)|([-+]?\d{1,3}))(?![\w.])",
  re.ASCII,
)
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")
ASSIGNED = re.compile(r"^[A-Za-z] ?[=≈] ?")
PREFIX = re.compile(rf"[({{\[]?(?:[-+] ?)?(?:[{CURRENCY}] ?)?(?:[-+] ?)?")
UNIT = re.compile(
  r"[)}\]]?\s?[%°]?[)}\]]?(?:\s?[^\W\d_](?:[^\W\d_]|[/.' -])*(?:\^\s?\{?[23]\}?)?)?"
)
MAX_NUMBER_LENGTH = 100  # characters; a longer number is not read


def number(text: str) -> Fraction | None:
  r"""Returns the last number of a text, exactly; None if there is none or it does not stand alone.

  These are one number: 1,234 and 1{,}234 (in groups of three, or of two and three as in 1,00,000;
  1,2,3 is not a number), -5 with any minus sign, $18, -$18, 18 eggs, 50\%, 18 million (a percent
  sign and "million" are units: 50 and 18), 3/4, \frac{3}{4}, 1 1/2, 18½, .5, 1.5e3,
  1.5 \times 10^{3}, and all of them in the digits of any script.

  The last number is not read if it is part of something else, since it would misstate the answer:
  a calculation (2^{10}, 3 * 6, 5!), a function (log(100), \sqrt{2}), a product (3\pi, 5i), a list,
  pair or set ((1, 5)), a range or a choice (3-5, 3 or 4), a ratio or a time (3:4), a remainder, an
  inequality (x < 5, not 5), a repeating decimal (0.333...). A sign after a number or a letter is an
  operator, as in 5-3.

  Example:
    >>> str(number("3 baskets of 6 eggs: 18 eggs.")), str(number(r"\$1,234.50")), number("3 * 6")
    ('18', '2469/2', None)
  """
  found = _last_number(_with_exponents(_cleaned(text)))
  return None if found is None else found[0]


def normalize(answer: str) -> Hashable:
  r"""Returns the same value for different spellings of an answer, for votes and fast comparison.

  The value is a Fraction if the whole answer is one number, which may have a currency sign, a
  percent sign, a unit, or a letter and "=" before it. Otherwise it is the text without differences
  of case, spacing, minus signs, LaTeX spacing and a final full stop.

  Example:
    >>> {str(normalize(answer)) for answer in ("18", "18.0", "$18", "x = 18", "18 dollars.")}
    {'18'}
    >>> normalize("New  York."), normalize("( 1, 2)") == normalize(r"\left(1,\,2\right)")
    ('new york', True)
  """
  text = plain(answer).strip(" *`")
  text = text if text.endswith("..") else text.rstrip(" .*`")
  if text.endswith("$"):
    text = text.strip("$ .")
  bare = _with_exponents(ASSIGNED.sub("", text))
  found = _last_number(bare)
  if found and PREFIX.fullmatch(bare[: found[1]]) and UNIT.fullmatch(bare[found[2] :]):
    return found[0]
  return re.sub(r" ?([^\w\s]) ?", r"\1", text).casefold()


def plain(text: str) -> str:
  r"""Returns the text with ASCII digits and minus signs, single spaces and no LaTeX formatting.

  Example:
    >>> plain(r"\text{about}   \frac{3}{4}\,\%")
    'about 3/4%'
  """
  return " ".join(_cleaned(text).split())


def _cleaned(text: str) -> str:
  """Returns `plain(text)` with its line breaks, which separate numbers."""
  text = _single_spaces(read_characters(text))
  text = UNWRAP.sub(r" \1 ", text)
  text = FRACTION.sub(_fraction_to_text, text)
  text = SYMBOLS.sub(lambda mark: mark["keep"] or ("," if mark["comma"] else ""), text)
  return re.sub(r"^([-+]) (?=[\d.$])", r"\1", _single_spaces(text))


def _single_spaces(text: str) -> str:
  lines = (" ".join(line.split()) for line in text.split("\n"))
  return "\n".join(line for line in lines if line)


def _fraction_to_text(mark: re.Match[str]) -> str:
  over, under = (mark[1], mark[2]) if mark[1] else (mark[3], mark[4])
  after_digit = mark.string[mark.start() - 1 : mark.start()].isdigit()
  before_digit = mark.string[mark.end() : mark.end() + 1].isdigit()
  return f"{' ' if after_digit else ''}{over}/{under}{' ' if before_digit else ''}"


def _with_exponents(text: str) -> str:
  return POWER_OF_TEN.sub(lambda m: f"{m[1] or 1}e{m[2] or m[3] or m[4]}", text)


def _last_number(text: str) -> tuple[Fraction, int, int] | None:
  """Returns (value, start, end) of the last number if it stands alone."""
  last = None
  for match in NUMBER.finditer(text):
    last = match
  if last is None or len(last[0]) > MAX_NUMBER_LENGTH:
    return None
  sign = sign_before(text, last.start())
  if sign is None or not may_follow(text, last.end()):
    return None
  value, under = _parse_decimal(last["value"]), _parse_decimal(last["over"] or "1")
  if value is None or not under:
    return None
  return sign * (Fraction(last["whole"] or 0) + value / under), last.start(), last.end()


def _parse_decimal(digits: str) -> Fraction | None:
  """Returns `1,234.5` as a number; None if its commas do not group thousands."""
  if "," in digits and not GROUPED.fullmatch(digits):
    return None
  return Fraction(digits.replace(",", ""))
