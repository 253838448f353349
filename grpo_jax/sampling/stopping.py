"""When a completion ends: one table that follows stop strings across tokens.

Stop strings are matched on the bytes of the text, wherever token borders fall. Their Aho-Corasick
automaton (Aho & Corasick 1975) is run over the bytes of every token once, on the host; what is left
for the device is `state = table[state, token]`, one lookup per token and completion.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


def stop_table(
  pieces: Sequence[bytes], strings: Sequence[str], ids: Sequence[int], vocab_size: int
) -> Int32[np.ndarray, "S V"]:
  """`table[state, token]` = the state after `token`; a completion starts in state 0.

  It has ended in the last state, S - 1, which is never left. With no stop strings S is 2.

  Args:
    pieces: the bytes that each token stands for, b"" where it adds none to the text (then the
      match goes on across it).
    strings: stop strings; the token in which one is completed is the last of the completion.
    ids: tokens that end a completion by themselves, such as the end of text.
    vocab_size: V, columns of the table; at least `len(pieces)`. Tokens beyond have no text.

  Raises ValueError for an empty string, for none to stop at, or an id outside the vocabulary.

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
  if bad := [i for i in ids if not 0 <= i < vocab_size]:
    raise ValueError(f"stop ids {bad} must be in 0..{vocab_size - 1}")
  if len(pieces) > vocab_size:
    raise ValueError(f"{len(pieces)} pieces for a vocabulary of {vocab_size}")
  step = _automaton([text.encode("utf-8") for text in strings])
  count = len(step)  # the last one is the end
  lengths = np.array([len(piece) for piece in pieces], np.int64)
  states = np.repeat(np.arange(count, dtype=np.int32)[:, None], vocab_size, axis=1)
  for position in range(lengths.max(initial=0)):
    tokens = np.flatnonzero(lengths > position)
    bytes_there = np.fromiter((pieces[t][position] for t in tokens), np.int64, len(tokens))
    states[:, tokens] = step[states[:, tokens], bytes_there]
  states[:, list(ids)] = count - 1
  return states


def _automaton(patterns: Sequence[bytes]) -> Int32[np.ndarray, "S 256"]:
  """State after each byte; state 0 has matched nothing, the last one a whole pattern, for good."""
  prefixes = {b""} | {p[:i] for p in patterns for i in range(1, len(p))}
  # A prefix that holds another whole pattern is never reached.
  prefixes = sorted((p for p in prefixes if not any(w in p for w in patterns)), key=len)
  number = {prefix: i for i, prefix in enumerate(prefixes)}
  end = len(prefixes)
  step = np.full((end + 1, 256), end, np.int32)
  for prefix, i in number.items():
    for byte in range(256):
      seen = prefix + bytes([byte])
      if any(seen.endswith(pattern) for pattern in patterns):
        continue
      longest = next(k for k in range(len(seen) + 1) if seen[k:] in number)
      step[i, byte] = number[seen[longest:]]
  return step
