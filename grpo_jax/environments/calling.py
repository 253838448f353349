"""Runs the calls that a model wrote, and says what the model reads about each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.environments.calls import Call, literal_arguments
from grpo_jax.environments.isolation import IsolationError

RESULT_LENGTH = 4000  # characters of a result that a model reads; more is cut


@dataclass(frozen=True)
class Tool:
  """Describes a function that a model can call.

  Attributes:
    name: what the model calls it.
    function: plain or `async`.
    schema: its JSON schema, as chat templates take it.
  """

  name: str
  function: Callable[..., Any]
  schema: dict[str, Any]

  @property
  def parameters(self) -> dict[str, Any]:
    """Returns the schema of each parameter by name."""
    return self.schema["function"]["parameters"]["properties"]

  @property
  def required(self) -> list[str]:
    """Returns the names of the parameters without a default."""
    return self.schema["function"]["parameters"].get("required", [])


@dataclass(frozen=True)
class Result:
  """Holds the text that the model reads about one call.

  Attributes:
    name: of the tool.
    text: the result, or what is wrong.
    failure: None, or a kind: "malformed", "unknown", "arguments", "raised".
    cut: whether the text was longer.
  """

  name: str
  text: str
  failure: str | None = None
  cut: bool = False


class _Failure(Exception):
  def __init__(self, kind: str, message: str) -> None:
    super().__init__(message)
    self.kind = kind


def run_calls(calls: Sequence[Call], tools: Mapping[str, Tool]) -> list[Result]:
  """Runs calls in their order, `async` tools together, and returns their results in that order.

  Example:
    >>> from grpo_jax.environments.tools import load_tool
    >>> tools = {"calc": load_tool("calc")}
    >>> [r.text for r in run_calls([Call("calc", raw="12*7"), Call("clac", raw="1")], tools)]
    ['84', "error: there is no tool 'clac'; the tools are: calc"]
  """
  values: list[Any] = []
  for call in calls:
    try:
      values.append(_started(call, tools))
    except _Failure as failure:
      values.append(failure)
    except IsolationError:  # says nothing about the call: the episode fails, not the model
      raise
    except (Exception, SystemExit) as error:
      values.append(_raised(error))
  pending = [i for i, value in enumerate(values) if inspect.isawaitable(value)]
  for i, value in zip(pending, _awaited([values[i] for i in pending])):
    values[i] = _raised(value) if isinstance(value, BaseException) else value
  return [_result(call.name or "tool", value) for call, value in zip(calls, values)]


def _started(call: Call, tools: Mapping[str, Tool]) -> Any:
  """Calls a tool; returns its result, or what has to be awaited for it."""
  if call.error is not None:
    raise _Failure("malformed", f"the call cannot be read: {call.error}")
  if call.name not in tools:
    raise _Failure(
      "unknown", f"there is no tool {call.name[:80]!r}; the tools are: {', '.join(tools)}"
    )
  tool = tools[call.name]
  arguments = call.arguments if call.raw is None else _named(tool, call.raw)
  _check_arguments(tool, arguments)
  return tool.function(**arguments)


def _raised(error: BaseException) -> _Failure:
  return _Failure("raised", f"{type(error).__name__}: {error}".removesuffix(": "))


def _awaited(awaitables: Sequence[Any]) -> list[Any]:
  """Returns the results of awaitables that run together, or what they raised."""
  if not awaitables:
    return []
  from grpo_jax.tasks.rewards.scoring import await_together  # lazy: tasks import this module

  return await_together([*awaitables])


def _result(name: str, value: Any) -> Result:
  if isinstance(value, _Failure):
    text, kind = f"error: {value}", value.kind
  else:
    text, kind = _written(value), None
  cut = len(text) > RESULT_LENGTH
  if cut:
    text = f"{text[:RESULT_LENGTH]} ... (cut: {len(text):,} characters)"
  return Result(name, text, kind, cut)


def _written(value: Any) -> str:
  """Returns a result as text: text as it is, other plain data as JSON."""
  if isinstance(value, str):
    return value
  try:
    return json.dumps(value, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError):
    pass
  try:
    return str(value)
  except Exception as error:
    return f"a result of type {type(value).__name__} that cannot be shown: {error}"


def _named(tool: Tool, raw: str) -> dict[str, Any]:
  """Returns the arguments of a plain-text call by name.

  The only text that a tool needs may stand without quotes, as in `calc(12 * 7)`.
  """
  names = [*tool.parameters]
  single = names[0] if len(tool.required or names) == 1 else None
  is_text = single is not None and tool.parameters[single].get("type") == "string"
  try:
    positional, named = literal_arguments(raw)
  except ValueError as error:
    if is_text:
      return {single: raw}
    raise _Failure("arguments", f"{tool.name}: {error}") from None
  if is_text and not named and not (positional and isinstance(positional[0], str)):
    return {single: raw}
  if len(positional) > len(names) or set(names[: len(positional)]) & set(named):
    raise _Failure("arguments", f"{tool.name} takes {_signature(tool)}")
  return dict(zip(names, positional)) | named


def _check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> None:
  """Raises unless the arguments are those of the tool's schema."""
  for name in arguments:
    if name not in tool.parameters:
      raise _Failure("arguments", f"{tool.name} has no {name[:80]!r}; it takes {_signature(tool)}")
  for name in tool.required:
    if name not in arguments:
      raise _Failure("arguments", f"{tool.name} needs {name!r}; it takes {_signature(tool)}")
  for name, value in arguments.items():
    if not matches(value, tool.parameters[name]):
      raise _Failure(
        "arguments", f"{tool.name}: {name} is {str(value)[:80]!r}; it takes {_signature(tool)}"
      )


def _signature(tool: Tool) -> str:
  kinds = {name: schema.get("type", "any") for name, schema in tool.parameters.items()}
  return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "no arguments"


_TYPES = {
  "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
  "object": dict, "null": type(None),
}  # fmt: skip


def matches(value: Any, schema: Mapping[str, Any]) -> bool:
  """Returns whether a JSON value fits a schema of `get_json_schema`. What it cannot say, fits.

  Example:
    >>> matches(2, {"type": "number"}), matches(True, {"type": "integer"})
    (True, False)
  """
  if value is None and schema.get("nullable"):
    return True
  if "anyOf" in schema:
    return any(matches(value, option) for option in schema["anyOf"])
  if "enum" in schema:
    return value in schema["enum"]
  kinds = schema.get("type", [])
  kinds = [kinds] if isinstance(kinds, str) else kinds
  known = [kind for kind in kinds if kind in _TYPES]
  if known and not any(
    isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    for kind in known
  ):
    return False
  if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
    return all(matches(item, schema["items"]) for item in value)
  return True
