"""The pages of docs/ say what the code does: examples run, paths exist, symbols are documented."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import grpo_jax

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_EXAMPLES = [page for page in PAGES if "```pycon" in page.read_text(encoding="utf-8")]


def examples(page: Path) -> str:
  """Returns the `pycon` blocks of a page, without their indentation inside lists."""
  text = page.read_text(encoding="utf-8")
  blocks = re.findall(r"^( *)```pycon\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
  return "\n".join(re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_examples_of_a_page_run(page):
  test = doctest.DocTestParser().get_doctest(examples(page), {}, page.name, str(page), 0)
  assert test.examples
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
  report = []
  runner.run(test, out=report.append)
  assert runner.failures == 0, "".join(report)


def missing_paths(text: str) -> list[str]:
  """Returns the paths of this project that a text names and that do not exist."""
  text = re.sub(r"^```\{toctree\}.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  roots = "benchmarks|docs|examples|experiments|grpo_jax|notebooks|tests|tools"
  paths = re.findall(rf"(?<![\w/])((?:{roots})/[\w./-]*\w)", text)
  return sorted({path for path in paths if "NAME" not in path and not (ROOT / path).exists()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_on_a_page_exist(page):
  assert not missing_paths(page.read_text(encoding="utf-8").replace("docs/_build/html", ""))


def test_a_missing_path_is_noticed():
  assert missing_paths("see `grpo_jax/core/kl.py` and `grpo_jax/core/old.py`.") == [
    "grpo_jax/core/old.py"
  ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
  made_by_the_build = ("api/", "notebooks/")
  for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
    if not target.startswith(("http", *made_by_the_build)):
      assert (page.parent / target).exists(), target


# --- the API reference ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api_pages():
  """Returns docs/api_pages.py as a module."""
  spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "api_pages.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_public_symbols_have_docstrings(api_pages):
  assert api_pages.undocumented() == []


def test_symbols_without_a_docstring_are_found(api_pages, monkeypatch):
  module = ModuleType("grpo_jax.planted")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  source = """
import dataclasses

def documented():
  'Returns.'

def bare(): pass

def _private(): pass

class Thing:
  'A thing.'

  def method(self): pass

  @property
  def value(self): pass

@dataclasses.dataclass
class Record:
  field: int = 0
"""
  exec(source, vars(module))
  monkeypatch.setattr(api_pages, "module_names", lambda: [module.__name__])
  assert api_pages.undocumented() == [
    "grpo_jax.planted",
    "grpo_jax.planted.Record",
    "grpo_jax.planted.Thing.method",
    "grpo_jax.planted.Thing.value",
    "grpo_jax.planted.bare",
  ]


def test_every_public_name_and_module_has_a_page(api_pages, tmp_path):
  api_pages.write_pages(tmp_path)
  page = (tmp_path / "grpo_jax.md").read_text(encoding="utf-8")
  documented = set(re.findall(r"^\.\. (?:auto\w+|py:data):: grpo_jax\.(\w+)$", page, re.MULTILINE))
  assert documented == set(grpo_jax.__all__) - {"testing"}
  index = (tmp_path / "modules" / "index.md").read_text(encoding="utf-8")
  for name in api_pages.module_names():
    assert f"({name}.md)" in index
    module = (tmp_path / "modules" / f"{name}.md").read_text(encoding="utf-8")
    assert f".. automodule:: {name}\n" in module
  for name, row in grpo_jax.ALGORITHMS.items():
    assert f"| `{name}` | " in page
    assert row.source in page


def test_pages_of_modules_that_are_gone_are_removed(api_pages, tmp_path):
  stale = tmp_path / "modules" / "grpo_jax.gone.md"
  stale.parent.mkdir()
  stale.write_text("# gone")
  api_pages.write_pages(tmp_path)
  assert not stale.exists()
