"""Decides where a completion ends: one table that follows stop strings across tokens.

Stop strings are matched on the bytes of the text, wherever token borders fall. Their Aho-Corasick
automaton runs over the bytes of every token once, on the host. The device then only looks up
`state = table[state, token]`, once per token and completion.

References:
  Aho and Corasick 1975, Efficient string matching.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


def stop_table(
  pieces: Sequence[bytes], strings: Sequence[str], ids: Sequence[int], vocab_size: int
) -> Int32[np.ndarray, "S V"]:
  """Returns the table whose entry `[state, token]` is the state after `token`.

  A completion starts in state 0. It has ended in the last state, S - 1, which is never left.
  Without stop strings S is 2.

  Args:
    pieces: the bytes of each token; b"" for a token without text, which a match continues across.
    strings: stop strings; the token that completes one is the last token of the completion.
    ids: tokens that end a completion by themselves, such as the end of text.
    vocab_size: number of columns of the table, V, at least `len(pieces)`. Tokens beyond the pieces
      have no text.

  Raises:
    ValueError: a stop string is empty, there is neither a stop string nor a stop id, an id is
      outside the vocabulary, or there are more pieces than tokens.

  Example:
    >>> table = stop_table([b"a", b"ab", b"\\n", b"b\\n"], ["b\\n"], [], vocab_size=4)
    >>> table[0].tolist()  # only the last token holds all of "b\\n"; the second one begins it
    [0, 1, 0, 2]
    >>> table[1].tolist()  # after a "b", the line break alone completes it
    [0, 1, 2, 2]
  """
  if any(not text for text in strings):
    raise ValueError(f"stop strings are {list(strings)!r}: each needs at least one character")
  if not len(strings) and not len(ids):
    raise ValueError("no stop id and no stop string: completions could never end")
  if outside := [i for i in ids if not 0 <= i < vocab_size]:
    raise ValueError(f"stop ids {outside} must be in 0..{vocab_size - 1}")
  if len(pieces) > vocab_size:
    raise ValueError(f"{len(pieces)} pieces for a vocabulary of {vocab_size}")
  step = _automaton([text.encode("utf-8") for text in strings])
  count = len(step)  # number of states; the last one is the end
  lengths = np.array([len(piece) for piece in pieces], np.int64)
  states = np.repeat(np.arange(count, dtype=np.int32)[:, None], vocab_size, axis=1)
  for position in range(lengths.max(initial=0)):
    tokens = np.flatnonzero(lengths > position)
    byte = np.fromiter((pieces[t][position] for t in tokens), np.int64, len(tokens))
    states[:, tokens] = step[states[:, tokens], byte]
  states[:, list(ids)] = count - 1
  return states


def _automaton(patterns: Sequence[bytes]) -> Int32[np.ndarray, "S 256"]:
  """Returns the state after each byte: 0 has matched nothing, the last one a whole pattern."""
  prefixes = {b""} | {p[:i] for p in patterns for i in range(1, len(p))}
  # A prefix that contains another whole pattern is never reached.
  prefixes = sorted((p for p in prefixes if not any(w in p for w in patterns)), key=len)
  number = {prefix: i for i, prefix in enumerate(prefixes)}
  end = len(prefixes)
  step = np.full((end + 1, 256), end, np.int32)
  for prefix, i in number.items():
    for byte in range(256):
      text = prefix + bytes([byte])
      if any(text.endswith(pattern) for pattern in patterns):
        continue
      longest = next(k for k in range(len(text) + 1) if text[k:] in number)
      step[i, byte] = number[text[longest:]]
  return step
