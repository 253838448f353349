"""Tests the stop table against its definition, byte by byte over the text in plain Python."""

import numpy as np
import pytest

from grpo_jax.sampling.stopping import stop_table
from grpo_jax.tokens import ByteTokenizer

PIECES = [b"a", b"b", b"ab", b"ba", b"", b"aab", b"bb\n", b"\n", "é".encode()[:1], "é".encode()[1:]]


def ends_at(tokens, strings, ids):
  """Returns the index of the ending token, or None, by searching the text."""
  text = b""
  for i, token in enumerate(tokens):
    text += PIECES[token]
    if token in ids or any(string.encode() in text for string in strings):
      return i
  return None


def table_ends_at(table, tokens):
  state = 0
  for i, token in enumerate(tokens):
    state = table[state, token]
    if state == len(table) - 1:
      return i
  return None


@pytest.mark.parametrize(
  ("strings", "ids"),
  [
    (["abab"], []),
    (["aab", "abb"], []),
    (["aa", "abaab", "b\n"], [4]),
    (["b", "ab"], []),  # one inside another
    (["é\n", "aé"], []),
    ([], [1, 3]),
  ],
)
def test_a_completion_ends_where_its_text_first_holds_a_stop_string(strings, ids):
  table = stop_table(PIECES, strings, ids, vocab_size=12)
  rng = np.random.default_rng(0)
  ended = 0
  for _ in range(300):
    tokens = rng.integers(0, len(PIECES), 12).tolist()
    expected = ends_at(tokens, strings, ids)
    assert table_ends_at(table, tokens) == expected, tokens
    ended += expected is not None
  assert ended > 10


def test_the_end_is_never_left_and_tokens_without_text_change_nothing():
  table = stop_table(PIECES, ["abab"], [7], vocab_size=12)
  assert (table[-1] == len(table) - 1).all()
  np.testing.assert_array_equal(table[:, 10], np.arange(len(table)))
  assert table.dtype == np.int32


def test_several_bytes_of_a_byte_tokenizer():
  table = stop_table(ByteTokenizer().pieces(), ["\n\n"], [256], vocab_size=300)
  state = 0
  for byte in b"x\ny\n":
    state = table[state, byte]
  assert state == 1
  assert table[state, 10] == 2
  assert table[state, 256] == 2


@pytest.mark.parametrize(
  ("strings", "ids", "message"),
  [
    ([""], [], "at least one character"),
    ([], [], "no stop id and no stop string"),
    ([], [12], r"stop ids \[12\] must be in 0..11"),
  ],
)
def test_wrong_arguments_are_refused(strings, ids, message):
  with pytest.raises(ValueError, match=message):
    stop_table(PIECES, strings, ids, vocab_size=12)
  with pytest.raises(ValueError, match="10 pieces for a vocabulary of 9"):
    stop_table(PIECES, ["a"], [], vocab_size=9)
