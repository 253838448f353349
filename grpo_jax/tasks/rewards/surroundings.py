"""Decides whether a number in a text stands alone, from the text before and after it.

Both sides have to be something that leaves a number as it is: a word, a unit, punctuation, a
bracket. Operators, functions, lists, ranges and everything unknown make it part of something else.
"""

from __future__ import annotations

import re

WINDOW = 64  # characters before and after a number that are looked at
CURRENCY = "$€£¥₹"
# A letter of a script without capitals: words of Chinese have no spaces between them.
UNCASED = (
  r"[^\W\d_A-Za-z\u00aa-\u058f\u10a0-\u10ff\u13a0-\u13ff\u1c80-\u1cbf\u1d00-\u1fff\u2100-\u218f"
  r"\u2c00-\u2dff\ua640-\ua7ff\uab30-\uabbf\U00010400-\U000104ff]"
)
EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf"
LETTER = r"[^\W\d_]"


def _any(*patterns: str) -> str:
  return f"(?:{'|'.join(patterns)})"


# --- before a number ------------------------------------------------------------------------------

FUNCTION = _any(
  r"a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?", "log|ln|lg|exp|sqrt|cbrt|root|abs|floor|ceil|ceiling",
  "round|gcd|lcm|det|max|min|mod|modulo|rem|remainder|base|factorial|choose", "plus|minus|times",
  "divided|over|multiplied|squared|cubed|than|not|never|or|between|except",
)  # fmt: skip
SIGN = re.compile(
  r"(?:(?P<sign>[-+])(?P<gap> ?)|\b(?P<word>minus|negative) )?"
  rf"(?:[{CURRENCY}] ?(?P<inner>[-+] ?)?)?\Z",
  re.IGNORECASE,
)
# After these, a sign belongs to the number. With a space after the sign, a word is not enough.
BEFORE_SIGN = re.compile(r"(?:^|\n|[=≈:,;.?([{*`'\"$>] ?)\Z")
WORD_BEFORE_SIGN = re.compile(rf"{LETTER}{{2}} \Z")
OPENER = re.compile(r"(?:[(\[{\"'“”‘’`$]|(?<!\w)_|\*+)[ ]?\Z")  # brackets, quotes, markdown
# Before an opening bracket: a function or a factor, as in f(5), 2(5), \sqrt{5} and \{5.
APPLIED = re.compile(
  _any(
    r"[A-Za-z\d)\]}_^\\|]", r"\d\.", rf"(?:\d|[)\]}}]|\\[A-Za-z]+|\b{FUNCTION}) ",
  ) + r"\Z"
)  # fmt: skip
FACTOR = re.compile(r"(?:[\d)\]}]|\b[A-Za-z]) ?\Z")  # before a star
BEFORE = re.compile(
  _any(
    "^", r"\n", f"[:,;.{EMOJI}]", r"[—?](?=\s)", r"(?<!\d)[#•]",
    "(?<![<>!])[=≈~]", "[=-]>", "[→⇒∴]",
    r"</?[A-Za-z][\w-]*>",  # a tag
    r"(?:^|\s)\(?[A-Ea-e\d]\)(?=\s)",  # (B) and 1)
    r"[A-Za-z]{2}[^()\d=+*/^\\]*\)(?=\s)",  # (in words)
    r"\\(?:approx|Rightarrow|implies|therefore|to|rightarrow|q?quad|space|\\)",
    rf"(?<!\\)\b{LETTER}{{2,}}!?", UNCASED,  # a word
  ) + r"[ \n]*\Z"
)  # fmt: skip
NOT_BEFORE = re.compile(
  _any(
    rf"\b{FUNCTION}",
    r"[\d)\]}] ?[*/×÷·^+-]+", r"\b\d*[a-z] ?[*/×÷·^+-]+",  # 3 * 6 and 3x - 2
    r"\d ?[~—]", r"\d ?:(?=\Z)", r"\d :", r"(?<![A-Za-z]{2} )\b\d++:",  # ranges, ratios, times
    rf"\d{UNCASED}{{1,4}}", r"\d ?'", r"\.\.", r"(?:[\d)\]}]|\b[A-Za-z]|^|\W)!",
    # 1, 5 and x = 1, y = 5
    r"(?:[\d)\]}%°∞]|\.\.|\b[a-z]|\\[a-z]+) ?[,;&](?: ?[a-z](?:_\{?\w{1,3}\}?)? ?[=≈])?",
    r"\d[^.?\n]{0,40}\b(?:and|&)(?: [a-z] ?=)?",  # 3 apples and 4
    r"\d (?:to|by|in|per|of|vs\.?|versus|through|until|till|x|r\.?)",
    r"\b(?:divided|multiplied) by", r"\b(?:not|un) ?equal to", "% of",
    r"\b(?:root|half|third|quarter|fourth|fifth|tenth|square|cube|percent|out|instead|log) of",
    r"\b(?:logarithm|double|twice|multiple|sine|cosine|tangent|reciprocal|inverse) of",
    r"\b(?:negative|opposite|absolute value) of", r"\b(?:half|twice|double|triple)",
  ) + r"[ \n]*\Z",
  re.IGNORECASE,
)  # fmt: skip


