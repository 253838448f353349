"""Each notebook runs from top to bottom and prints its stored outputs.

The cells run in a plain namespace, without Jupyter; `assert`s in them are the notebook's own
checks. Printed text must equal the stored text. A cell whose text differs from run to run (times,
for example) has the tag `varies`.
"""

import contextlib
import io
import json
import os
import warnings
from pathlib import Path
from unittest import mock

import jax
import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def code_cells(path):
  """Returns the code cells of a notebook, in order."""
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def stored_text(cell):
  """Returns the printed text that is stored with a cell."""
  return "".join("".join(x["text"]) for x in cell["outputs"] if x["output_type"] == "stream")


@contextlib.contextmanager
def plain_session():
  """Yields a namespace, and undoes what a notebook sets in jax, matplotlib and the environment."""
  x64 = jax.config.jax_enable_x64
  with warnings.catch_warnings(), mpl.rc_context(), mock.patch.dict(os.environ):
    warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
    mpl.use("Agg")
    try:
      yield {"__name__": "notebook"}
    finally:
      mpl.pyplot.close("all")
      jax.config.update("jax_enable_x64", x64)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_prints_the_stored_text(path):
  with plain_session() as namespace:
    for number, cell in enumerate(code_cells(path), 1):
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
      if "varies" not in cell["metadata"].get("tags", []):
        assert printed.getvalue() == stored_text(cell), f"stored output of cell {number} is old"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_one_run(path):
  cells = code_cells(path)
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  for cell in cells:
    kinds = [x["output_type"] for x in cell["outputs"]]
    assert "error" not in kinds
    assert not any(x.get("name") == "stderr" for x in cell["outputs"])
    if "plt.show()" in "".join(cell["source"]):
      assert any("image/png" in x.get("data", {}) for x in cell["outputs"])


def test_there_are_notebooks():
  expected = {
    "01_grpo_from_reinforce",
    "02_your_own_loop",
    "03_your_loss_under_the_microscope",
    "04_looking_into_rollouts",
    "05_invent_an_algorithm",
    "06_from_laptop_to_pod",
    "07_an_environment_and_a_tool",
    "08_one_family",
  }
  assert expected <= {path.stem for path in NOTEBOOKS}
