"""Where the final answer of a completion is, and what it says: a number, or text.

Everything here takes time linear in the length of the text, whatever the text is.
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
  r"""The final answer of a completion, None where it marks none.

  The content of the last `\boxed{...}` (braces paired) or `<answer>...</answer>` (an end tag with
  the nearest start tag before it); of two the one that begins later, so the inner one where they
  are nested. Only where there is neither, the rest of the last line that has `####`. One without
  content does not count. One that is never closed does not count either: the completion was cut
  there, and nobody knows how its answer goes on. (A stop string is cut off, so "</answer>" must not
  be one.)

  >>> extract("<answer>17</answer> No, <answer>18</answer>! Or <answer>1")
  '18'
  >>> extract("16 - 3 = 13 ducks\n#### 13\n"), extract("It is 13.")
  ('13', None)
  """
  start, answer = max(_tagged(completion), _boxed(completion))
  if start >= 0:
    return answer
  marks = [*HASHES.finditer(completion)]
  ends = [*(mark.start() for mark in marks[1:]), len(completion)]
  for mark, end in zip(reversed(marks), reversed(ends)):
    if answer := completion[mark.end() : end].split("\n", 1)[0].strip():
      return answer
  return None


def final(completion: str) -> str | None:
  """The answer that is marked (see `extract`), or all of a completion that begins to mark none."""
  answer = extract(completion)
  if answer is None and not OPENING.search(completion):
    return completion
  return answer


def _tagged(text: str) -> tuple[int, str]:
  """(where it begins, content) of the last pair of tags with content, else (-1, "")."""
  start, found = -1, (-1, "")
  for tag in TAG.finditer(text):
    if not tag[1]:
      start = tag.end()
    elif start >= 0:
      content = text[start : tag.start()].strip()
      found = (start, content) if content else found
      start = -1
  return found


def _boxed(text: str) -> tuple[int, str]:
  """(where it begins, content) of the closed box with content that begins last, else (-1, "")."""
  opened: list[tuple[int, bool]] = []
  found = (-1, "")
  for mark in BRACE.finditer(text):
    if mark[0] == "{":
      opened.append((mark.end(), False))
    elif mark[0].endswith("{") and len(mark[0]) > 2:
      opened.append((mark.end(), True))
    elif mark[0] == "}" and opened:
      start, is_box = opened.pop()
      if is_box and start > found[0]:
        content = text[start : mark.start()].strip()
        found = (start, content) if content else found
  return found


# --- what it says ---------------------------------------------------------------------------------

SIGNS = str.maketrans("−‐‑‒–﹣－", "-------", "\u2009\u202f")  # thin spaces group digits: no space
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
REACH = 24  # characters before a number that BEFORE and SPACED see
UNIT = re.compile(r"\s?[%°]?(?:\s[^\W\d_](?:[^\W\d_]|[/.' -])+(?:\^\s?\{?[23]\}?)?)?")
DIGITS = 100  # a longer number is not one that anybody asked for


def number(text: str) -> Fraction | None:
  r"""The last number of a text, exactly; None where there is none, or it is part of a calculation.

  Read as one number: 1,234 and 1{,}234 (groups of three; 1,2,3 is no number), -5 with any kind of
  minus sign, $18, -$18, 18 eggs, 50\%, 18 million (a percent sign and "million" are units: that is
  50 and 18), 3/4, \frac{3}{4}, 1 1/2, .5, 1.5e3. A sign after a number or a letter is an operator:
  5-3 is no number, nor are 2^{10}, \sqrt{2} and 3\pi: their last digits alone would say something
  else.

  >>> str(number("3 baskets of 6 eggs: 18 eggs.")), str(number(r"\$1,234.50")), number("3 * 6")
  ('18', '2469/2', None)
  """
  return _last_number(plain(text))


def normalize(answer: str) -> Hashable:
  r"""The same value for answers that are written differently: for votes, and for quick equality.

  A Fraction where the whole answer is one number, alone or with a sign of currency, a percent sign,
  a unit after a space, or a letter and "=" before it; else its text without differences of case,
  space, minus signs, LaTeX spacing and final full stop.

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
  """The text with one kind of minus sign, single spaces, and without LaTeX that says nothing."""
  text = " ".join(text.translate(SIGNS).split())
  text = UNWRAP.sub(r" \1 ", text)
  text = FRACTION.sub(_written_out, text)
  text = SYMBOLS.sub(lambda mark: mark["keep"] or ("," if mark["comma"] else ""), text)
  text = " ".join(text.split())
  return re.sub(r"^([-+]) (?=[\d.$])", r"\1", text)


def _written_out(mark: re.Match[str]) -> str:
  over, under = (mark[1], mark[2]) if mark[1] else (mark[3], mark[4])
  after_digit = mark.start() > 0 and mark.string[mark.start() - 1].isdigit()
  return f"{' ' if after_digit else ''}{over}/{under}"


def _last_number(text: str) -> Fraction | None:
  last = None
  for found in NUMBER.finditer(text):
    last = found
  if last is None or len(last[0]) > DIGITS or AFTER.match(text, last.end()):
    return None
  start = last.start("whole" if last["whole"] else "value")
  before = text[max(0, start - REACH) : start]
  if BEFORE.search(before) or (len(last["value"]) == 3 and SPACED.search(before)):
    return None
  value, under = _value(last["value"]), _value(last["over"] or "1")
  if value is None or not under:
    return None
  value = Fraction(last["whole"] or 0) + value / under
  return -value if "-" in (last["sign"], last["inner"]) else value


def _value(digits: str) -> Fraction | None:
  """`1,234.5` as a number; None where the commas do not group thousands."""
  if "," in digits and not re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
    return None
  return Fraction(digits.replace(",", ""))
