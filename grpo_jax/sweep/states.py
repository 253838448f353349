"""Reads how far the runs of a sweep are; changes nothing in their directories."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax import config as configs
from grpo_jax.run import record
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.metrics import METRICS, read_metrics

NEW, UNFINISHED, FINISHED, FAILED = "not started", "unfinished", "finished", "failed"
# Fields on which the end of a run depends, by why it ended.
_ENDS = {
  "finished": ("steps", "epochs"),
  "stopped": ("steps", "epochs", "stop.after_hours", "stop.when"),
}


@dataclasses.dataclass(frozen=True)
class State:
  """Tells how far a run is.

  Attributes:
    kind: `not started`, `unfinished`, `finished` or `failed`.
    steps: number of steps with metrics.
    reason: why it ended; empty for one that finished all its steps or has not started.
  """

  kind: str
  steps: int = 0
  reason: str = ""

  def __str__(self) -> str:
    steps = f" after {self.steps} steps" if self.steps and self.kind != FINISHED else ""
    return f"{self.kind}{steps}{f' ({self.reason})' if self.reason else ''}"


def state_of(workdir: Path, config: Mapping[str, Any] | None = None) -> State:
  """Returns the state of the run in a directory.

  A run has finished if its last command did, with the same steps, epochs and conditions to stop.

  Args:
    workdir: the work directory of the run; may be missing.
    config: the saved form of the config that the run is wanted with; None takes its own.
  """
  with contextlib.suppress(workdirs.WorkdirError, configs.ConfigError, ValueError):
    saved = workdirs.read_config(workdir)
    if saved is None:
      return State(NEW)
    sessions = record.read(workdir)
    last = sessions[-1] if sessions else {}
    rows = read_metrics(workdir) if (workdir / METRICS).is_file() else []
    # The last row may be that of the evaluation after the last step.
    steps = max((int(row["step"]) + ("reward" in row) for row in rows), default=0)
    reason = last.get("reason")
    if reason in _ENDS and _alike(_ENDS[reason], saved, config):
      return State(FINISHED, steps, str(last.get("message", "")) if reason == "stopped" else "")
    if reason == "error":
      return State(FAILED, steps, str(last.get("message", last.get("error", ""))))
    text = {"signal": f"stopped by {last.get('signal')}", "killed": "killed"}.get(str(reason), "")
    return State(UNFINISHED, steps, text)
  return State(UNFINISHED, 0, "its files are damaged")


def _alike(
  names: Sequence[str], saved: Mapping[str, Any], config: Mapping[str, Any] | None
) -> bool:
  """Tells whether two saved configs agree in some fields; steps follow from epochs if set."""
  if config is None:
    return True
  names = [name for name in names if name != "steps" or not config["epochs"]]
  before = configs.to_saved(configs.from_saved(dict(saved)))
  return all(_get(before, name) == _get(config, name) for name in names)


def _get(tree: Mapping[str, Any], name: str) -> Any:
  for part in name.split("."):
    tree = tree[part]
  return tree
