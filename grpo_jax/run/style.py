"""Gives every figure of the project the same look."""

import contextlib

# Colors that people with any color vision can tell apart (Okabe and Ito), and a gray.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
GREY = "#777777"

# Settings of matplotlib, as `plt.rcParams.update(style.SETTINGS)` takes them.
SETTINGS = {
  "figure.dpi": 110,
  "savefig.dpi": 130,
  "font.size": 10,
  "axes.titlesize": 10.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
}


def use() -> contextlib.AbstractContextManager[None]:
  """Returns a context in which figures are made and drawn with this look."""
  import matplotlib as mpl

  colors = mpl.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, GREY])
  return mpl.rc_context({**SETTINGS, "axes.prop_cycle": colors, "legend.frameon": False})
