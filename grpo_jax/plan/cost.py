"""What a compiled program does: operations, bytes, and traffic between devices.

XLA's own cost analysis counts the body of a loop once, so a model whose layers are scanned comes
out too small by its number of layers. Here every loop counts as often as it runs. Programs are
per device: so are all the numbers.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from grpo_jax.plan.flops import kernel_work
from grpo_jax.plan.hlo import Instruction, Module

COLLECTIVES = {
  # What a device sends, as a multiple of its operand, among n devices in a ring.
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-broadcast": lambda n: 1,
  "collective-permute": lambda n: 1,
}
# Instructions that move no data by themselves.
# fmt: off
FREE = frozenset((
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional",
  "after-all", "iota", "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency",
))
# fmt: on
VIEWS = frozenset(("bitcast", "reshape", "convert", "copy", "transpose", "get-tuple-element"))
SLICES = frozenset(("dynamic-slice", "slice", "gather"))
KERNELS = ("tpu_custom_call", "__cudnn$")  # starts of what kernels are called by


@dataclasses.dataclass(frozen=True)
class Cost:
  """Work of one device.

  Attributes:
    ops: floating-point operations of matrix products, two per multiply-add.
    bytes: read from and written to main memory, an estimate from above: what is fused is not
      counted, a slice counts as its own size, and what the compiler keeps on the chip is left out.
    collectives: by kind, (how many run, bytes that a device sends for them in a ring).
  """

  ops: float = 0.0
  bytes: float = 0.0
  collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

  def __add__(self, other: "Cost") -> "Cost":
    both = dict(self.collectives)
    for kind, (count, sent) in other.collectives.items():
      old = both.get(kind, (0.0, 0.0))
      both[kind] = (old[0] + count, old[1] + sent)
    return Cost(self.ops + other.ops, self.bytes + other.bytes, both)

  def __mul__(self, times: float) -> "Cost":
    sent = {kind: (n * times, size * times) for kind, (n, size) in self.collectives.items()}
    return Cost(self.ops * times, self.bytes * times, sent)

  @property
  def sent(self) -> float:
    """Bytes that a device sends to others."""
    return sum(size for _, size in self.collectives.values())


class Counter:
  """Counts the work of an HLO module."""

  def __init__(self, text: str):
    self.module = Module(text)
    self._known: dict[tuple[str, bool], tuple[Cost, Cost]] = {}

  def cost(self) -> tuple[Cost, Cost]:
    """(all that runs once, one turn of a loop whose number of turns depends on the data).

    A loop that stops early (`index < n and ...`) is of the second kind; of several, the costliest
    counts: the sampler's first, as long as no completion has ended.
    """
    return self._cost(self.module.entry, True)

  def _cost(self, name: str, moves: bool) -> tuple[Cost, Cost]:
    """As `cost`, of one computation; without `moves` it is fused: its values stay on the chip."""
    if (name, moves) not in self._known:
      total, turn = Cost(), Cost()
      for instruction in self.module.computations[name].values():
        one, inner = self._of(instruction, self.module.computations[name], moves)
        total, turn = total + one, max(turn, inner, key=_weight)
      self._known[name, moves] = total, turn
    return self._known[name, moves]

  def _of(self, i: Instruction, scope: dict[str, Instruction], moves: bool) -> tuple[Cost, Cost]:
    if i.op == "while":
      (body,), (condition,) = i.called("body"), i.called("condition")
      inside, inner = self._cost(body, moves)
      turns = self._turns(i, scope)
      if turns is None:
        return Cost(), inside + inner + self._cost(condition, moves)[0]
      return inside * turns, inner * turns
    target = i.attribute("custom_call_target").strip('"')
    kernel = kernel_work(f"{i.scope}/{target}") if target.startswith(KERNELS) else None
    ops, rereads = kernel or (_product_ops(i, scope), 0.0)
    total = Cost(ops=ops, bytes=rereads + self._moved(i, scope) if moves else 0.0)
    turn = Cost()
    if (kind := i.op.removesuffix("-start")) in COLLECTIVES and not _goes_on(i, scope):
      n = _group_size(i, self.module.partitions)
      sent = COLLECTIVES[kind](n) * sum(scope[o].size for o in i.operands if o in scope)
      total += Cost(collectives={kind: (1.0, sent)} if n > 1 else {})
    names = ("calls", "branch_computations", "true_computation", "false_computation")
    found = [
      self._cost(called, moves and i.op in ("call", "conditional", "async-start"))
      for called in i.called(*names, *(("to_apply",) if i.op == "call" else ()))
    ]
    inside = [one for one, _ in found]
    if i.op == "conditional":  # one branch runs: no more than the costliest
      inside = [max(inside, key=_weight)]
    return sum(inside, total), max([turn, *(inner for _, inner in found)], key=_weight)

  def _turns(self, loop: Instruction, scope: dict[str, Instruction]) -> int | None:
    """How often a loop runs; None if that depends on more than its counter."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known.group(1))
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    tested = self.module.computations[condition]
    test = self.module.root(condition)
    operands = [tested[o] for o in test.operands]
    if test.op == "fusion":  # a comparison on its own, wrapped
      test = self.module.root(test.called("calls")[0])
    limits = [int(i.arguments) for i in operands if i.op == "constant"]
    counters = [int(i.attribute("index")) for i in operands if i.op == "get-tuple-element"]
    if test.op != "compare" or test.attribute("direction") != "LT" or not (limits and counters):
      return None
    steps = self._constants(body, self._element(body, self.module.root(body), counters[0]))
    start = self._element(None, scope.get(loop.operands[0]), counters[0], scope)
    first = int(start.arguments) if start and start.op == "constant" else 0
    # Compilers unroll: then the counter makes longer steps.
    return math.ceil((limits[0] - first) / (steps[0] if steps else 1))

  def _element(
    self, name: str | None, made: Instruction | None, index: int, scope: dict | None = None
  ) -> Instruction | None:
    """What is put into a tuple at `index`, copies looked through; None where it is no tuple."""
    scope = self.module.computations[name] if scope is None else scope
    if made is None or made.op != "tuple":
      return None
    one = scope.get(made.operands[index])
    while one is not None and one.op == "copy":
      one = scope.get(one.operands[0])
    return one

  def _constants(self, name: str, user: Instruction | None) -> list[int]:
    """The constants that an instruction adds."""
    scope = self.module.computations[name]
    operands = [scope[o] for o in user.operands if o in scope] if user else []
    return [int(i.arguments) for i in operands if i.op == "constant"]

  # --- bytes --------------------------------------------------------------------------------------

  def _moved(self, i: Instruction, scope: dict[str, Instruction]) -> float:
    """Bytes that one instruction reads from and writes to main memory."""
    if i.op in FREE or i.op.endswith("-done") or i.op in ("async-start", "async-update"):
      return 0.0
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
      self._read(called, parameters[n]) if n in parameters else o.main
      for n, o in enumerate(operands)
      if o.main
    )
    return read + sum(self._written(called, i))

  def _read(self, computation: str, name: str) -> float:
    """Bytes of the value `name` that a fused computation looks at: slices of it, or all."""
    scope = self.module.computations[computation]
    whole, seen = scope[name].size, 0.0
    for user in (i for i in scope.values() if name in i.operands):
      first = user.operands[0] == name
      if user.op in SLICES and first:
        seen += user.size
      elif user.op == "dynamic-update-slice" and first and user.operands.count(name) == 1:
        continue  # written in place
      elif user.op in VIEWS:
        seen += self._read(computation, user.name)
      elif user.op == "fusion":
        (called,) = user.called("calls")
        inside = self.module.parameters(called)
        seen += sum(self._read(called, inside[n]) for n, o in enumerate(user.operands) if o == name)
      elif user.op != "tuple":
        return whole
    return min(seen, whole)

  def _written(self, computation: str, fusion: Instruction) -> Iterator[float]:
    """Bytes of each result of a fusion in main memory; in place, only the update is written."""
    scope = self.module.computations[computation]
    (root,) = (i for i in scope.values() if i.root)
    roots = [scope[o] for o in root.operands] if root.op == "tuple" else [root]
    for leaf, one in zip(fusion.leaves, roots):
      while one.op in VIEWS and one.operands and one.operands[0] in scope:
        one = scope[one.operands[0]]
      in_place = one.op == "dynamic-update-slice"
      yield (scope[one.operands[1]].size if in_place else leaf.bytes) if leaf.main else 0.0


