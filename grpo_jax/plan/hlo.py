"""Parses the text of a compiled program (optimized HLO) into instructions by computation."""

import dataclasses
import math
import re
from functools import cached_property

# Bytes per element. A type that is missing here (token, opaque) takes no memory.
WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Describes one array of a shape.

  Attributes:
    dims: size of each dimension.
    bytes: size in bytes.
    main: true in main memory, false in on-chip memory.
  """

  dims: tuple[int, ...]
  bytes: float
  main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """Holds one line, `%name = shape op(operands), attributes`.

  Attributes:
    root: true for the result of its computation.
    scope: `op_name` of a custom call, which ends in its named scopes; "" for other instructions.
  """

  name: str
  shape: str
  op: str
  arguments: str
  attributes: str
  root: bool
  scope: str = ""

  @cached_property
  def operands(self) -> list[str]:
    """Names of the operands."""
    return _NAME.findall(self.arguments)

  @cached_property
  def leaves(self) -> list[Leaf]:
    """Arrays of the result."""
    return [_leaf(*match.groups()) for match in _LEAF.finditer(self.shape)]

  @property
  def size(self) -> float:
    """Bytes of the result in any memory."""
    return sum(leaf.bytes for leaf in self.leaves)

  @property
  def main(self) -> float:
    """Bytes of the result in main memory."""
    return sum(leaf.bytes for leaf in self.leaves if leaf.main)

  def attribute(self, name: str) -> str:
    """Returns the value of the attribute `name`, a word or a group in braces; "" without it."""
    match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return match.group(1) if match else ""

  def called(self, *names: str) -> list[str]:
    """Returns the computations that these attributes name."""
    return [name for key in names for name in _NAME.findall(self.attribute(key))]


def _leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
  sizes = tuple(int(d) for d in dims.split(",") if d)
  digits = re.match(r"[a-z](\d+)", dtype)
  width = WIDTHS.get(dtype, int(digits.group(1)) / 8 if digits else 0)
  # S(0) or no memory space is main memory; S(1) and above are on-chip.
  return Leaf(sizes, math.prod(sizes) * width, not re.search(r"S\([1-9]", layout or ""))


class Module:
  """Parses an HLO module.

  Attributes:
    computations: instructions by name, by name of their computation.
    entry: name of the entry computation.
    partitions: number of devices that the program is partitioned over.

  Raises:
    ValueError: the text has no ENTRY computation.
  """

  def __init__(self, text: str):
    self.partitions = int((re.findall(r"num_partitions=(\d+)", text[:100_000]) or ["1"])[0])
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    body: dict[str, Instruction] = {}
    # A kernel's backend config spans several lines: join them.
    for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():
      if line[:1] not in (" ", "}", "") and line.endswith("{"):
        match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
        body = self.computations[match.group(2)] = {}
        self.entry = match.group(2) if match.group(1) else self.entry
      elif " = " in line and (instruction := parse_instruction(line)):
        body[instruction.name] = instruction
    if not self.entry:
      raise ValueError("the text is not an HLO module: it has no ENTRY computation")

  def root(self, name: str) -> Instruction:
    """Returns the root instruction of a computation."""
    return next(i for i in self.computations[name].values() if i.root)

  def parameters(self, name: str) -> dict[int, str]:
    """Returns the names of a computation's parameters by their number."""
    instructions = self.computations[name].values()
    return {int(i.arguments): i.name for i in instructions if i.op == "parameter"}


def parse_instruction(line: str) -> Instruction | None:
  """Parses one line of a computation; returns None for a line that is not an instruction.

  >>> parse_instruction("  ROOT %sum.1 = f32[2,4]{1,0} add(%a, %b)").operands
  ['a', 'b']
  """
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
  op_name = re.search(r'op_name="([^"]*)"', rest[closing:]) if op == "custom-call" else None
  root, scope = left.startswith("ROOT "), op_name.group(1) if op_name else ""
  return Instruction(name, shape, op, arguments, attributes, root, scope)


def _closing(text: str, start: int) -> int:
  """Returns the index after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.end()
  return len(text)
