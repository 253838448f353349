"""Finds the tool calls in the text of a turn. Every format is a row of `FORMATS`.

A parser never raises: what it cannot read becomes a `Call` that says what is wrong, which the model
is told. Text inside `<think>` tags is never a call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
  """Holds a call that a model wrote.

  Attributes:
    name: of the tool; "" if it is not readable.
    arguments: by name.
    raw: the text between the parentheses, for formats that are not JSON.
    error: what is wrong with the writing of the call; None if nothing is.
  """

  name: str
  arguments: Mapping[str, Any] = field(default_factory=dict)
  raw: str | None = None
  error: str | None = None


@dataclass(frozen=True)
class Format:
  """Describes how a model writes calls, and how it reads results.

  Attributes:
    parse: text of a turn -> its calls, in order; none if the turn has no call.
    stop: strings that end a turn of this format. They are cut off the text that `parse` gets.
    result: None for results as messages of the role "tool", which the chat template writes, or
      what is put around the results as text: "{result}" stands for them, one a line.
  """

  parse: Callable[[str], list[Call]]
  stop: tuple[str, ...] = ()
  result: str | None = None


def without_thoughts(text: str) -> str:
  """Returns the text after the last thought, and before one that goes on.

  Example:
    >>> without_thoughts("<think>I could call it.</think>So"), without_thoughts("a <think> b")
    ('So', 'a ')
  """
  text = text.rpartition("</think>")[2]
  return text.partition("<think>")[0]


# --- JSON -----------------------------------------------------------------------------------------

_SPACE, _SEPARATORS = re.compile(r"\s*"), re.compile(r"[\s;,]*")
_DECODER = json.JSONDecoder()


def hermes_calls(text: str) -> list[Call]:
  """Returns the calls in `<tool_call>` tags: JSON objects with `name` and `arguments`.

  Example:
    >>> hermes_calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments={'a': 1}, raw=None, error=None)]
  """
  text, calls, end = without_thoughts(text), [], 0
  while (start := text.find("<tool_call>", end)) >= 0:
    start += len("<tool_call>")
    found, end, error = _decoded(text, start)
    if error is None:
      calls += _calls_of(found)
    else:
      calls.append(Call("", error=error))
      closing = text.find("</tool_call>", start)
      end = len(text) if closing < 0 else closing
  return calls


def llama3_calls(text: str) -> list[Call]:
  """Returns the calls of a turn that is JSON with `name` and `parameters`, and nothing else.

  Several are separated by ";", "," or white space. `<|python_tag|>` may stand before them, also
  before `name.call(key="value")`. A turn that is other JSON is an answer, not a call.

  Example:
    >>> llama3_calls('{"name": "add", "parameters": {"a": 1}}')[0].arguments
    {'a': 1}
    >>> llama3_calls("The answer is {1, 2}.")
    []
  """
  text = without_thoughts(text).strip()
  tagged = text.startswith("<|python_tag|>")
  text = text.removeprefix("<|python_tag|>").strip()
  if tagged and (match := re.fullmatch(r"(\w+)\.call\((.*)\)", text, re.DOTALL)):
    return [Call(match[1], raw=match[2])]
  if not text.startswith(("{", "[{")):
    return [Call("", error="it is not a JSON object with name and parameters")] if tagged else []
  if not tagged and '"name"' not in text:
    return []
  calls, end = [], 0
  while end < len(text):
    found, end, error = _decoded(text, end)
    if error is not None:
      return [*calls, Call("", error=error)]
    calls += _calls_of(found)
    end = _SEPARATORS.match(text, end).end()
  return calls


def _decoded(text: str, start: int) -> tuple[Any, int, str | None]:
  """Returns the JSON value that begins at `start`, its end, and what is wrong with it."""
  start = _SPACE.match(text, start).end()
  try:
    return *_DECODER.raw_decode(text, start), None
  except json.JSONDecodeError as error:
    return (
      None,
      start,
      (
        f"not JSON: {error.msg.removesuffix(' starting at')} at character "
        f"{max(error.pos - start, 0) + 1}"
      ),
    )
  except (ValueError, RecursionError):  # a number of too many digits; brackets nested too deeply
    return None, start, "not JSON that can be read: nested too deeply, or a number is too long"


def _calls_of(value: Any) -> list[Call]:
  """Returns the calls that a JSON value stands for: one, or a list of them."""
  return [_call_of(item) for item in value] if isinstance(value, list) else [_call_of(value)]


def _call_of(value: Any) -> Call:
  if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
    return Call("", error="a call must be a JSON object with name and arguments")
  name, arguments = value["name"], value.get("arguments", value.get("parameters"))
  if isinstance(arguments, str):  # JSON in a string, as an API returns it
    arguments, _, error = _decoded(arguments, 0)
    if error is not None:
      return Call(name, error=f"its arguments are {error}")
  if arguments is None:
    arguments = {}
  if not isinstance(arguments, dict):
    return Call(name, error="its arguments must be a JSON object")
  return Call(name, arguments)


# --- plain text -----------------------------------------------------------------------------------

_CALL = re.compile(r"([A-Za-z_]\w*)\(([^\n]*)")
NAME_LENGTH = 100  # characters before a parenthesis that a name is looked for in
_BRACKET = re.compile(r"\[([A-Za-z_]\w*): ?([^\n\[\]]*)")


def inline_calls(text: str) -> list[Call]:
  """Returns the call that a turn ends with: `calc(12*7)=`, where ")=" ends the turn.

  Example:
    >>> inline_calls("So it is calc(12*(7+1)")
    [Call(name='calc', arguments={}, raw='12*(7+1)', error=None)]
    >>> inline_calls("f(2) is 4.")
    []
  """
  last = without_thoughts(text).removesuffix(")=").rpartition("\n")[2]
  closed = 0
  for i in range(len(last) - 1, -1, -1):
    closed += (last[i] == ")") - (last[i] == "(")
    if closed < 0:  # a parenthesis that is still open: that of the call, if a name is before it
      closed = 0
      if match := re.search(r"(?<!\w)[A-Za-z_]\w*$", last[max(i - NAME_LENGTH, 0) : i]):
        return [Call(match[0], raw=last[i + 1 :].strip())]
  return []


def bracket_calls(text: str) -> list[Call]:
  """Returns the call that a turn ends with: `[calculator: 12*7]`, where "]" ends the turn.

  Example:
    >>> bracket_calls("So it is [calculator: 12*7")
    [Call(name='calculator', arguments={}, raw='12*7', error=None)]
  """
  last = without_thoughts(text).removesuffix("]").rpartition("\n")[2]
  match = _BRACKET.search(last, max(last.rfind("["), 0))
  return [Call(match[1], raw=match[2].strip())] if match and match.end() == len(last) else []


def line_calls(text: str) -> list[Call]:
  """Returns the call that is the whole turn, one line: `calc(12 * 7)`.

  Example:
    >>> line_calls(" calc(12 * 7)"), line_calls(" 84")
    ([Call(name='calc', arguments={}, raw='12 * 7', error=None)], [])
  """
  match = _CALL.fullmatch(without_thoughts(text).strip())
  if not match or not match[2].endswith(")") or not _is_balanced(match[2][:-1]):
    return []
  return [Call(match[1], raw=match[2][:-1].strip())]


def _is_balanced(text: str) -> bool:
  """Returns whether every parenthesis is closed, and none that was not opened."""
  depth = 0
  for character in text:
    depth += (character == "(") - (character == ")")
    if depth < 0:
      return False
  return depth == 0


def literal_arguments(raw: str) -> tuple[list[Any], dict[str, Any]]:
  """Returns the arguments `1, "a", key=2` of a plain-text call; each is a Python literal.

  Raises:
    ValueError: they are something else.

  Example:
    >>> literal_arguments('1, "a", key=[2]')
    ([1, 'a'], {'key': [2]})
  """
  try:
    call = ast.parse(f"f({raw})", mode="eval").body
    if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
      raise ValueError
    positional = [ast.literal_eval(argument) for argument in call.args]
    return positional, {item.arg: ast.literal_eval(item.value) for item in call.keywords}
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    raise ValueError(f"{raw[:80]!r} is not a list of arguments, such as 1, key='a'") from None


FORMATS: dict[str, Format] = {
  "hermes": Format(hermes_calls),
  "llama3": Format(llama3_calls),
  "inline": Format(inline_calls, stop=(")=",), result=" {result}\n"),
  "bracket": Format(bracket_calls, stop=("]",), result=" = {result}\n"),
  "line": Format(line_calls, stop=("\n",), result="Result: {result}\nAnswer:"),
}