def sign_before(text: str, start: int) -> int | None:
  """Returns the sign, 1 or -1, of a number that begins at `start`; None: it does not stand alone.

  Example:
    >>> sign_before("It is -5", 7), sign_before("It is 8", 6), sign_before("8 - 5", 4)
    (-1, 1, None)
  """
  before = text[max(0, start - WINDOW) : start]
  if before[-1:].isnumeric():
    return None
  sign = SIGN.search(before)
  signs = [mark for mark in (sign["sign"], sign["word"], sign["inner"]) if mark]
  before = before[: sign.start()]
  by_word = not sign["gap"] and WORD_BEFORE_SIGN.search(before)
  if len(signs) > 1 or (signs and not (BEFORE_SIGN.search(before) or by_word)):
    return None
  while opener := OPENER.search(before):
    before = before[: opener.start()]
    if opener[0][0] in "([{" and APPLIED.search(before):
      return None
    if opener[0][0] == "*" and FACTOR.search(before):
      return None
  if NOT_BEFORE.search(before) or not BEFORE.search(before):
    return None
  return -1 if signs and signs[0].strip() != "+" else 1


# --- after a number -------------------------------------------------------------------------------

# Units that are short enough to be variables or functions.
SHORT_UNIT = _any(
  "mm|cm|dm|km|kg|mg|ml|mL|cl|ft|in|yd|mi|lb|oz|hr|hz|Hz|kW|kV|mA|MB|GB|TB|KB|pm|am|PM|AM",
  "th|st|nd|rd|[mgshlLVWCF]",
)
CLOSER = _any(r"[)\]\"'“”‘’`$]", r"(?<!\\)\}", r"\*+(?![\w(\\])", r"_(?!\w)")
END = rf"(?=[ \n]|\Z|[\"'”’`)\]}}*$<]|{UNCASED})"  # after punctuation
OPERATOR = _any(
  "mod|modulo|remainder|rem|plus|minus|multiplied|divided|squared|cubed|choose|factorial|or|base",
  "halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths",
  "(?:less|more|fewer|greater) than", "to the", r"times (?:(?!a )[a-z](?![a-z])|[\\(])",
  "and (?:a|one|two|three) (?:half|thirds?|quarters?|fourths?)",
  r"pi\w{0,2}|sqrt|sin|cos|tan|log|ln|exp",
)  # fmt: skip
AFTER = re.compile(
  rf"(?! ?{OPERATOR}(?![A-Za-z])| ?[πτφ∞半]){CLOSER}*+(?: ?[%°{CURRENCY}])?+{CLOSER}*+" + _any(
    r"\Z", r"\n", rf"\.(?!\.){END}", f"[?:]{END}",
    rf"[,;]{END}(?! ?(?:[A-Za-z]|\\infty|∞|\.\.) ?(?:[,;)\]}}]|\Z))",  # not (5, x)
    rf" ?(?-i:{SHORT_UNIT})(?:[23](?!\w))?+(?![A-Za-z\d(!])(?!\^\{{?+[^23])"
    r"(?! ?[*×÷·+!]| ?/ ?[\d(])",
    rf" ?(?![xyz]+\b|[abc]+\b|[ijkn]+\b){LETTER}{{3,}}+(?![\d(])",  # a word, not xy
    rf" {LETTER}{{2}}(?![\w(])", rf" (?-i:[aI]) {LETTER}{{2}}", UNCASED, f" ?[{EMOJI}]",
    rf"-{LETTER}{{2}}", rf" ?[-—]+ {LETTER}{{2}}", "—",
    rf"/ ?(?:{LETTER}{{2}}|[hs]\b)",  # per hour
    r"</?[A-Za-z][\w-]*>", " ?[=≈→⇒](?!=)", r"\\(?:\\|q?quad|degree|space)",
    rf" ?[(\[](?={LETTER}{{2}}|\$|[a-z]\))", r" [\"'“‘*`#•_]+[^\W_]",
  ),
  re.IGNORECASE,
)  # fmt: skip


def may_follow(text: str, end: int) -> bool:
  """Returns whether a number that ends at `end` stands alone as far as the text after it goes.

  Example:
    >>> may_follow("18 eggs", 2), may_follow("18.", 2), may_follow("5!", 1), may_follow("5x", 1)
    (True, True, False, False)
  """
  after = text[end : end + WINDOW]
  return not after[:1].isnumeric() and AFTER.match(after) is not None
