"""Estimates the FLOPs, memory traffic and collective traffic of a compiled program.

XLA's own cost analysis counts the body of a loop once, so the cost of a model with scanned layers
comes out too small by its number of layers. Here a loop body counts as often as the loop runs it.
All numbers are per device, since a partitioned program is the program of one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from grpo_jax.plan.flops import instruction_flops, kernel_cost
from grpo_jax.plan.hlo import Instruction, Module

COLLECTIVES = {
  # Bytes that a device sends per byte of its operand, in a ring of n devices.
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-broadcast": lambda n: 1,
  "collective-permute": lambda n: 1,
}
# XLA:TPU: what goes from one slice to another is handed to a runtime on the host.
BETWEEN_SLICES = "xla_megascale_runtime"
# Instructions that move no data themselves.
# fmt: off
FREE = frozenset((
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional",
  "after-all", "iota", "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency",
))
# fmt: on
VIEWS = frozenset(("bitcast", "reshape", "convert", "copy", "transpose", "get-tuple-element"))
SLICES = frozenset(("dynamic-slice", "slice", "gather"))
KERNEL_TARGETS = ("tpu_custom_call", "__cudnn$")  # prefixes of the call targets of kernels


@dataclasses.dataclass(frozen=True)
class Cost:
  """Holds the work of one device.

  Attributes:
    flops: floating-point operations of matmuls, two per multiply-add.
    bytes: bytes read from and written to main memory, an upper estimate. Values inside a fusion are
      not counted, a slice counts as its own size, and values in on-chip memory are left out.
    collectives: kind -> (number of collectives, bytes that a device sends for them in a ring).
    between_slices: bytes that a device hands to the network between slices; not in `collectives`.
  """

  flops: float = 0.0
  bytes: float = 0.0
  collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  between_slices: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    collectives = dict(self.collectives)
    for kind, (count, sent) in other.collectives.items():
      old = collectives.get(kind, (0.0, 0.0))
      collectives[kind] = (old[0] + count, old[1] + sent)
    between = self.between_slices + other.between_slices
    return Cost(self.flops + other.flops, self.bytes + other.bytes, collectives, between)

  def __mul__(self, count: float) -> "Cost":
    sent = {kind: (n * count, size * count) for kind, (n, size) in self.collectives.items()}
    between = self.between_slices * count
    return Cost(self.flops * count, self.bytes * count, sent, between)

  @property
  def sent(self) -> float:
    """Bytes that a device sends to other devices of its slice."""
    return sum(size for _, size in self.collectives.values())


class Counter:
  """Counts the work of an HLO module.

  Args:
    text: optimized HLO, as `jax.stages.Compiled.as_text` returns it.
  """

  def __init__(self, text: str):
    self.module = Module(text)
    self._costs: dict[tuple[str, bool], tuple[Cost, Cost]] = {}

  def cost(self) -> tuple[Cost, Cost]:
    """Returns the cost of the module in two parts.

    Returns:
      The cost of everything that runs once or a known number of times, and the cost of one
      iteration of the loop whose trip count depends on the data (`index < n and ...`). If there are
      several such loops, the costliest counts: in the sampler, the one before any compaction.
    """
    return self._computation_cost(self.module.entry, True)

  def _computation_cost(self, name: str, moves: bool) -> tuple[Cost, Cost]:
    """Returns `cost` of one computation.

    Args:
      name: the computation.
      moves: false inside a fusion, whose values stay on the chip.
    """
    if (name, moves) not in self._costs:
      scope = self.module.computations[name]
      total, iteration = Cost(), Cost()
      for instruction in scope.values():
        once, inner = self._instruction_cost(instruction, scope, moves)
        total, iteration = total + once, max(iteration, inner, key=_weight)
      self._costs[name, moves] = total, iteration
    return self._costs[name, moves]

  def _instruction_cost(
    self, i: Instruction, scope: dict[str, Instruction], moves: bool
  ) -> tuple[Cost, Cost]:
    if i.op == "while":
      return self._loop_cost(i, scope, moves)
    target = i.attribute("custom_call_target").strip('"')
    kernel = kernel_cost(f"{i.scope}/{target}") if target.startswith(KERNEL_TARGETS) else None
    flops, rereads = kernel or (instruction_flops(i, scope), 0.0)
    total = Cost(flops=flops, bytes=rereads + self._traffic(i, scope) if moves else 0.0)
    if (kind := i.op.removesuffix("-start")) in COLLECTIVES and not _continues(i, scope):
      n = group_size(i, self.module.partitions)
      sent = COLLECTIVES[kind](n) * sum(scope[o].size for o in i.operands if o in scope)
      total += Cost(collectives={kind: (1.0, sent)} if n > 1 else {})
    if i.op == "send" and BETWEEN_SLICES in i.attributes:
      total += Cost(between_slices=sum(scope[o].size for o in i.operands if o in scope))
    names = ("calls", "branch_computations", "true_computation", "false_computation")
    called = [
      self._computation_cost(name, moves and i.op in ("call", "conditional", "async-start"))
      for name in i.called(*names, *(("to_apply",) if i.op == "call" else ()))
    ]
    costs = [once for once, _ in called]
    if i.op == "conditional":  # one branch runs: count the costliest
      costs = [max(costs, key=_weight)]
    return sum(costs, total), max([Cost(), *(inner for _, inner in called)], key=_weight)

  def _loop_cost(
    self, loop: Instruction, scope: dict[str, Instruction], moves: bool
  ) -> tuple[Cost, Cost]:
    (body,), (condition,) = loop.called("body"), loop.called("condition")
    once, inner = self._computation_cost(body, moves)
    count = self._trip_count(loop, scope)
    if count is None:
      return Cost(), once + inner + self._computation_cost(condition, moves)[0]
    return once * count, inner * count

  def _trip_count(self, loop: Instruction, scope: dict[str, Instruction]) -> int | None:
    """Returns the trip count of a loop; None if it depends on more than the loop's counter."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(match.group(1))
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    instructions = self.module.computations[condition]
    test = self.module.root(condition)
    operands = [instructions[o] for o in test.operands]
    if test.op == "fusion":  # around the comparison alone
      test = self.module.root(test.called("calls")[0])
    limits = [int(i.arguments) for i in operands if i.op == "constant"]
    counters = [int(i.attribute("index")) for i in operands if i.op == "get-tuple-element"]
    if test.op != "compare" or test.attribute("direction") != "LT" or not (limits and counters):
      return None
    inside = self.module.computations[body]
    steps = _constants(inside, _element(inside, self.module.root(body), counters[0]))
    start = _element(scope, scope.get(loop.operands[0]), counters[0])
    first = int(start.arguments) if start and start.op == "constant" else 0
    # An unrolled loop increments its counter by more than one.
    return math.ceil((limits[0] - first) / (steps[0] if steps else 1))

  # --- bytes --------------------------------------------------------------------------------------

  def _traffic(self, i: Instruction, scope: dict[str, Instruction]) -> float:
    """Returns the bytes that one instruction reads from and writes to main memory."""
    if i.op in FREE or i.op.endswith("-done") or i.op in ("async-start", "async-update"):
      return 0.0
    if i.op in ("send", "recv"):  # (data, number, token): one read, one write
      return i.leaves[0].main and i.leaves[0].bytes
    operands = [scope[o] for o in i.operands if o in scope]
    if i.op in SLICES:
      return operands[0].main and i.size + i.main
    if i.op in ("dynamic-update-slice", "scatter"):
      update = operands[-1] if i.op == "scatter" else operands[1]
      return update.main + (update.size if i.main else 0.0)
    if i.op.endswith("-start"):  # (operand, result, ...): the operand is not written
      return sum(o.main for o in operands) + sum(leaf.bytes for leaf in i.leaves[:1] if leaf.main)
    if i.op != "fusion":
      return sum(o.main for o in operands) + i.main
    (called,) = i.called("calls")
    parameters = self.module.parameters(called)
    read = sum(
      self._bytes_read(called, parameters[n]) if n in parameters else o.main
      for n, o in enumerate(operands)
      if o.main
    )
    return read + sum(self._bytes_written(called, i))

  def _bytes_read(self, computation: str, name: str) -> float:
    """Returns how much of the value `name` a fused computation reads: slices of it, or all."""
    scope = self.module.computations[computation]
    whole, read = scope[name].size, 0.0
    for user in (i for i in scope.values() if name in i.operands):
      first = user.operands[0] == name
      if user.op in SLICES and first:
        read += user.size
      elif user.op == "dynamic-update-slice" and first and user.operands.count(name) == 1:
        continue  # written in place
      elif user.op in VIEWS:
        read += self._bytes_read(computation, user.name)
      elif user.op == "fusion":
        (called,) = user.called("calls")
        inside = self.module.parameters(called)
        indices = [n for n, o in enumerate(user.operands) if o == name]
        read += sum(self._bytes_read(called, inside[n]) for n in indices)
      elif user.op != "tuple":
        return whole
    return min(read, whole)

  def _bytes_written(self, computation: str, fusion: Instruction) -> Iterator[float]:
    """Yields the bytes that a fusion writes for each result in main memory.

    A dynamic-update-slice works in place, so only its update is written.
    """
    scope = self.module.computations[computation]
    (root,) = (i for i in scope.values() if i.root)
    roots = [scope[o] for o in root.operands] if root.op == "tuple" else [root]
    for leaf, source in zip(fusion.leaves, roots):
      while source.op in VIEWS and source.operands and source.operands[0] in scope:
        source = scope[source.operands[0]]
      in_place = source.op == "dynamic-update-slice"
      size = scope[source.operands[1]].size if in_place else leaf.bytes
      yield size if leaf.main else 0.0


