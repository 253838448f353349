"""Writes down the tokens of completions with what the sampler knew of each: for `report`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.episodes import Episodes
from grpo_jax.sampling.sampler import Generated
from grpo_jax.tokens import AnyTokenizer

DIGITS = 4  # after the point
ANCHOR = "a"  # a tokenizer may drop the space of a token that begins a text


class Pieces:
  """Returns the text of single tokens, the space before a word included.

  A token that is only a part of a character is shown as U+FFFD, and one without text, such as the
  end of a text, by its name.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> pieces = Pieces(ByteTokenizer())
    >>> pieces([104, 105, 256])
    ['h', 'i', '<|endoftext|>']
  """

  def __init__(self, tokenizer: AnyTokenizer) -> None:
    self._tokenizer, self._known = tokenizer, {}
    self._anchor = tokenizer.encode(ANCHOR)[-1:]
    self._before = len(tokenizer.decode(self._anchor))

  def __call__(self, ids: Sequence[int]) -> list[str]:
    """Returns one text per token."""
    return [self._piece(int(i)) for i in ids]

  def _piece(self, i: int) -> str:
    if i not in self._known:
      text = self._tokenizer.decode([*self._anchor, i])[self._before :]
      self._known[i] = text or self._tokenizer.token(i)
    return self._known[i]


def token_records(out: Generated, tokenizer: AnyTokenizer) -> list[list[dict[str, Any]]]:
  """Returns the tokens of each completion, [P][G].

  Each is a dict of lists with one entry per token: `text`, and `logp` and `entropy` in nats under
  the sampler, rounded. In episodes, tokens of observations have None for both.
  """
  pieces, records = Pieces(tokenizer), []
  shown = out.attended if isinstance(out, Episodes) else out.mask
  for p in range(len(out.texts)):
    records.append([])
    for g in range(len(out.texts[p])):
      keep = shown[p, g]
      own = out.mask[p, g][keep]
      records[p].append(
        {
          "text": pieces(out.tokens[p, g][keep]),
          "logp": rounded(out.logp[p, g][keep], own),
          "entropy": rounded(out.entropy[p, g][keep], own),
        }
      )
  return records


def rounded(values: np.ndarray, own: np.ndarray) -> list[float | None]:
  """Returns numbers to write; None for tokens that are not the policy's, and for NaN.

  Example:
    >>> rounded(np.array([0.123456, 1.0]), np.array([True, False]))
    [0.1235, None]
  """
  known = own & np.isfinite(values)
  return [round(float(v), DIGITS) if k else None for v, k in zip(values, known)]
