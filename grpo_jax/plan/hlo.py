"""The text of a compiled program (optimized HLO) as instructions by computation."""

import dataclasses
import math
import re
from functools import cached_property

# Bytes of an element; a type that is not here (token, opaque) takes no memory.
WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a shape; `main` is false for what the compiler keeps in on-chip memory."""

  dims: tuple[int, ...]
  bytes: float
  main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape op(operands), attributes`; of a call, also the scope it is in."""

  name: str
  shape: str
  op: str
  arguments: str
  attributes: str
  root: bool
  scope: str = ""

  @cached_property
  def operands(self) -> list[str]:
    return _NAME.findall(self.arguments)

  @cached_property
  def leaves(self) -> list[Leaf]:
    return [_leaf(*match.groups()) for match in _LEAF.finditer(self.shape)]

  @property
  def size(self) -> float:
    """Bytes, wherever they are."""
    return sum(leaf.bytes for leaf in self.leaves)

  @property
  def main(self) -> float:
    """Bytes in main memory."""
    return sum(leaf.bytes for leaf in self.leaves if leaf.main)

  def attribute(self, name: str) -> str:
    """The text after `name=`, "" if there is none: up to the end of the braces or the word."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found.group(1) if found else ""

  def called(self, *names: str) -> list[str]:
    """Computations that these attributes name."""
    return [name for key in names for name in _NAME.findall(self.attribute(key))]


def _leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
  sizes = tuple(int(d) for d in dims.split(",") if d)
  digits = re.match(r"[a-z](\d+)", dtype)
  width = WIDTHS.get(dtype, int(digits.group(1)) / 8 if digits else 0)
  # S(0), or nothing, is main memory; S(1) and above are on the chip.
  return Leaf(sizes, math.prod(sizes) * width, not re.search(r"S\([1-9]", layout or ""))


class Module:
  """An HLO module: computations by name, each instructions by name; `entry` is where it starts."""

  def __init__(self, text: str):
    self.partitions = int((re.findall(r"num_partitions=(\d+)", text[:100_000]) or ["1"])[0])
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    body: dict[str, Instruction] = {}
    # What a kernel says about itself is written over several lines.
    for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():
      if line[:1] not in (" ", "}", "") and line.endswith("{"):
        found = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
        body = self.computations[found.group(2)] = {}
        self.entry = found.group(2) if found.group(1) else self.entry
      elif " = " in line and (instruction := _instruction(line)):
        body[instruction.name] = instruction
    if not self.entry:
      raise ValueError("this is no text of an HLO module: it has no ENTRY computation")

  def root(self, name: str) -> Instruction:
    """The result of a computation."""
    return next(i for i in self.computations[name].values() if i.root)

  def parameters(self, name: str) -> dict[int, str]:
    """Names of a computation's parameters by number."""
    inside = self.computations[name].values()
    return {int(i.arguments): i.name for i in inside if i.op == "parameter"}


def _instruction(line: str) -> Instruction | None:
  """One line of a computation; None for a line of another kind."""
  line = re.sub(r"/\*.*?\*/", "", line).strip()
  left, _, right = line.partition(" = ")
  end = _closing(right, 0) if right.startswith("(") else right.find(" ")
  shape, rest = right[:end], right[end:].lstrip()
  opening = rest.find("(")
  if end <= 0 or opening <= 0 or not re.fullmatch(r"[a-z][\w\-]*", rest[:opening]):
    return None
  closing = _closing(rest, opening)
  attributes = re.sub(r"metadata=\{[^}]*\}", "", rest[closing:])
  name = left.removeprefix("ROOT ").lstrip("%")
  op, arguments = rest[:opening], rest[opening + 1 : closing - 1]
  found = re.search(r'op_name="([^"]*)"', rest[closing:]) if op == "custom-call" else None
  root, scope = left.startswith("ROOT "), found.group(1) if found else ""
  return Instruction(name, shape, op, arguments, attributes, root, scope)


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.end()
  return len(text)