def _weight(cost: Cost) -> tuple[float, float]:
  return cost.bytes, cost.flops


def _element(
  scope: dict[str, Instruction], tuple_: Instruction | None, index: int
) -> Instruction | None:
  """Returns the source of a tuple's element, looking through copies; None without a tuple."""
  if tuple_ is None or tuple_.op != "tuple":
    return None
  source = scope.get(tuple_.operands[index])
  while source is not None and source.op == "copy":
    source = scope.get(source.operands[0])
  return source


def _constants(scope: dict[str, Instruction], user: Instruction | None) -> list[int]:
  """Returns the integer constants among an instruction's operands."""
  operands = [scope[o] for o in user.operands if o in scope] if user else []
  return [int(i.arguments) for i in operands if i.op == "constant"]


def _continues(i: Instruction, scope: dict[str, Instruction]) -> bool:
  """Returns whether a collective is a later step of an asynchronous one started elsewhere.

  The TPU compiler overlaps a collective with other work by fusing its steps into that work, up to
  dozens of fusions, in loops too, and repeats the collective in each of them. All of these fusions
  are one chain, which sends its data once.
  """
  starts = any('"AsyncCollectiveStart"' in other.attributes for other in scope.values())
  return "chain_id=" in i.attributes and not starts


def group_size(i: Instruction, partitions: int) -> int:
  """Returns the number of devices per group of a collective.

  A permutation pairs devices, so it counts as 2.

  Args:
    i: a collective.
    partitions: number of devices of the program, the size of an unnamed group.
  """
  if i.op.startswith("collective-permute"):
    return 2
  match = re.search(
    r"replica_groups=(mesh\[[^\]]*\] *\{[^}]*\}|\{\{[^}]*\}|\{\}|\[[\d,]+\])", i.attributes
  )
  text = match.group(1) if match else "{}"
  if text.startswith("mesh"):  # mesh['a'=2,'b'=4] {'a'}: the product of the axes at the end
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", text))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", text.split("{")[1]))
  if text.startswith("["):  # [groups,size]<=[...]
    return math.prod(int(n) for n in text.strip("[]").split(",")[1:])
  return len(text.strip("{}").split(",")) if text != "{}" else partitions
