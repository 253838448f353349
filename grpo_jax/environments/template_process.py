"""Runs in a process of its own: renders one chat template. `templates.py` starts it.

The template comes with a model and is a program: it may loop for ever, or ask for any amount of
memory. The process has limits of both, and no network, no files to write and no other programs.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from grpo_jax.environments import isolation

TEXT_LIMIT = 2**24  # characters of a rendered prompt
MEMORY_BYTES = 2**29
ORPHAN_SECONDS = 60  # until a process whose parent is gone ends itself


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}`, which marks the assistant's text; it changes nothing."""

  tags = frozenset(("generation",))

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


class _Dict:
  """Stands for `dict` in a template: calls and `fromkeys`, without a way to Python's own type."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


def environment(date: str) -> jinja2.Environment:
  """Returns the environment of chat templates: that of transformers, with a fixed date.

  Args:
    date: day that `strftime_now` formats, at midnight, as YYYY-MM-DD.
  """
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  midnight = datetime.datetime.fromisoformat(date)

  def raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message))

  def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  env.filters["tojson"] = to_json
  env.globals |= {
    "raise_exception": raise_exception,
    "strftime_now": midnight.strftime,
    "dict": _Dict(),
  }
  return env


def make_render(template: str, date: str, names: dict[str, Any]) -> Callable[..., str]:
  """Returns the function (variables by name) -> text of a template.

  Args:
    template: its source.
    date: as in `environment`.
    names: variables of each rendering, such as `bos_token`.

  Example:
    >>> make_render("{{ a }} {{ b }} {{ strftime_now('%d %b') }}", "2025-01-02", {"a": 1})(b=2)
    '1 2 02 Jan'
  """
  compiled = environment(date).from_string(template)

  def render(**variables: Any) -> str:
    random.seed(0)  # of the filter `random`: one prompt is one text
    text = compiled.render(**names | variables)
    if len(text) > TEXT_LIMIT:
      raise MemoryError
    return text

  return render


def words(error: BaseException) -> str:
  """Returns what a template said when it failed."""
  if isinstance(error, MemoryError):
    return f"it needs more than {MEMORY_BYTES >> 20} MiB, or writes over {TEXT_LIMIT:,} characters"
  if isinstance(error, jinja2.TemplateSyntaxError):
    return f"syntax error in line {error.lineno}: {error.message}"
  if type(error) is jinja2.TemplateError:
    return str(error.message)
  return f"{type(error).__name__}: {error}"


def serve(connection: Connection) -> None:
  """Renders until the parent process is gone.

  The first message holds the arguments of `make_render`; its answer is ["done", names of the
  template's variables]. Each further message holds variables, and is answered by ["done", text].
  An error is answered by ["raised", words]. All of them are JSON.
  """
  os.set_inheritable(connection.fileno(), False)
  with contextlib.suppress(OSError, ValueError):  # systems other than Linux
    isolation.limit(memory_bytes=MEMORY_BYTES)
  isolation.confine()
  render: Callable[..., str] | None = None
  with open(os.devnull, "w") as devnull:
    while True:
      try:
        message = json.loads(connection.recv_bytes())
      except (EOFError, OSError):
        return
      # A template that loops does not notice that its parent is gone; this timer does.
      faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True, file=devnull)
      try:
        if render is None:
          tree = environment(message["date"]).parse(message["template"])
          answer = ["done", sorted(jinja2.meta.find_undeclared_variables(tree))]
          render = make_render(**message)
        else:
          answer = ["done", render(**message)]
        answer = json.dumps(answer).encode()
      except Exception as error:
        answer = json.dumps(["raised", words(error)[:2000]]).encode()
      faulthandler.cancel_dump_traceback_later()
      connection.send_bytes(answer)
