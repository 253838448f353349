"""Lets a model call Python functions: the environment of an episode with tools.

A tool is a function with type hints and a docstring that has a line for each parameter::

    def area(width: float, height: float) -> float:
      '''Computes the area of a rectangle.

      Args:
        width: Width in metres.
        height: Height in metres.
      '''
      return width * height

Whatever goes wrong with a call is told to the model and counted; only a tool that exceeds the time
limit of a step costs its episode.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from grpo_jax.environments.base import Environment, Observation, Step
from grpo_jax.environments.calculator import calculator
from grpo_jax.environments.calling import Result, Tool, run_calls
from grpo_jax.environments.calls import FORMATS, Format
from grpo_jax.environments.python_tool import python

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Task

# A name in `TOOLS`, 'path/to/file.py:function', 'module:function', or the function itself.
ToolName: TypeAlias = str | Callable[..., Any]
TOOLS: dict[str, Callable[..., Any]] = {
  "calculator": calculator,
  "calc": calculator,  # shorter, for formats of plain text
  "python": python,
}
MAX_CALLS = 16


def load_tool(tool: ToolName) -> Tool:
  """Returns the tool that a name or a function stands for.

  Raises:
    ValueError: there is no such function, or a type hint or a line of its docstring is missing.
    FileNotFoundError: its file does not exist.
    ImportError: transformers, which writes the schema, is not installed.

  Example:
    >>> load_tool("calc").required
    ['expression']
    >>> load_tool(lambda x: x)
    Traceback (most recent call last):
    ValueError: tool '<lambda>': Cannot generate JSON schema for <lambda> because it has no ...
  """
  from grpo_jax.tasks.rewards.loading import load_object  # lazy: tasks import this module

  if isinstance(tool, str) and tool in TOOLS:
    name, function = tool, TOOLS[tool]
  else:
    function = load_object(tool, "tool", TOOLS)
    name = getattr(function, "__name__", type(function).__name__)
  return Tool(name, function, _schema(name, function))


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
  """Returns the schema of a function, as transformers writes it."""
  from grpo_jax import extras

  extras.require("train", f"tool {name!r}", "transformers", "jinja2")
  with extras.quiet_transformers():
    from transformers.utils import get_json_schema

  kinds = [p.kind for p in inspect.signature(function).parameters.values()]
  remedy = (
    "A tool needs a type hint for every parameter, and a docstring whose part 'Args:' has a line "
    "for each"
  )
  if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & set(kinds):
    raise ValueError(f"tool {name!r} takes *arguments or **arguments. {remedy}")
  try:
    schema = get_json_schema(function)
  except Exception as error:  # transformers has a class of its own for each thing that is missing
    raise ValueError(f"tool {name!r}: {f'{error}'.rstrip('.!')}. {remedy}") from None
  schema["function"]["name"] = name
  schema["function"].pop("return", None)
  schema["function"]["parameters"].setdefault("properties", {})
  return schema


def check_chat_template(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError if a tokenizer's chat template does not show the model its tools.

  Args:
    tokenizer: of `grpo_jax.tokens`.
    tools: schemas, as in `Task.tools`.

  Raises:
    ValueError: the tokenizer has no chat template, or what it writes is the same without tools.
  """
  names = ", ".join(tool["function"]["name"] for tool in tools)
  remedy = (
    "choose a model whose template does, or a format of plain text (tool_settings={'format': "
    "'line'}, 'inline' or 'bracket') and explain the tools in the prompt"
  )
  if not tools:
    return
  if not getattr(tokenizer, "chat_template", None):
    raise ValueError(f"the tokenizer has no chat template to show the tools {names} in; {remedy}")
  messages = [{"role": "user", "content": "?"}]
  shown, plain = (
    each.render(messages, add_generation_prompt=True)
    for each in (tokenizer.with_tools(tools), tokenizer)
  )
  if shown == plain:
    raise ValueError(f"the chat template does not show the tools {names} to the model; {remedy}")


# --- the environment ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolEpisodes:
  """Makes environments that run the calls of a model.

  Attributes:
    tools: what can be called.
    format: how calls are written, a key of `FORMATS`.
    max_calls: calls in an episode. A turn that would exceed them ends it, and is not executed.
    result: what is put around the results where they are text; None: as in `FORMATS`.
  """

  tools: tuple[Tool, ...]
  format: str = "hermes"
  max_calls: int = MAX_CALLS
  result: str | None = None

  def __post_init__(self) -> None:
    from grpo_jax.tasks.base import unknown_name

    if self.format not in FORMATS:
      raise unknown_name("format of calls", self.format, FORMATS)
    if not self.tools:
      raise ValueError(f"tools is empty: name at least one of {', '.join(TOOLS)}, or a function")
    names = [tool.name for tool in self.tools]
    if len(set(names)) < len(names):
      raise ValueError(f"two tools have the same name in {names}")
    if self.max_calls < 1:
      raise ValueError(f"max_calls is {self.max_calls}: it must be at least 1")
    if self.result is not None and (self.row.result is None or "{result}" not in self.result):
      raise ValueError(
        f"result is {self.result!r} with format={self.format!r}: it must contain {{result}}, and "
        "belongs to formats of plain text"
      )

  @property
  def row(self) -> Format:
    """Returns the row of `FORMATS`."""
    return FORMATS[self.format]

  @property
  def stop(self) -> tuple[str, ...]:
    """Returns the strings that end a turn."""
    return self.row.stop

  @property
  def schemas(self) -> tuple[dict[str, Any], ...]:
    """Returns the schemas for the chat template; none for formats of plain text."""
    return tuple(tool.schema for tool in self.tools) if self.row.result is None else ()

  def prepare(self) -> None:
    """Prepares the tools that need it, before the process is isolated."""
    for tool in self.tools:
      if (prepare := getattr(tool.function, "prepare", None)) is not None:
        prepare()

  def __call__(self) -> ToolEnvironment:
    """Returns the environment of one episode."""
    return ToolEnvironment(self)


