"""Takes the environment classes that users of TRL's `environment_factory` write, as they are::

    class Game:
      def reset(self, secret, **columns) -> str | None:   # text for the end of the prompt
        ...
      def guess(self, number: int) -> str:                # each public method is a tool
        '''Guesses the number.

        Args:
          number: The guess.
        '''
      def get_reward(self) -> float:                      # optional: the reward of the episode
        ...

    episodes = trl_environment(Game)

`environment="my_game.py:episodes"` then gives it to a task `table`. What TRL's `tools` takes, the
setting `tools` of a task takes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_jax.environments.base import EnvironmentFault, Step
from grpo_jax.environments.seeded import GlobalRandom
from grpo_jax.environments.tools import (
  MAX_CALLS,
  Tool,
  ToolEnvironment,
  ToolEpisodes,
  ToolName,
  load_tool,
)

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Example, Prompt


@dataclass(frozen=True)
class TrlEpisodes(ToolEpisodes):
  """Makes environments around those of a TRL user.

  Attributes:
    make: TRL's `environment_factory`. It is called once for each episode.
  """

  make: Callable[[], Any] | None = None

  def __call__(self) -> TrlEnvironment:
    """Returns the environment of one episode."""
    return TrlEnvironment(self)


def trl_environment(
  environment_factory: Callable[[], Any],
  tools: Sequence[ToolName] = (),
  *,
  format: str = "hermes",
  max_calls: int = MAX_CALLS,
) -> TrlEpisodes:
  """Returns a factory of environments from TRL's `environment_factory`.

  Python's and NumPy's global random numbers are seeded for each episode, and equally in a group.

  Args:
    environment_factory: a class, or a callable without arguments that makes an environment.
    tools: further tools, as for TRL's `tools`.
    format: how calls are written, a key of `FORMATS`.
    max_calls: see `ToolEpisodes`.

  Raises:
    ValueError: it has no `reset` or no public method, or a method lacks a type hint or a docstring.

  Example:
    >>> class Counter:
    ...   def reset(self, **columns):
    ...     self.count = 0
    ...   def add(self, number: int) -> str:
    ...     '''Adds to the count.
    ...
    ...     Args:
    ...       number: How much.
    ...     '''
    ...     self.count += number
    ...     return f"it is {self.count}"
    ...   def get_reward(self) -> float:
    ...     return float(self.count == 5)
    >>> episodes = trl_environment(Counter, format="line")
    >>> from grpo_jax.tasks.base import Example
    >>> environment = episodes()
    >>> environment.reset(Example("Count to 5.", {}, "5"), seed=0)
    >>> environment.step("add(5)").observation, environment.step("Done.").reward
    ('Result: it is 5\\nAnswer:', 1.0)
  """
  if isinstance(environment_factory, dict):
    raise ValueError(
      "environment_factory is a dict of environments; give each a task of its own: the prompts of "
      "a task show one set of tools"
    )
  probe = environment_factory()
  name = type(probe).__name__
  if not callable(getattr(probe, "reset", None)):
    raise ValueError(f"environment {name!r} has no method reset")
  methods = [load_tool(method) for method in _methods(probe)]
  own = tuple(map(load_tool, tools))
  if not methods and not own:
    raise ValueError(f"environment {name!r} has no public method that could be a tool")
  _close(probe)
  return TrlEpisodes((*own, *methods), format, max_calls, make=environment_factory)


class TrlEnvironment(ToolEnvironment):
  """Plays one episode in the environment of a TRL user."""

  def __init__(self, episodes: TrlEpisodes) -> None:
    self._inner = episodes.make()
    methods = {method.__name__: method for method in _methods(self._inner)}
    tools = [_bound(tool, methods, type(self._inner)) for tool in episodes.tools]
    super().__init__(episodes, tools)

  def reset(self, example: Example, seed: int) -> Prompt | None:
    """Passes on the columns and the prompt; what it returns is appended to the last message."""
    super().reset(example, seed)
    self._random = GlobalRandom(seed)
    with self._random.in_place():
      text = _awaited(self._inner.reset(**{**example.columns, "prompt": example.prompt}))
    if text is None:
      return None
    if not isinstance(text, str):
      raise EnvironmentFault(
        f"reset returned {type(text).__name__}: it must return text for the end of the prompt, or "
        "None"
      )
    if isinstance(example.prompt, str):
      return example.prompt + text
    *before, last = example.prompt
    return [*before, {**last, "content": last["content"] + text}]

  def step(self, text: str) -> Step:
    """Runs the calls of a turn. The last turn gets the reward of `get_reward`, if it exists."""
    with self._random.in_place():
      step = super().step(text)
    return dataclasses.replace(step, reward=self.finish()) if step.done else step

  def finish(self) -> float | None:
    """Returns the reward of the episode so far; None if the environment has none."""
    get_reward = getattr(self._inner, "get_reward", None)
    if get_reward is None:
      return None
    with self._random.in_place():
      return _awaited(get_reward())

  def close(self) -> None:
    """Closes the environment, if it can be closed."""
    _close(self._inner)


def _methods(environment: Any) -> list[Callable[..., Any]]:
  """Returns the methods that TRL takes for tools."""
  names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
  kept = ("reset", "get_reward", "close")
  return [
    getattr(environment, name) for name in names if not name.startswith("_") and name not in kept
  ]


def _bound(tool: Tool, methods: dict[str, Callable[..., Any]], cls: type) -> Tool:
  """Returns a tool of the class as a method of the instance; other tools stay."""
  if getattr(tool.function, "__self__", None).__class__ is not cls:
    return tool
  return dataclasses.replace(tool, function=methods[tool.name])


def _awaited(value: Any) -> Any:
  if not inspect.isawaitable(value):
    return value
  from grpo_jax.tasks.rewards.scoring import await_together  # lazy: tasks import environments

  (result,) = await_together([value])
  if isinstance(result, BaseException):
    raise result
  return result


def _close(environment: Any) -> None:
  close = getattr(environment, "close", None)
  if callable(close):
    _awaited(close())
