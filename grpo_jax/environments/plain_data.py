"""Carries plain values between two processes that do not trust each other.

Only exact built-in types pass, with a limit of depth and size, as JSON with tags. Nothing names a
class, so reading a message runs no code, whoever wrote it. It imports the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MAX_DEPTH = 64
MAX_BYTES = 2**22  # of a message


class NotPlain(ValueError):
  """Reports a value or a message that cannot be carried."""


def encode(value: object) -> bytes:
  """Returns a value as bytes.

  Raises:
    NotPlain: it holds something else than None, bool, int, float, complex, str, bytes, list, tuple,
      set, frozenset and dict, or is too deep or too large.

  Example:
    >>> decode(encode({(1, 2): [None, True, 2.5, b"x", {3}]}))
    {(1, 2): [None, True, 2.5, b'x', {3}]}
  """
  data = json.dumps(_pack(value, MAX_DEPTH)).encode()
  if len(data) > MAX_BYTES:
    raise NotPlain(f"a value of {len(data)} bytes, more than {MAX_BYTES}")
  return data


def _pack(value: Any, depth: int) -> Any:
  kind = type(value)
  if value is None or kind in (bool, float, str):
    return value
  if kind is int:
    return value if abs(value) < 2**63 else ["i", hex(value)]
  if kind is bytes:
    return ["b", value.hex()]
  if kind is complex:
    return ["c", value.real, value.imag]
  if depth == 0:
    raise NotPlain(f"a value of more than {MAX_DEPTH} levels")
  if kind is dict:
    items = [part for item in value.items() for part in item]
    return ["d", *(_pack(part, depth - 1) for part in items)]
  if kind in _TAGS:
    return [_TAGS[kind], *(_pack(part, depth - 1) for part in value)]
  raise NotPlain(f"a value of the type {kind.__name__}")


_TAGS = {list: "l", tuple: "t", set: "s", frozenset: "f"}
_KINDS = {tag: kind for kind, tag in _TAGS.items()}


def decode(data: bytes) -> Any:
  """Returns the value that `encode` made these bytes of.

  Raises:
    NotPlain: it did not make them.
  """
  try:
    return _unpack(json.loads(data), MAX_DEPTH)
  except (ValueError, TypeError, KeyError, IndexError, RecursionError, MemoryError) as error:
    raise NotPlain(f"not a message: {type(error).__name__}: {error}") from error


def _unpack(value: Any, depth: int) -> Any:
  if type(value) is not list:
    if type(value) is dict:
      raise NotPlain("an untagged dict")
    return value
  tag, *parts = value
  if tag == "i":
    return int(parts[0], 16)
  if tag == "b":
    return bytes.fromhex(parts[0])
  if tag == "c":
    return complex(float(parts[0]), float(parts[1]))
  if depth == 0:
    raise NotPlain(f"a value of more than {MAX_DEPTH} levels")
  values = [_unpack(part, depth - 1) for part in parts]
  if tag == "d":
    return dict(zip(values[::2], values[1::2], strict=True))
  return _KINDS[tag](values)


def send(descriptor: int, message: object) -> None:
  """Writes a message, with its length before it."""
  data = encode(message)
  data = memoryview(len(data).to_bytes(4, "big") + data)
  while data:
    data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
  """Reads a message.

  Raises:
    EOFError: the other side has closed its end.
    NotPlain: the bytes are not a message.
  """
  size = int.from_bytes(_read(descriptor, 4), "big")
  if size > MAX_BYTES:
    raise NotPlain(f"a message of {size} bytes, more than {MAX_BYTES}")
  return decode(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
  parts, left = [], size
  while left:
    part = os.read(descriptor, min(left, 1 << 16))
    if not part:
      raise EOFError("the other process has ended")
    parts.append(part)
    left -= len(part)
  return b"".join(parts)


def plain(value: object) -> Any:
  """Returns a value with the containers of `collections` as the built-in types that they equal.

  Example:
    >>> import collections
    >>> plain([collections.Counter("aab"), collections.namedtuple("P", "x y")(1, 2)])
    [{'a': 2, 'b': 1}, (1, 2)]
  """
  return _plain(value, MAX_DEPTH)


def _plain(value: Any, depth: int) -> Any:
  kind = type(value)
  if depth == 0:
    return value
  module = sys.modules.get("collections")
  names = ("Counter", "OrderedDict", "defaultdict")
  if kind is dict or kind in [getattr(module, name, None) for name in names]:
    return {_plain(k, depth - 1): _plain(v, depth - 1) for k, v in dict.items(value)}
  if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
    kind = tuple
  if kind in _TAGS:
    return kind(_plain(part, depth - 1) for part in kind.__iter__(value))
  return value