class ToolEnvironment:
  """Runs the calls in each turn of an episode; a turn without one ends it.

  Metrics: `tools/calls`, `tools/failed`, and the failures by kind: `tools/malformed` (the call
  cannot be read), `tools/unknown` (no such tool), `tools/arguments`, `tools/raised`. `tools/cut`
  counts results that were too long, `tools/over_limit` episodes that ended at `max_calls`.
  """

  def __init__(self, episodes: ToolEpisodes, tools: Sequence[Tool] | None = None) -> None:
    self._episodes = episodes
    self._tools = {tool.name: tool for tool in (episodes.tools if tools is None else tools)}
    self._calls = 0

  def reset(self, example: object, seed: int) -> None:
    """Starts counting the calls; the prompt is the example's own."""
    self._calls = 0

  def step(self, text: str) -> Step:
    """Returns the results of the calls in a turn, in their order."""
    calls = self._episodes.row.parse(text)
    if not calls:
      return Step("", None, True)
    self._calls += len(calls)
    if self._calls > self._episodes.max_calls:
      return Step("", None, True, {"tools/over_limit": 1.0})
    results = run_calls(calls, self._tools)
    metrics: Counter[str] = Counter({"tools/calls": len(calls)})
    for result in results:
      if result.failure:
        metrics.update(["tools/failed", f"tools/{result.failure}"])
      metrics.update(["tools/cut"] if result.cut else [])
    return Step(self._observation(results), None, False, metrics)

  def _observation(self, results: Sequence[Result]) -> Observation:
    template = self._episodes.result or self._episodes.row.result
    if template is None:
      return [{"role": "tool", "name": r.name, "content": r.text} for r in results]
    return template.replace("{result}", "\n".join(" ".join(r.text.split()) for r in results))


# --- tasks ----------------------------------------------------------------------------------------


def with_tools(
  task: Task, tools: Sequence[ToolName], settings: Mapping[str, Any] | None = None
) -> Task:
  """Returns the task with tools that the model may call in each episode; without any, the task.

  Args:
    task: a task of single turns. Its rewards score the episode's text after the last turn.
    tools: names of built-in tools, 'path/to/file.py:function', or functions.
    settings: `format`, `max_calls` and `result`, see `ToolEpisodes`.

  Raises:
    ValueError: a tool or a setting is not valid, or the task has an environment.
  """
  from grpo_jax.tasks.base import check_settings
  from grpo_jax.tasks.rewards.loading import files_of

  settings = dict(settings or {})
  if not tools:
    if settings:
      raise ValueError(f"tool_settings is {settings}, but there are no tools: set tools=[...]")
    return task
  if task.environment is not None:
    raise ValueError(f"task {task.name!r} has an environment, which tools would replace")
  check_settings("tool_settings", partial(episodes_with_tools, tools), settings)
  files = tuple(dict.fromkeys((*task.files, *files_of(_listed(tools)))))
  return with_environment(replace(task, files=files), episodes_with_tools(tools, **settings))


def with_environment(task: Task, make: Callable[[], Environment] | None) -> Task:
  """Returns the task with this factory of environments, and the tools of it; None: the task.

  A factory may have `schemas`, those of the tools, and `stop`, strings that end a turn.

  Raises:
    ValueError: it cannot be called, or is a class without `reset` or `step`.
  """
  if make is None:
    return task
  missing = [name for name in ("reset", "step") if not callable(getattr(make, name, None))]
  if inspect.isclass(make) and missing:
    raise ValueError(
      f"environment {make.__name__!r} has no method {' and no method '.join(missing)}: it needs "
      "reset(self, example, seed) and step(self, text). A class for TRL's environment_factory is "
      "given as trl_environment(Class)"
    )
  stop = dict.fromkeys((*task.stop, *getattr(make, "stop", ())))
  return replace(
    task, environment=make, tools=tuple(getattr(make, "schemas", ())), stop=tuple(stop)
  )


def _listed(tools: Sequence[ToolName] | ToolName) -> list[ToolName]:
  return [tools] if isinstance(tools, str) or callable(tools) else [*tools]


def episodes_with_tools(
  tools: Sequence[ToolName] | ToolName,
  format: str = "hermes",
  max_calls: int = MAX_CALLS,
  result: str | None = None,
) -> ToolEpisodes:
  """Returns the factory of environments for these tools; see `ToolEpisodes`.

  Raises:
    ValueError: a tool, the format or a number is not valid.

  Example:
    >>> episodes_with_tools(["calc"], "line")().step("calc(12 * 7)").observation
    'Result: 84\\nAnswer:'
  """
  return ToolEpisodes(tuple(map(load_tool, _listed(tools))), format, max_calls, result)