def _weight(cost: Cost) -> tuple[float, float]:
  return cost.bytes, cost.ops


def _goes_on(i: Instruction, scope: dict[str, Instruction]) -> bool:
  """Whether a collective is a later step of one that has started elsewhere.

  The TPU compiler fuses a collective into the work beside which it runs, up to dozens of fusions,
  also in loops, and writes it in each of them. They are one chain, and so is what is sent.
  """
  starts = any('"AsyncCollectiveStart"' in other.attributes for other in scope.values())
  return "chain_id=" in i.attributes and not starts


def _group_size(i: Instruction, partitions: int) -> int:
  """Devices that take part in a collective together; 2 stands for the pairs of a permutation."""
  if i.op.startswith("collective-permute"):
    return 2
  groups = re.search(
    r"replica_groups=(mesh\[[^\]]*\] *\{[^}]*\}|\{\{[^}]*\}|\{\}|\[[\d,]+\])", i.attributes
  )
  text = groups.group(1) if groups else "{}"
  if text.startswith("mesh"):  # mesh['a'=2,'b'=4] {'a'}: the sizes of the axes named at the end
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", text))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", text.split("{")[1]))
  if text.startswith("["):  # [groups,size]<=[...]
    return math.prod(int(n) for n in text.strip("[]").split(",")[1:])
  return len(text.strip("{}").split(",")) if text != "{}" else partitions


