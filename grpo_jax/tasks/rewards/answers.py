"""Extracts the final answer of a completion and reads it as a number or as text.

Every function here takes time linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction

TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
BOX = r"\\(?:boxed|fbox)\s*+\{"
BRACE = re.compile(BOX + r"|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
OPENING = re.compile(r"<answer>|" + BOX, re.IGNORECASE)
HASHES = re.compile(r"(?<!#)####(?!#)")


def extract(completion: str) -> str | None:
  r"""Returns the marked final answer of a completion, None if there is none.

  A marked answer is the content of the last `\boxed{...}` (with balanced braces) or of the last
  `<answer>...</answer>` (an end tag with the nearest start tag before it). If there are both, the
  one that begins later counts; of nested ones this is the inner one. If there is neither, the
  answer is the rest of the last line that contains `####`.

  Empty marks do not count. Marks that are never closed do not count either: the completion was
  truncated there, and the rest of its answer is unknown. (A stop string is cut off, so "</answer>"
  must not be a stop string.)

  Example:
    >>> extract("<answer>17</answer> No, <answer>18</answer>! Or <answer>1")
    '18'
    >>> extract("16 - 3 = 13 ducks\n#### 13\n"), extract("It is 13.")
    ('13', None)
  """
  start, answer = max(_last_tagged(completion), _last_boxed(completion))
  if start >= 0:
    return answer
  marks = [*HASHES.finditer(completion)]
  ends = [*(mark.start() for mark in marks[1:]), len(completion)]
  for mark, end in zip(reversed(marks), reversed(ends)):
    if answer := completion[mark.end() : end].split("\n", 1)[0].strip():
      return answer
  return None


def final(completion: str) -> str | None:
  r"""Returns the marked answer (see `extract`), or the whole completion if it has no opening mark.

  Example:
    >>> final(r"So \boxed{18}."), final("It is 18."), final("<answer>1")
    ('18', 'It is 18.', None)
  """
  answer = extract(completion)
  if answer is None and not OPENING.search(completion):
    return completion
  return answer


def _last_tagged(text: str) -> tuple[int, str]:
  """Returns (start, content) of the last non-empty pair of answer tags, or (-1, "")."""
  start, last = -1, (-1, "")
  for tag in TAG.finditer(text):
    if not tag[1]:
      start = tag.end()
    elif start >= 0:
      content = text[start : tag.start()].strip()
      last = (start, content) if content else last
      start = -1
  return last


def _last_boxed(text: str) -> tuple[int, str]:
  """Returns (start, content) of the non-empty closed box that begins last, or (-1, "")."""
  opened: list[tuple[int, bool]] = []  # (position after the brace, whether it opens a box)
  last = (-1, "")
  for mark in BRACE.finditer(text):
    if mark[0] == "{":
      opened.append((mark.end(), False))
    elif mark[0].endswith("{") and len(mark[0]) > 2:
      opened.append((mark.end(), True))
    elif mark[0] == "}" and opened:
      start, is_box = opened.pop()
      if is_box and start > last[0]:
        content = text[start : mark.start()].strip()
        last = (start, content) if content else last
  return last


# --- reading an answer ----------------------------------------------------------------------------

# All minus signs become ASCII. Thin spaces, which group digits, are deleted.
SIGNS = str.maketrans("−‐‑‒–﹣－", "-------", "\u2009\u202f")
UNWRAP = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{\s?(-?[\d.,]+)\s?\}\s?\{\s?([\d.,]+)\s?\}|(\d)\s?(\d))")
SYMBOLS = re.compile(
  r"\\(?P<keep>[$%#&_])|(?P<comma>\{,\})|\\[!,()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])"
  r"|\^\s?\{?\\circ\}?|[\\~](?=[ ~]|$)|\\[;:]"
)
CURRENCY = "$€£¥₹"
NUMBER = re.compile(
  rf"""
  (?<![\w^]) (?<!\d\.) (?<![\^_]\{{) (?<!\^[-+]) (?<![\^_]\{{[-+])   # not in x2, 1.2.3, m^2, 10^-2
  (?: (?P<sign>(?<![)\]}}])[-+]) (?:[{CURRENCY}][ ]?)? | [{CURRENCY}][ ]? (?P<inner>[-+])? )?
  (?: (?P<whole>\d++) [ ] (?=\d++[ ]?/[ ]?\d) )?                     # 1 1/2
  (?P<value> \d++ (?:,\d++)*+ (?:\.\d++)?+ (?:e[-+]?\d{{1,3}}(?!\w))?+ | (?<!\.)\.\d++ )
  (?: [ ]?/[ ]? (?P<over>\d++(?:\.\d++)?+) )?+
  """,
  re.VERBOSE | re.ASCII | re.IGNORECASE,
)
# Text before or after a number that makes it part of a calculation.
BEFORE = re.compile(
  r"(?:[\d)}\]]|\b\d*[a-z])\s?(?:[-+*/×÷·^]|\*\*|\\times|\\cdot|\\div)\s?$"  # 3 * 6, 3x - 2
  r"|(?:\\sqrt(?:\[\w*\])?\s?\{?|√\s?\(?)-?$|\d[,:]$",
  re.IGNORECASE,
)
AFTER = re.compile(
  r"\s?(?:\^|\*(?!\*)|\*\*\d|×|÷|/\s?[\d(\\]|\\(?:times|cdot|div|pi|sqrt)|π|√"
  r"|(?:pi|sqrt)(?![a-z]))|_\d",
  re.IGNORECASE,
)
SPACED = re.compile(r"(?<![\d.,])\d{1,3} $")  # before three digits: 10 000
LOOKBEHIND = 24  # characters before a number that BEFORE and SPACED are applied to
UNIT = re.compile(r"\s?[%°]?(?:\s[^\W\d_](?:[^\W\d_]|[/.' -])+(?:\^\s?\{?[23]\}?)?)?")
MAX_NUMBER_LENGTH = 100  # characters; a longer number is not read


def number(text: str) -> Fraction | None:
  r"""Returns the last number of a text, exactly; None if there is none.

  These are one number: 1,234 and 1{,}234 (in groups of three; 1,2,3 is not a number), -5 with any
  minus sign, $18, -$18, 18 eggs, 50\%, 18 million (a percent sign and "million" are units: 50 and
  18), 3/4, \frac{3}{4}, 1 1/2, .5, 1.5e3.

  A number that is part of a calculation is not read, since it would misstate the result: 2^{10},
  \sqrt{2}, 3\pi. A sign after a number or a letter is an operator, as in 5-3.

  Example:
    >>> str(number("3 baskets of 6 eggs: 18 eggs.")), str(number(r"\$1,234.50")), number("3 * 6")
    ('18', '2469/2', None)
  """
  return _last_number(plain(text))


def normalize(answer: str) -> Hashable:
  r"""Returns the same value for different spellings of an answer, for votes and fast comparison.

  The value is a Fraction if the whole answer is one number, which may have a currency sign, a
  percent sign, a unit after a space, or a letter and "=" before it. Otherwise it is the text
  without differences of case, spacing, minus signs, LaTeX spacing and a final full stop.

  Example:
    >>> {str(normalize(answer)) for answer in ("18", "18.0", "$18", "x = 18", "18 dollars.")}
    {'18'}
    >>> normalize("New  York."), normalize("( 1, 2)") == normalize(r"\left(1,\,2\right)")
    ('new york', True)
  """
  text = plain(answer).lstrip(" *`").rstrip(" .*`")
  if text.endswith("$"):
    text = text.strip("$ .")
  bare = re.sub(r"^[A-Za-z] ?= ?", "", text)
  first = NUMBER.match(bare)
  if first and UNIT.fullmatch(bare[first.end() :]):
    value = _last_number(bare)
    if value is not None:
      return value
  return re.sub(r" ?([^\w\s]) ?", r"\1", text).casefold()


def plain(text: str) -> str:
  r"""Returns the text with ASCII minus signs, single spaces and without LaTeX formatting.

  Example:
    >>> plain(r"\text{about}   \frac{3}{4}\,\%")
    'about 3/4%'
  """
  text = " ".join(text.translate(SIGNS).split())
  text = UNWRAP.sub(r" \1 ", text)
  text = FRACTION.sub(_fraction_to_text, text)
  text = SYMBOLS.sub(lambda mark: mark["keep"] or ("," if mark["comma"] else ""), text)
  text = " ".join(text.split())
  return re.sub(r"^([-+]) (?=[\d.$])", r"\1", text)


def _fraction_to_text(mark: re.Match[str]) -> str:
  over, under = (mark[1], mark[2]) if mark[1] else (mark[3], mark[4])
  after_digit = mark.start() > 0 and mark.string[mark.start() - 1].isdigit()
  return f"{' ' if after_digit else ''}{over}/{under}"


def _last_number(text: str) -> Fraction | None:
  last = None
  for match in NUMBER.finditer(text):
    last = match
  if last is None or len(last[0]) > MAX_NUMBER_LENGTH or AFTER.match(text, last.end()):
    return None
  start = last.start("whole" if last["whole"] else "value")
  before = text[max(0, start - LOOKBEHIND) : start]
  if BEFORE.search(before) or (len(last["value"]) == 3 and SPACED.search(before)):
    return None
  value, under = _parse_decimal(last["value"]), _parse_decimal(last["over"] or "1")
  if value is None or not under:
    return None
  value = Fraction(last["whole"] or 0) + value / under
  return -value if "-" in (last["sign"], last["inner"]) else value


def _parse_decimal(digits: str) -> Fraction | None:
  """Returns `1,234.5` as a number; None if its commas do not group thousands."""
  if "," in digits and not re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
    return None
  return Fraction(digits.replace(",", ""))
