"""A guessing game as users of the package openenv write it: run by a test, in its own Python.

python openenv_server.py PORT
"""

import random
import sys
import time

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
  number: int


class Answer(Observation):
  text: str = ""


class Game(Environment):
  SUPPORTS_CONCURRENT_SESSIONS = True

  def __init__(self):
    self._state = State(episode_id="e", step_count=0)

  def reset(self, seed=None, episode_id=None, high=9, **kwargs):
    self.secret = random.Random(seed).randint(1, high)
    return Answer(text=f"I think of a number from 1 to {high}.", done=False, reward=None)

  def step(self, action):
    if action.number == -1:
      raise RuntimeError("as ordered")
    if action.number == -2:
      time.sleep(5)
    if action.number == -3:
      return Answer(text="?", done=False, reward=float("nan"))
    if action.number == self.secret:
      return Answer(text="Correct", done=True, reward=1.0)
    text = "Higher" if action.number < self.secret else "Lower"
    return Answer(text=text, done=False, reward=0.0)

  @property
  def state(self):
    return self._state


if __name__ == "__main__":
  app = create_app(Game, Guess, Answer, env_name="game", max_concurrent_envs=4)
  uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
