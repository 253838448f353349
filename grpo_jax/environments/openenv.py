"""Plays environments that an OpenEnv server runs, over its WebSocket::

    episodes = openenv_environment(
      "ws://127.0.0.1:8000/ws",
      action=lambda text: {"message": text},
      observation=lambda data: data["echoed_message"],
    )

`environment="my_env.py:episodes"` gives it to a task `table`. One connection is one session is one
episode. The server needs as many sessions as episodes run at once (`max_concurrent_envs`), and
environments in workers need `rewards.isolate=false`: isolated ones have no network.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_jax import extras
from grpo_jax.environments.base import EnvironmentFault, Observation, Step, checked_reward

if TYPE_CHECKING:
  from grpo_jax.tasks.base import Example, Prompt

MESSAGE_BYTES = 2**24  # longest message of a server
_RETRY = 0.2  # seconds between two tries for a session


@dataclass(frozen=True)
class OpenEnvEpisodes:
  """Makes environments on an OpenEnv server; see `openenv_environment`."""

  url: str
  action: Callable[[str], Mapping[str, Any]]
  observation: Callable[[dict[str, Any]], Observation]
  reset: Callable[[Example, int], Mapping[str, Any]]
  prompt: Callable[[Example, dict[str, Any]], Prompt | None]
  timeout: float
  wait: float

  def __call__(self) -> OpenEnvEnvironment:
    """Returns the environment of one episode; it connects when it is reset."""
    return OpenEnvEnvironment(self)


def openenv_environment(
  url: str,
  *,
  action: Callable[[str], Mapping[str, Any]],
  observation: Callable[[dict[str, Any]], Observation],
  reset: Callable[[Example, int], Mapping[str, Any]] | None = None,
  prompt: Callable[[Example, dict[str, Any]], Prompt | None] | None = None,
  timeout: float = 30.0,
  wait: float = 10.0,
) -> OpenEnvEpisodes:
  """Returns a factory of environments on an OpenEnv server.

  Args:
    url: of the server's WebSocket, such as "ws://127.0.0.1:8000/ws".
    action: text of a turn -> fields of the action. What it raises becomes a failure of the episode,
      so it should make an action of any text.
    observation: fields of an observation -> what the policy reads.
    reset: example and seed -> arguments of the server's `reset`; None: the seed alone.
    prompt: example and first observation -> prompt; None: the example's own.
    timeout: time limit in seconds of the answer to a message. The episode ends there: the session
      would go on with an answer that belongs to an earlier turn.
    wait: seconds to wait for a free session.

  Raises:
    ImportError: websockets is not installed.
    ValueError: the address is not that of a WebSocket.
  """
  extras.require("openenv", "an OpenEnv server", "websockets")
  if not url.startswith(("ws://", "wss://")):
    raise ValueError(f"url is {url!r}: the address of a WebSocket begins with ws:// or wss://")
  return OpenEnvEpisodes(
    url, action, observation, reset or _seed_alone, prompt or _own_prompt, timeout, wait
  )


def _seed_alone(example: Example, seed: int) -> dict[str, Any]:
  return {"seed": seed}


def _own_prompt(example: Example, observation: dict[str, Any]) -> None:
  return None


class OpenEnvEnvironment:
  """Plays one episode on an OpenEnv server."""

  def __init__(self, episodes: OpenEnvEpisodes) -> None:
    self._episodes = episodes
    self._socket: Any = None
    self._opened = contextlib.ExitStack()

  def reset(self, example: Example, seed: int) -> Prompt | None:
    """Opens a session and resets it, waiting for one that is free."""
    data = dict(self._episodes.reset(example, seed))
    until = time.monotonic() + self._episodes.wait
    while True:
      self.close()
      self._connect()
      code, answer = self._ask("reset", data)
      if code != "CAPACITY_REACHED":
        break
      if time.monotonic() > until:
        raise EnvironmentFault(
          f"server {self._episodes.url} has no free session ({answer}): raise its "
          "max_concurrent_envs to the number of episodes that run at once"
        )
      time.sleep(_RETRY)
    if code:
      raise EnvironmentFault(f"server refused reset: {code}: {answer}")
    return self._episodes.prompt(example, answer["observation"])

  def step(self, text: str) -> Step:
    """Sends an action. The server's complaint about an action is an observation of the policy."""
    if self._socket is None:
      raise EnvironmentFault("session with the server is closed")
    code, answer = self._ask("step", dict(self._episodes.action(text)))
    if code == "VALIDATION_ERROR":
      return Step(f"Invalid action: {answer}", None, False, {"openenv/invalid": 1.0})
    if code:
      raise EnvironmentFault(f"server failed in step: {code}: {answer}")
    done = answer.get("done") is True
    reward = checked_reward(answer.get("reward"), "the server's step")
    step = Step(self._episodes.observation(answer["observation"]), reward, done)
    if done:  # the server would take further actions, and reward them
      self.close()
    return step

  def close(self) -> None:
    """Ends the session, so that its place is free."""
    if self._socket is not None:
      with contextlib.suppress(Exception):  # it may be closed already
        self._socket.send(json.dumps({"type": "close"}))
    self._drop()

  def _drop(self) -> None:
    self._socket = None
    self._opened.close()

  def _connect(self) -> None:
    from websockets.sync.client import connect

    try:
      # Between two turns the policy writes, for minutes perhaps: no pings, which would time out.
      connection = connect(
        self._episodes.url, open_timeout=self._episodes.timeout, close_timeout=1.0,
        ping_interval=None, max_size=MESSAGE_BYTES, proxy=None,
      )  # fmt: skip
      self._socket = self._opened.enter_context(connection)
    except Exception as error:
      raise EnvironmentFault(
        f"server {self._episodes.url} cannot be reached: {type(error).__name__}: {error}"
      ) from error

  def _ask(self, kind: str, data: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns ("", data of the answer), or the code of an error and its message."""
    from websockets.exceptions import ConnectionClosed

    try:
      # A server without a free session says so unasked and closes; its message is still there.
      with contextlib.suppress(ConnectionClosed):
        self._socket.send(json.dumps({"type": kind, "data": data}))
      message = json.loads(self._socket.recv(timeout=self._episodes.timeout))
      answer = message["data"]
      if message["type"] == "error":
        details = [str(item.get("msg")) for item in answer.get("errors", [])]
        return str(answer["code"]), "; ".join([str(answer["message"]), *details])
      if message["type"] != "observation" or not isinstance(answer["observation"], dict):
        raise ValueError(f"a message of type {message['type']!r}")
      return "", answer
    except BaseException as error:  # its next answer would be that to this message
      self._drop()
      if not isinstance(error, Exception):
        raise
      if isinstance(error, TimeoutError):
        reason = f"did not answer within {self._episodes.timeout:g} s"
      else:
        reason = f"failed: {type(error).__name__}: {error}"
      raise EnvironmentFault(f"server {self._episodes.url} {reason}") from error
