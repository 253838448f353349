"""The pages of docs/ say what the code does: examples run, and paths exist."""

import doctest
import re
from pathlib import Path

import pytest

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
