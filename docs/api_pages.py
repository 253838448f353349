"""Writes the pages of the API reference, and checks that every public symbol has a docstring.

`conf.py` calls this module before Sphinx reads the sources. One page is written for `import
grpo_jax`, grouped by the module that defines a name, and one for each module of the package.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grpo_jax

# Parts of the reference, in reading order: title, package or module names, one sentence.
PARTS = (
  ("Core", ("grpo_jax.core", "grpo_jax.testing"), "Pure functions on arrays, and their checks."),
  ("Models", ("grpo_jax.models",), "Decoders, their layers, and reading and writing weights."),
  ("Sampling", ("grpo_jax.sampling",), "From prompts to completions."),
  ("Learning", ("grpo_jax.learning",), "Batches, update steps and optimizers."),
  ("Tasks", ("grpo_jax.tasks", "grpo_jax.environments"), "Examples, prompts and rewards."),
  ("Distributed", ("grpo_jax.distributed",), "Meshes, shardings and several hosts."),
  ("Runs", ("grpo_jax.run",), "Checkpoints, metrics and the work directory."),
  ("Plans", ("grpo_jax.plan",), "Compiling a run for devices that are not there."),
)
LAST_PART = ("Programs", "Configs, the training loop, and the commands around it.")


def module_names() -> list[str]:
  """Returns the names of all importable modules of the package, packages included."""
  names = [info.name for info in pkgutil.walk_packages(grpo_jax.__path__, "grpo_jax.")]
  return sorted(name for name in names if not _is_private(name))


def _is_private(name: str) -> bool:
  return any(part.startswith("_") for part in name.split("."))


def public_members(module: ModuleType) -> dict[str, object]:
  """Returns the public functions and classes that a module defines itself, by name."""
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith("_")
    and (inspect.isclass(value) or inspect.isroutine(value))
    and getattr(value, "__module__", None) == module.__name__
  }


def undocumented() -> list[str]:
  """Returns the full names of public symbols without a docstring.

  Symbols are modules, functions, classes, and the methods and properties that a class defines.
  """
  missing = []
  for name in ["grpo_jax", *module_names()]:
    module = importlib.import_module(name)
    if not module.__doc__:
      missing.append(name)
    for member, value in public_members(module).items():
      if not _own_doc(value):
        missing.append(f"{name}.{member}")
      if inspect.isclass(value):
        methods = (m for m, f in _own_methods(value) if not inspect.getdoc(getattr(value, m, f)))
        missing += [f"{name}.{member}.{method}" for method in methods]
  for name in grpo_jax.__all__:
    value = getattr(grpo_jax, name)
    if (callable(value) or inspect.ismodule(value)) and not inspect.getdoc(value):
      missing.append(f"grpo_jax.{name}")
  return sorted(set(missing))


def _own_doc(value: object) -> str | None:
  """Returns the docstring, unless Python made it up for a dataclass or a tuple."""
  doc = value.__doc__
  generated = inspect.isclass(value) and (
    (dataclasses.is_dataclass(value) and doc and doc.startswith(f"{value.__name__}("))
    or (issubclass(value, tuple) and doc and doc.startswith(f"{value.__name__}("))
  )
  return None if generated else doc


def _own_methods(cls: type) -> Iterator[tuple[str, object]]:
  fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
  for name, value in vars(cls).items():
    is_method = inspect.isroutine(value) or isinstance(value, property | staticmethod | classmethod)
    if is_method and not name.startswith("_") and name not in fields:
      yield name, value


def write_pages(folder: Path) -> None:
  """Writes `grpo_jax.md`, `index.md`'s parts and `modules/*.md` into `folder`.

  Pages of modules that no longer exist are removed. Unchanged pages keep their time stamp, so
  that Sphinx does not read them again.
  """
  modules = folder / "modules"
  modules.mkdir(parents=True, exist_ok=True)
  names = module_names()
  pages = {folder / "grpo_jax.md": _public_page()}
  pages |= {modules / f"{name}.md": _module_page(name, names) for name in names}
  pages[modules / "index.md"] = _parts_page(names)
  for page in modules.glob("*.md"):
    if page not in pages:
      page.unlink()
  for page, text in pages.items():
    if not page.exists() or page.read_text(encoding="utf-8") != text:
      page.write_text(text, encoding="utf-8")


def _public_page() -> str:
  """The page of `import grpo_jax`."""
  by_module: dict[str, list[str]] = {}
  for name in grpo_jax.__all__:
    value = getattr(grpo_jax, name)
    if not (inspect.ismodule(value) or isinstance(value, str)):
      by_module.setdefault(_home(name), []).append(name)
  text = ["# `import grpo_jax`", _summary(grpo_jax), ""]
  for home, names in sorted(by_module.items()):
    text += [f"## {_title(home)}", ""]
    for name in names:
      value = getattr(grpo_jax, name)
      if isinstance(value, dict):
        text += _rst(f".. py:data:: grpo_jax.{name}", "   :type: dict") + _table(value)
      elif inspect.isclass(value):
        text += _rst(f".. autoclass:: grpo_jax.{name}", "   :members:")
      else:
        text += _rst(f".. autofunction:: grpo_jax.{name}")
  return "\n".join(text)


def _table(rows: dict[str, object]) -> list[str]:
  """Returns a table of frozen dataclasses by name: a line each, without unset fields."""
  if not all(dataclasses.is_dataclass(row) for row in rows.values()):
    return [f"Keys: {', '.join(f'`{key}`' for key in rows)}.", ""]
  has_source = any(hasattr(row, "source") for row in rows.values())
  columns = ["name", "fields", "source"] if has_source else ["name", "fields"]
  text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for name, row in rows.items():
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "source"}
    shown = (f"`{k}={_short(v)}`" for k, v in fields.items() if v not in (None, "none", 0.0))
    cells = [f"`{name}`", ", ".join(shown), *([row.source] if has_source else [])]
    text.append(f"| {' | '.join(cells)} |")
  return [*text, ""]


def _short(value: object) -> str:
  return value.__name__ if inspect.isroutine(value) else repr(value)


def _home(name: str) -> str:
  """Returns the module that defines a public name; constants are looked up by identity."""
  value = getattr(grpo_jax, name)
  home = getattr(value, "__module__", None)
  if home and home.startswith("grpo_jax."):
    return home
  for module in module_names():
    if (
      module.startswith("grpo_jax.core.")
      and vars(importlib.import_module(module)).get(name) is value
      and _defines(module, name)
    ):
      return module
  return "grpo_jax"


def _defines(module: str, name: str) -> bool:
  source = inspect.getsource(importlib.import_module(module))
  return re.search(rf"^{name}\b[^=\n]*=", source, re.MULTILINE) is not None


def _module_page(name: str, names: list[str]) -> str:
  module = importlib.import_module(name)
  public = [n for n, v in public_members(module).items() if getattr(grpo_jax, n, None) is v]
  children = [n for n in names if n.startswith(f"{name}.") and n.count(".") == name.count(".") + 1]
  text = [f"# `{name}`", ""]
  if public:
    text += [
      f"Also in [`import grpo_jax`](../grpo_jax.md): {', '.join(f'`{n}`' for n in public)}.",
      "",
    ]
  text += _rst(f".. automodule:: {name}", "   :members:")
  if children:
    text += ["```{toctree}", *children, "```", ""]
  return "\n".join(text)


def _parts_page(names: list[str]) -> str:
  """The list of all modules, by part of the package."""
  text, left = ["# Modules", ""], list(names)
  for title, roots, sentence in PARTS:
    mine = [n for n in left if any(n == r or n.startswith(f"{r}.") for r in roots)]
    left = [n for n in left if n not in mine]
    if mine:
      text += _part(title, sentence, mine, [n for n in mine if n in roots])
  text += _part(*LAST_PART, left, left)
  return "\n".join(text)


def _part(title: str, sentence: str, names: list[str], tops: list[str]) -> list[str]:
  rows = [f"| [`{n}`]({n}.md) | {_summary(importlib.import_module(n))} |" for n in names]
  return [
    f"## {title}", "", sentence, "", "| module | content |", "|---|---|", *rows, "",
    "```{toctree}", ":hidden:", "", *tops, "```", "",
  ]  # fmt: skip


def _rst(*lines: str) -> list[str]:
  return ["```{eval-rst}", *lines, "```", ""]


def _summary(module: ModuleType) -> str:
  """Returns the first sentence of a module's docstring, on one line."""
  first = (module.__doc__ or "").split("\n\n")[0]
  return " ".join(first.split()).replace("|", "\\|")


def _title(module: str) -> str:
  name = module.rpartition(".")[2]
  words = {"kl": "KL", "logprobs": "Log-probabilities"}
  return f"{words.get(name, name.replace('_', ' ').capitalize())}: `{module}`"
