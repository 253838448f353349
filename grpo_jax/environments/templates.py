"""Renders chat templates in a process of their own, under limits of time and memory.

A chat template is a program that comes with a model. One process serves one template, and a
rendering costs a message there and back, so that thousands of prompts take seconds.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Mapping
from subprocess import Popen
from typing import Any

from grpo_jax.environments import child

# A prompt may take `SECONDS`, and all of them together that and `SECONDS_EACH` more for each.
SECONDS, SECONDS_EACH = 10.0, 0.05
_ANSWER_BYTES = 2**28


class TemplateError(ValueError):
  """Reports that a chat template refused its messages or failed; the message is its own words."""


class ChatTemplate:
  """Renders one chat template; the process starts with the first rendering.

  Args:
    template: source of the template, in Jinja.
    date: day that it sees, YYYY-MM-DD.
    names: variables of each rendering, such as the special tokens.

  Example:
    >>> template = ChatTemplate("{{ messages[0].content }}{{ end }}", "2025-01-02", {"end": "."})
    >>> template.render(messages=[{"role": "user", "content": "hi"}])
    'hi.'
  """

  def __init__(self, template: str, date: str, names: Mapping[str, Any]) -> None:
    self._setup = {"template": template, "date": date, "names": dict(names)}
    self._process: Popen | None = None
    self._variables: frozenset[str] = frozenset()
    self._seconds, self._count = 0.0, 0
    self._lock = threading.Lock()

  def render(self, **variables: Any) -> str:
    """Returns the text for some variables, which must be JSON data.

    Raises:
      TemplateError: the template has an error, refuses the variables, or exceeds its limits.
    """
    with self._lock:
      self._start()
      self._count += 1
      return self._ask(variables)

  def variables(self) -> frozenset[str]:
    """Returns the names that the template reads and does not set itself.

    Raises:
      TemplateError: the template has a syntax error.
    """
    with self._lock:
      self._start()
    return self._variables

  def _start(self) -> None:
    if self._process is not None:
      if self._process.poll() is None:
        return
      self._finalizer()  # it ended by itself: its connection is still open
    environment = child.plain_environment()
    module = "grpo_jax.environments.template_process"
    self._process, self._connection = child.start(module, environment)
    self._finalizer = weakref.finalize(self, child.end, self._process, self._connection)
    try:
      self._variables = frozenset(self._ask(self._setup))
    except TemplateError:
      self._finalizer()
      raise

  def _ask(self, message: Mapping[str, Any]) -> Any:
    """Sends a message and returns its answer."""
    began = time.monotonic()
    budget = SECONDS + self._count * SECONDS_EACH - self._seconds
    allowed = max(min(SECONDS, budget), 0.0)
    try:
      self._connection.send_bytes(json.dumps(message).encode())
      if not self._connection.poll(allowed):
        self._finalizer()
        raise TemplateError(
          f"it was stopped after {allowed:.1f} s, since a prompt may take {SECONDS:g} s; the "
          f"{self._count} prompts so far have taken {self._seconds + allowed:.1f} s"
        )
      kind, value = json.loads(self._connection.recv_bytes(_ANSWER_BYTES))
    except (EOFError, OSError) as error:
      self._finalizer()
      raise TemplateError("its process died, most likely for want of memory") from error
    finally:
      self._seconds += time.monotonic() - began
    if kind == "raised":
      raise TemplateError(value)
    return value
