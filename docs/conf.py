"""Builds the documentation site: `make docs`.

Nothing on a page is loaded from outside: the theme, the search index and MathJax are files of the
site. Warnings are errors, and so is a public symbol without a docstring.
"""

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import api_pages  # noqa: E402
from sphinx.domains.python import PyObject  # noqa: E402
from sphinx.errors import ExtensionError  # noqa: E402

import grpo_jax  # noqa: E402

project = "grpo_jax"
author = "the grpo_jax authors"
copyright = author
release = version = grpo_jax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.mathjax",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write names in single backticks
add_module_names = False
python_display_short_literal_types = True
maximum_signature_line_length = 80

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the stored outputs are the ones that the tests check

# Two modules may define one name: a type written by its last part is then linked to one of them.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature of a dataclass has them
napoleon_custom_sections = [("Errors", "returns_style")]

html_theme = "furo"
html_title = "grpo_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# One file that draws formulas as SVG, from the package `django-static-mathjax`, which holds MathJax
# and nothing else (it does not need Django).
MATHJAX = "mathjax/static/mathjax/es5/tex-svg.js"
mathjax_path = "mathjax.js"
mathjax3_config = {"options": {"enableMenu": False}}


def _write_inputs(app) -> None:
  """Writes the pages of the API reference and copies the notebooks into the source folder."""
  missing = api_pages.undocumented()
  if missing and app.config.check_docstrings:
    raise ExtensionError(f"{len(missing)} public symbols without a docstring: {', '.join(missing)}")
  api_pages.write_pages(DOCS / "api")
  target = DOCS / "notebooks"
  shutil.rmtree(target, ignore_errors=True)  # none that was renamed
  target.mkdir()
  for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    shutil.copyfile(notebook, target / notebook.name)


def _copy_mathjax(app, error) -> None:
  if error is None and app.builder.format == "html":
    files = importlib.metadata.files("django-static-mathjax")
    source = next(file for file in files if file.as_posix() == MATHJAX).locate()
    shutil.copyfile(source, Path(app.outdir) / "_static" / mathjax_path)


def _mend_links(app, document, content) -> None:
  """Turns links to source files into links to their API pages; notebooks lie one folder deeper."""
  up = "../" * document.count("/")
  text = content[0].replace("](../docs/", "](../")
  content[0] = re.sub(
    r"\]\((?:\.\./)*(grpo_jax/[\w/]+)\.py\)",
    lambda match: f"]({up}api/modules/{match[1].replace('/', '.')}.md)",
    text,
  )


# Arguments may be arrays of jax or of NumPy, which makes each type twice as long as it need be.
_ARRAY = re.compile(r"(?:~?jaxtyping\.)?(\w+)\[(?:~?jax(?:lib\._jax)?\.)?Array, ('[^']*')\]")
_UNION = re.compile(r"(\w+\[)Array(, '[^']*'\]) \| (?:~?jaxtyping\.)?\1(?:~?numpy\.)?ndarray\2")
# A function as a default, without its address.
_FUNCTION = re.compile(r"<function (?:\w+\.)*(\w+)[^>]*>")


def _shorten_signature(app, what, name, obj, options, signature, returns):
  def short(text):
    if text:
      text = _FUNCTION.sub(r"\1", _ARRAY.sub(r"\1[Array, \2]", text))
      text = _UNION.sub(r"\1Array\2", text).replace("jaxlib._jax.Array", "Array")
    return text

  return short(signature), short(returns)


# A name or formula in single backticks (perhaps over a line's end), or a character that
# reStructuredText would read as markup.
_MARKUP = re.compile(r"``.+?``|(?<!`)`([^`]+)`(?!`)|\*(?! - )|\||(?<=\w)_(?!\w)", re.DOTALL)


def _literal(match: re.Match) -> str:
  text = match[0]
  if text.startswith("``"):
    return text
  if not text.startswith("`"):
    return f"\\{text}"
  before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
  glue = ("\\ " if re.match(r"\w", before) else "", "\\ " if re.match(r"\w", after) else "")
  return f"{glue[0]}``{' '.join(match[1].split())}``{glue[1]}"


# A Markdown table: a head, a line of dashes, and rows, with one indentation.
_TABLE = re.compile(r"^( *)\|.*\|\n\1\|[-| ]+\|\n(?:\1\|.*\|(?:\n|\Z))+", re.MULTILINE)


def _list_table(match: re.Match) -> str:
  indent, (head, _, *rows) = match[1], match[0].strip().splitlines()
  lines = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
  for row in [head, *rows]:
    first, *rest = (cell.strip() for cell in row.strip().strip("|").split("|"))
    lines += [f"{indent}   * - {first}", *(f"{indent}     - {cell}" for cell in rest)]
  return "\n".join(["", *lines, "", ""])


def _literal_docstring(app, what, name, obj, options, lines) -> None:
  """Writes a docstring's single backticks as literals, and escapes the characters of formulas."""
  blocks = re.split(r"(^\s*>>>.*?(?:\n\s*\n|\Z))", "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
  blocks[::2] = [_MARKUP.sub(_literal, _TABLE.sub(_list_table, block)) for block in blocks[::2]]
  lines[:] = "".join(blocks).split("\n")


def setup(app) -> None:
  """Connects this file's functions to Sphinx's events."""
  for field in PyObject.doc_field_types:
    if field.name == "variable":
      field.label = "Attributes"  # what the docstrings call them; Sphinx says "Variables"
  app.add_config_value("check_docstrings", True, "", [bool])
  app.connect("builder-inited", _write_inputs)
  app.connect("autodoc-process-signature", _shorten_signature)
  # Before napoleon (priority 500), which adds markup of its own.
  app.connect("autodoc-process-docstring", _literal_docstring, priority=400)
  app.connect("source-read", _mend_links)
  app.connect("build-finished", _copy_mathjax)
