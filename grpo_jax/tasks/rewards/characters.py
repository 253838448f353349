"""Rewrites Unicode characters that stand for numbers, so that digits alone are left to read."""

from __future__ import annotations

import itertools
import re
import unicodedata

# Characters that compatibility normalization (NFKC) loses or misreads.
MARKS = str.maketrans(
  {
    **dict.fromkeys("−‐‑‒–﹣－", "-"),
    **dict.fromkeys("⁄∕", "/"),
    "٫": ".",  # Arabic decimal separator
    "٬": ",",  # Arabic thousands separator
    "、": ", ",
    "。": ". ",
    "º": "°",
    **{letter: f"\\mathbb{{{plain}}}" for letter, plain in zip("ℂℕℚℝℤ", "CNQRZ")},
    "\u2062": "·",  # invisible times
    "\u2063": ",",  # invisible separator
    "\u2064": "+",  # invisible plus
  }
)
SCRIPTS = {"<super>": "^", "<sub>": "_"}
MAX_MARKS = 16  # accents on one letter; sorting them takes quadratic time
THIN_SPACE = re.compile(r"(?<=\d)[\u2009\u202f](?=\d{3}(?!\d))")  # groups digits: 10 000


def read_characters(text: str) -> str:
  r"""Returns a text in normal form C with ASCII digits and minus signs; ASCII text is unchanged.

  The digits of all scripts, full-width and circled ones become 0 to 9. Superscripts become
  `^{...}`, subscripts `_{...}` and characters for fractions `\frac{...}{...}`, so that 10³ is never
  103 and 18½ never 181/2. Invisible characters are deleted. Everything else gets its compatibility
  form (NFKC).

  Example:
    >>> read_characters("４２ ٤٢"), read_characters("10³ + x₁"), read_characters("18½")
    ('42 42', '10^{3} + x_{1}', '18\\frac{1}{2}')
  """
  if text.isascii():
    return text
  pieces: list[str] = []
  for kind, run in itertools.groupby(text, _kind):
    characters = "".join(run)
    if kind == "mark":
      pieces.append(characters[:MAX_MARKS])
    elif kind:
      pieces.append(f"{SCRIPTS[kind]}{{{unicodedata.normalize('NFKC', characters)}}}")
    else:
      pieces.extend(map(_read_character, characters.translate(MARKS)))
  text = THIN_SPACE.sub("", "".join(pieces))
  return unicodedata.normalize("NFKC", text).translate(MARKS)


def _kind(character: str) -> str:
  """Returns "<super>" or "<sub>" for a raised or lowered character, "mark" for an accent, or ""."""
  if unicodedata.combining(character):
    return "mark"
  tag = unicodedata.decomposition(character).partition(" ")[0]
  return tag if tag in SCRIPTS and character not in "ªº™℠" else ""


def _read_character(character: str) -> str:
  if character.isascii():
    return character
  category = unicodedata.category(character)
  if category == "Nd":
    return str(unicodedata.decimal(character))
  if category == "Cf":  # joiners, direction marks, soft hyphens
    return ""
  if category != "No":
    return character
  tag = unicodedata.decomposition(character).partition(" ")[0]
  plain = unicodedata.normalize("NFKC", character)
  if tag == "<fraction>":
    over, _, under = plain.partition("⁄")
    return f"\\frac{{{over}}}{{{under}}}" if under else f"{over}/"
  # Circled digits, digits with a full stop: never one number with their neighbours.
  return f" {plain} " if tag else character
