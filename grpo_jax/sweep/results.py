"""Compares the runs of a sweep: the mean of a metric over seeds, with its standard error."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.run.metrics import METRICS, read_metrics
from grpo_jax.sweep.grid import SEED, short_names
from grpo_jax.sweep.states import FINISHED, State


@dataclasses.dataclass(frozen=True)
class Row:
  """Holds the runs that differ in their seed only.

  Attributes:
    settings: value of each field but the seed.
    runs: number of runs, finished or not.
    values: last value of the metric by seed, of the finished runs that have one.
  """

  settings: dict[str, str]
  runs: int
  values: dict[str, float]

  @property
  def mean(self) -> float | None:
    """Mean over seeds; None without a value."""
    return statistics.fmean(self.values.values()) if self.values else None

  @property
  def standard_error(self) -> float | None:
    """Standard error of the mean, from the deviation (ddof=1) over seeds; None below two."""
    n = len(self.values)
    return statistics.stdev(self.values.values()) / math.sqrt(n) if n > 1 else None


def last_value(workdir: Path, metric: str) -> float | None:
  """Returns the last number that a run wrote for a metric; None if there is none."""
  rows = read_metrics(workdir) if (workdir / METRICS).is_file() else []
  values = [row[metric] for row in rows if row.get(metric) is not None]
  return values[-1] if values else None


def metrics_of(workdirs: Sequence[Path]) -> list[str]:
  """Returns the names of all metrics of some runs, sorted."""
  files = [workdir for workdir in workdirs if (workdir / METRICS).is_file()]
  return sorted({name for workdir in files for row in read_metrics(workdir) for name in row})


def rows_of(
  runs: Mapping[str, Mapping[str, str]], states: Mapping[str, State], values: Mapping[str, Any]
) -> list[Row]:
  """Groups runs by their settings without the seed, in the order in which they first occur.

  Args:
    runs: settings of each run by its name.
    states: of each run.
    values: of the metric, by run; None where there is none.

  Example:
    >>> runs = {"a": {"seed": "0"}, "b": {"seed": "1"}, "c": {"seed": "2"}}
    >>> states = {"a": State(FINISHED), "b": State(FINISHED), "c": State("unfinished")}
    >>> [row] = rows_of(runs, states, {"a": 0.5, "b": 0.75, "c": 0.1})
    >>> row.mean, row.standard_error, row.runs
    (0.625, 0.125, 3)
  """
  groups: dict[tuple, Row] = {}
  for name, settings in runs.items():
    rest = {field: value for field, value in settings.items() if field != SEED}
    row = groups.setdefault(tuple(rest.items()), Row(rest, 0, {}))
    own = dict(row.values)
    if states[name].kind == FINISHED and values[name] is not None:
      own[settings.get(SEED, "")] = values[name]
    groups[tuple(rest.items())] = Row(rest, row.runs + 1, own)
  return list(groups.values())


def table(rows: Sequence[Row], metric: str) -> str:
  """Formats rows as text: settings, finished runs, mean ± standard error, values by seed.

  Example:
    >>> print(table([Row({"algorithm.name": "grpo"}, 2, {"0": 0.5, "1": 0.75})], "eval/accuracy"))
    name  runs  eval/accuracy  by seed
    grpo  2/2   0.625 ± 0.125  0: 0.5, 1: 0.75
  """
  short = short_names(list(rows[0].settings) if rows else [])
  seeds = any(seed for row in rows for seed in row.values)
  lines = [[*short.values(), "runs", metric, *(["by seed"] if seeds else [])]]
  for row in rows:
    each = ", ".join(f"{seed}: {value:.4g}" for seed, value in row.values.items())
    cells = [*row.settings.values(), f"{len(row.values)}/{row.runs}", _mean(row)]
    lines.append([*cells, *([each] if seeds else [])])
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
  )


def _mean(row: Row) -> str:
  """Formats a mean with as many digits as its standard error has two of."""
  if row.mean is None:
    return "-"
  error = row.standard_error
  if error is None:
    return f"{row.mean:.4g}"
  if error == 0 or not math.isfinite(error):
    return f"{row.mean:.4g} ± {error:.2g}"
  digits = max(3 if abs(row.mean) < 10 else 0, 1 - math.floor(math.log10(error)))
  if digits > 8:
    return f"{row.mean:.6g} ± {error:.2g}"
  return f"{row.mean:.{digits}f} ± {error:.{digits}f}"


def to_json(
  runs: Mapping[str, Mapping[str, str]],
  metric: str,
  states: Mapping[str, State],
  values: Mapping[str, float | None],
  rows: Sequence[Row],
) -> dict[str, Any]:
  """Returns runs and table as JSON can hold them."""
  return {
    "metric": metric,
    "runs": {
      name: {
        "settings": dict(settings),
        "state": states[name].kind,
        "steps": states[name].steps,
        "reason": states[name].reason,
        "value": values[name],
      }
      for name, settings in runs.items()
    },
    "rows": [
      {
        "settings": row.settings,
        "runs": row.runs,
        "values": row.values,
        "mean": row.mean,
        "standard_error": row.standard_error,
      }
      for row in rows
    ],
  }
