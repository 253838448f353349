"""Extracts the final answer of a completion. How it is read as a number is in `numerals.py`.

Every function here takes time linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import re

from grpo_jax.tasks.rewards.numerals import normalize, number, plain

__all__ = ["extract", "final", "normalize", "number", "plain"]

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
