"""Makes small wrong changes to source code, for `mutants.py`."""

import ast
import collections
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
  """Describes one change of one node of the syntax tree of a file."""

  file: str
  line: int
  function: str  # empty if it runs at import
  statement: int  # first line of the innermost statement
  index: int  # index of the node in preorder
  choice: int  # index among the changes of the node
  before: str
  after: str
  text: str  # the line, with "#2" for its second mutant with this change

  @property
  def key(self) -> tuple[str, str]:
    """Returns the place and the change without line numbers; valid while the line is unchanged."""
    return f"{self.file}: {self.text}", f"{self.before} -> {self.after}"


_OPERATORS: dict[type, list[type]] = {
  ast.Add: [ast.Sub],
  ast.Sub: [ast.Add],
  ast.Mult: [ast.Div],
  ast.Div: [ast.Mult],
  ast.FloorDiv: [ast.Mult],
  ast.Pow: [ast.Mult],
  ast.BitAnd: [ast.BitOr],
  ast.BitOr: [ast.BitAnd],
  ast.Lt: [ast.GtE, ast.LtE],
  ast.Gt: [ast.LtE, ast.GtE],
  ast.LtE: [ast.Gt, ast.Lt],
  ast.GtE: [ast.Lt, ast.Gt],
  ast.Eq: [ast.NotEq],
  ast.NotEq: [ast.Eq],
  ast.Is: [ast.IsNot],
  ast.IsNot: [ast.Is],
  ast.In: [ast.NotIn],
  ast.NotIn: [ast.In],
  ast.And: [ast.Or],
  ast.Or: [ast.And],
}
_NAMES = {
  "minimum": "maximum",
  "maximum": "minimum",
  "min": "max",
  "max": "min",
  "any": "all",
  "all": "any",
  "sum": "mean",
  "exp": "expm1",
  "expm1": "exp",
  "zeros_like": "ones_like",
  "ones_like": "zeros_like",
  "zeros": "ones",
  "ones": "zeros",
  "isfinite": "isnan",
  "isneginf": "isfinite",
}
_SIBLINGS = {  # other valid choices
  "group_normalized": "group_centered",
  "group_centered": "group_normalized",
  "leave_one_out": "group_centered",
  "batch_normalized": "batch_whitened",
  "batch_whitened": "batch_normalized",
  "max_rl": "group_centered",
  "sequence": "token",
  "token": "sequence",
  "constant": "token",
  "sequence_token": "sequence",
  "k2": "k3",
  "k3": "k2",
}
# Positions of the arguments to swap.
_SWAPPED = {"where": (1, 2), "clip": (1, 2), "fori_loop": (0, 1)}


def _set(field: str, value) -> Callable[[ast.AST], ast.AST]:
  """Returns a change that sets a field of the node."""

  def change(node):
    setattr(node, field, value)
    return node

  return change


def _swap(i: int, j: int):
  """Returns a change that swaps two arguments of a call."""

  def change(node):
    node.args[i], node.args[j] = node.args[j], node.args[i]
    return node

  return change


def _negate(node: ast.If) -> ast.If:
  """Returns the statement with its condition negated."""
  return ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _call_changes(node: ast.Call) -> Iterator[Callable]:
  """Yields the changes of a call: another function, swapped arguments, a missing keyword."""
  name = getattr(node.func, "attr", getattr(node.func, "id", ""))
  if name == "stop_gradient":
    yield lambda node: node.args[0]
  if name in _NAMES:
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"

    def rename(node):
      setattr(node.func, field, _NAMES[name])
      return node

    yield rename
  if name in _SWAPPED and len(node.args) > _SWAPPED[name][1]:
    yield _swap(*_SWAPPED[name])
  if name != "Algorithm":  # the values of a row are changed one at a time
    for i in range(len(node.keywords)):

      def without(node, i=i):
        del node.keywords[i]
        return node

      yield without


