"""Splits the tests of a code problem into units, each of which passes or fails by itself.

A unit is a statement with an assertion: in the body of the function `check`, as HumanEval has it,
or of the tests themselves, as MBPP has them. It imports the standard library only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

RECORD = "__record__"  # the function that units call with True or False
CHECK = "check"  # the function that gets the candidate


def split(source: str) -> tuple[ast.Module, int]:
  """Returns the tests, where each unit reports to `RECORD` instead of raising, and their number.

  Raises:
    ValueError: it is not Python, or asserts nothing.

  Example:
    >>> split("def check(candidate):\\n  assert candidate(1) == 2\\n  assert candidate(2) == 3")[1]
    2
  """
  try:
    tree = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ValueError(f"not Python: {error}") from error
  owner = check_function(tree) or tree
  if owner is not tree:  # whoever runs the tests calls it, with the candidate
    tree.body = [node for node in tree.body if not _calls_check(node)]
  body = [_wrap([node]) if _asserts(node) else node for node in owner.body]
  count = sum(_asserts(node) for node in owner.body)
  if not count:  # the assertions stand in functions that the body calls
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
      raise ValueError("nothing is asserted")
    body, count = [_wrap(owner.body)], 1
  owner.body = body
  return ast.fix_missing_locations(tree), count


def check_function(tree: ast.Module) -> ast.FunctionDef | None:
  """Returns the function `check` of the tests, if they have one."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == CHECK:
      return node
  return None


def names(tree: ast.Module) -> set[str]:
  """Returns the names that the tests read."""
  return {
    node.id
    for node in ast.walk(tree)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
  }


def _calls_check(node: ast.stmt) -> bool:
  call = node.value if isinstance(node, ast.Expr) else None
  return isinstance(call, ast.Call) and getattr(call.func, "id", "") == CHECK


def _asserts(node: ast.stmt) -> bool:
  """Returns whether running a statement asserts something, other than a constant."""
  return any(
    isinstance(part, ast.Assert) and not isinstance(part.test, ast.Constant) for part in _run(node)
  )


def _run(node: ast.AST) -> Iterator[ast.AST]:
  """Yields the nodes that run with a statement, without the bodies of what it defines."""
  yield node
  if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
    for child in ast.iter_child_nodes(node):
      yield from _run(child)


def _wrap(body: list[ast.stmt]) -> ast.stmt:
  report = f"try:\n  pass\nexcept Exception:\n  {RECORD}(False)\nelse:\n  {RECORD}(True)"
  unit = ast.parse(report).body[0]
  unit.body = body
  return unit
