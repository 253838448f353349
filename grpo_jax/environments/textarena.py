"""Plays single-player games of TextArena in this process.

    episodes = textarena_environment("GuessTheNumber-v0-raw", max_turns=5)

`environment="my_game.py:episodes"` gives it to a task `table`; the game writes the prompt. Only the
"-raw" variants are played: the others repeat the whole game in each observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo_jax import extras
from grpo_jax.environments.base import EnvironmentFault, Step
from grpo_jax.environments.seeded import GlobalRandom

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Example, Prompt


@dataclass(frozen=True)
class TextArenaEpisodes:
  """Makes games; see `textarena_environment`."""

  game: str
  chat: bool
  action: Callable[[str], str]
  settings: dict[str, Any] = field(default_factory=dict)

  def __call__(self) -> TextArenaEnvironment:
    """Returns the environment of one game."""
    return TextArenaEnvironment(self)


def textarena_environment(
  game: str, *, chat: bool = True, action: Callable[[str], str] | None = None, **settings: Any
) -> TextArenaEpisodes:
  """Returns a factory of environments that are games of TextArena.

  TextArena draws from Python's global random numbers: every episode has its own, from its seed. The
  reward is that of the game, at its end. The metric `textarena/invalid` counts games that ended
  with a move that was not valid.

  Args:
    game: a name that ends in "-raw".
    chat: observations as messages of the role "user", or as text.
    action: text of a turn -> move; None: the text. Most games look for a move in square brackets.
    settings: of the game.

  Raises:
    ImportError: textarena is not installed.
    ValueError: the game is unknown, or not for one player.
  """
  extras.require("textarena", f"the game {game!r}", "textarena")
  import textarena

  from grpo_jax.tasks.base import unknown_name

  if not game.endswith("-raw"):
    raise ValueError(f"game is {game!r}: only variants that end in '-raw' are played; add it")
  names = [name for name in textarena.envs.registration.ENV_REGISTRY if name.endswith("-raw")]
  if game not in names:
    raise unknown_name("game", game, names)
  episodes = TextArenaEpisodes(game, chat, action or str, settings)
  try:
    TextArenaEnvironment(episodes).start(0)
  except Exception as error:
    raise ValueError(
      f"game {game!r} cannot be played by one player: {type(error).__name__}: {error}"
    ) from error
  return episodes


class TextArenaEnvironment:
  """Plays one game of one player."""

  def __init__(self, episodes: TextArenaEpisodes) -> None:
    self._episodes = episodes

  def reset(self, example: Example, seed: int) -> Prompt:
    """Starts the game; its first messages follow the example's prompt."""
    text = self.start(seed)
    prompt = example.prompt
    if not self._episodes.chat:
      if not isinstance(prompt, str):
        raise EnvironmentFault("game writes text, but the example has chat messages: set chat=True")
      return f"{prompt}{text}"
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    *before, last = prompt
    if last["role"] != "user":
      return [*prompt, {"role": "user", "content": text}]
    joined = "\n\n".join(filter(None, [last["content"].strip(), text]))
    return [*before, {"role": "user", "content": joined}]

  def start(self, seed: int) -> str:
    """Starts the game and returns its first messages."""
    import textarena

    self._random = GlobalRandom(seed)
    with self._random.in_place():
      self._game = textarena.make(self._episodes.game, **self._episodes.settings)
      self._game.reset(num_players=1, seed=seed)
      return self._messages()

  def step(self, text: str) -> Step:
    """Makes a move."""
    with self._random.in_place():
      done, _ = self._game.step(self._episodes.action(text))
      if done:
        rewards, info = self._game.close()
        invalid = float(bool(info.get(0, {}).get("invalid_move")))
        return Step("", float(rewards[0]), True, {"textarena/invalid": invalid})
      return Step(self._observation(self._messages()), None, False)

  def _observation(self, text: str) -> Any:
    return [{"role": "user", "content": text}] if self._episodes.chat else f"{text}\n"

  def _messages(self) -> str:
    """Returns the new messages of the game, without the policy's own moves."""
    _, messages = self._game.get_observation()
    return "\n".join(_texts(messages))


def _texts(messages: str | Sequence[tuple[int, str, Any]]) -> list[str]:
  if isinstance(messages, str):
    return [messages]
  return [text for _, text, kind in messages if getattr(kind, "name", "") != "PLAYER_ACTION"]