def _constant_changes(value) -> list:
  """Returns the replacements of a constant."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int | float):
    return {0: [1], 1: [2, 0]}.get(value, [value + 1, -value])
  return [_SIBLINGS.get(value, value + "_")] if isinstance(value, str) else []


def changes(node: ast.AST) -> Iterator[Callable[[ast.AST], ast.AST]]:
  """Yields the changes of a node: functions from (a copy of) the node to its replacement."""
  if isinstance(node, ast.BinOp | ast.BoolOp):
    yield from (_set("op", new()) for new in _OPERATORS.get(type(node.op), []))
  elif isinstance(node, ast.AugAssign):
    yield from (_set("op", new()) for new in _OPERATORS.get(type(node.op), []))
    yield lambda node: ast.Pass()
  elif isinstance(node, ast.Compare):
    for new in _OPERATORS[type(node.ops[0])]:
      yield _set("ops", [new(), *node.ops[1:]])
  elif isinstance(node, ast.UnaryOp):
    # Changes of the constant turn an axis of -1 into -2 and 0; 1 is often the same axis.
    if not (isinstance(node.operand, ast.Constant) and node.operand.value == 1):
      yield lambda node: node.operand
  elif isinstance(node, ast.IfExp):
    yield lambda node: ast.IfExp(node.test, node.orelse, node.body)
  elif isinstance(node, ast.If):
    yield _negate
  elif isinstance(node, ast.comprehension) and node.ifs:
    yield _set("ifs", [])
  elif isinstance(node, ast.Constant):
    yield from (_set("value", new) for new in _constant_changes(node.value))
  elif isinstance(node, ast.Call):
    yield from _call_changes(node)
  elif isinstance(node, ast.Raise | ast.Expr):
    yield lambda node: ast.Pass()


_NAMING = ("as_", "check_", "lookup")  # functions whose string arguments appear only in errors


def _is_text(node: ast.AST) -> bool:
  """Returns true for a string literal."""
  return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _excluded(tree: ast.Module) -> set[int]:
  """Returns the ids of nodes without effect: annotations, docstrings, error texts, sources."""
  skipped: set[int] = set()

  def skip(node):
    skipped.update(id(child) for child in ast.walk(node))

  for node in ast.walk(tree):
    for field in ("annotation", "returns"):
      if isinstance(getattr(node, field, None), ast.AST):
        skip(getattr(node, field))
    if isinstance(node, ast.Expr) and _is_text(node.value):
      skip(node)
    if isinstance(node, ast.Raise):
      skipped.update(id(child) for child in ast.walk(node) if child is not node)
    if isinstance(node, ast.keyword) and node.arg == "source":
      skip(node)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith(_NAMING):
      skipped.update(id(arg) for arg in node.args if _is_text(arg))
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "Array":
      skip(node)
  return skipped


def find_mutants(file: Path) -> list[Mutant]:
  """Returns the mutants of a source file in the order of its syntax tree."""
  source = file.read_text()
  tree, lines = ast.parse(source), source.splitlines()
  skipped, mutants, index, counts = _excluded(tree), [], -1, collections.Counter()

  def walk(node, statement, function):
    nonlocal index
    index += 1
    at = index
    statement = node if isinstance(node, ast.stmt) else statement
    if isinstance(node, ast.FunctionDef):
      function = f"{function}.{node.name}".lstrip(".")
    if id(node) not in skipped:
      before = _short(ast.unparse(node))
      for choice, change in enumerate(changes(node)):
        after = _short(ast.unparse(ast.fix_missing_locations(change(copy.deepcopy(node)))))
        line = getattr(node, "lineno", statement.lineno)
        text = lines[line - 1].strip()
        counts[line, before, after] += 1
        text += f" #{counts[line, before, after]}" * (counts[line, before, after] > 1)
        place = (file.name, line, function, statement.lineno)
        mutants.append(Mutant(*place, at, choice, before, after, text))
    for child in ast.iter_child_nodes(node):
      walk(child, statement, function)

  for child in tree.body:
    walk(child, child, "")
  return [m for m in mutants if m.before != m.after]


def _short(text: str) -> str:
  """Returns the text on one line, with the middle cut out beyond 100 characters."""
  line = " ".join(text.split())
  return line if len(line) <= 100 else line[:48] + " ... " + line[-47:]


class Apply(ast.NodeTransformer):
  """Applies a mutant to a syntax tree."""

  def __init__(self, mutant: Mutant):
    self.mutant, self.index = mutant, -1

  def visit(self, node):
    if isinstance(node, ast.Module):
      return self.generic_visit(node)
    self.index += 1
    if self.index == self.mutant.index:
      new = list(changes(node))[self.mutant.choice](node)
      self.index += 10**9  # skip the nodes below
      return ast.copy_location(new, node)
    return self.generic_visit(node)
