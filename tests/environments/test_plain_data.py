"""Tests that plain data passes unchanged and that nothing else does."""

import collections
import math
import os

import pytest

from grpo_jax.environments import plain_data
from grpo_jax.environments.plain_data import NotPlain, decode, encode, plain


class Sly(int):
  def __eq__(self, other):
    return True

  __hash__ = int.__hash__


@pytest.mark.parametrize(
  "value",
  [
    None, True, 0, -(2**63) - 1, 10**30, 1.5, -0.0, math.inf, 1 + 2j, "", "é\ud800\0", b"\xff",
    [], (), set(), {}, [[1], (2, (3,)), {4}, frozenset({5})], {(1, 2): {"a": [None]}, 3: b""},
    [True, 1, 1.0], ["l", "i", "d"],
  ],
)  # fmt: skip
def test_a_value_passes_with_its_exact_types(value):
  def exact(v):
    parts = v.items() if isinstance(v, dict) else v if isinstance(v, list | tuple) else ()
    return type(v), repr(v) if not parts else [exact(part) for part in parts]

  assert decode(encode(value)) == value
  assert exact(decode(encode(value))) == exact(value)


def test_an_integer_beyond_the_digits_that_python_prints_passes():
  assert decode(encode(-(10**5000))) == -(10**5000)


def test_nan_passes():
  assert math.isnan(decode(encode([float("nan")]))[0])


@pytest.mark.parametrize(
  "value",
  [Sly(1), [Sly(1)], {Sly(1): 1}, object(), len, range(3), iter([]), bytearray(b"x"), type],
)
def test_other_types_are_refused(value):
  with pytest.raises(NotPlain, match="of the type"):
    encode(value)


def test_depth_and_size_are_limited():
  deep = []
  for _ in range(plain_data.MAX_DEPTH + 1):
    deep = [deep]
  endless = []
  endless.append(endless)
  for value in (deep, endless):
    with pytest.raises(NotPlain, match="levels"):
      encode(value)
  with pytest.raises(NotPlain, match="bytes"):
    encode("x" * (plain_data.MAX_BYTES + 1))


@pytest.mark.parametrize(
  "data",
  [
    b"", b"x", b"\xff", b"{}", b'["x", 1]', b"[]", b"[[]]", b'["d", 1]', b'["s", ["l"]]',
    b'["i"]', b'["i", "zz"]', b'["b", 1]', b'["c", "x", 1]', b"[" * 10**5, b'["l", {"a": 1}]',
    b"1" * 5000, b'["d", ["l"], 1]',
  ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(data):
  with pytest.raises(NotPlain):
    decode(data)


def test_a_message_is_not_read_beyond_its_limit():
  read, write = os.pipe()
  os.write(write, b"\xff\xff\xff\xff")
  with pytest.raises(NotPlain, match="more than"):
    plain_data.receive(read)
  os.write(write, b"\0\0\0\x08[1")
  os.close(write)
  with pytest.raises(EOFError):
    plain_data.receive(read)
  os.close(read)


def test_containers_of_collections_become_built_in_ones():
  point = collections.namedtuple("point", "x y")
  value = [collections.Counter("aab"), collections.OrderedDict(a=point(1, (2,)))]
  result = plain(value)
  assert result == [{"a": 2, "b": 1}, {"a": (1, (2,))}]
  assert type(result[0]) is dict
  assert type(result[1]["a"]) is tuple
  assert plain(Sly(1)).__class__ is Sly  # refused later