# --- operations -----------------------------------------------------------------------------------


def _product_ops(i: Instruction, scope: dict[str, Instruction]) -> float:
  """Operations of a matrix product, which some compilers write as a convolution; else 0."""
  if i.op not in ("dot", "convolution"):
    return 0.0
  left, right = (scope[o].leaves[0].dims for o in i.operands[:2])
  out = i.leaves[0].dims
  if i.op == "dot":
    summed = [int(d) for d in i.attribute("lhs_contracting_dims").strip("{}").split(",") if d]
    return 2.0 * math.prod(out) * math.prod(left[d] for d in summed)
  lhs, rhs, result = re.split("_|->", i.attribute("dim_labels"))
  window = dict(item.split("=") for item in i.attribute("window").strip("{}").split())
  spatial = [label for label in result if label.isdigit()]

  def field(name: str, default: str) -> list[str]:
    return window[name].split("x") if name in window else [default] * len(spatial)

  sums = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
  for n, label in enumerate(spatial):
    sums *= _meetings(
      inputs=left[lhs.index(label)],
      outputs=out[result.index(label)],
      window=right[rhs.index(label)],
      stride=int(field("stride", "1")[n]),
      pad=int(field("pad", "0_0")[n].split("_")[0]),
      spread=int(field("lhs_dilate", "1")[n]),
      dilation=int(field("rhs_dilate", "1")[n]),
    )
  return sums


def _meetings(
  *, inputs: int, outputs: int, window: int, stride: int, pad: int, spread: int, dilation: int
) -> int:
  """Pairs of an output and a window position that fall on an input, not on padding or a gap."""
  at = np.arange(outputs)[:, None] * stride + np.arange(window) * dilation - pad
  return int(((at >= 0) & (at <= (inputs - 1) * spread) & (at % spread == 0)).sum())
