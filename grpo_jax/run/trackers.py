"""Hands the metrics of a run on to experiment trackers: TensorBoard, Weights & Biases, Trackio.

`metrics.jsonl` is the record of a run; trackers show it elsewhere, under the same names. A tracker
that fails is reported once and left out: it never stops a run.
"""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_jax import extras
from grpo_jax.run.tensorboard import TensorBoardWriter
from grpo_jax.run.workdir import write_whole

IDS = "trackers.json"  # the ids of a run at its trackers, so that a resumed run is the same one
PROJECT = "grpo_jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise
SHOWN = ("prompt", "completion", "reward", "rewards", "advantage", "accuracy", "length")
MOST = 256  # completions of a table


@dataclasses.dataclass(frozen=True)
class Session:
  """Holds what a tracker is told about a run.

  Attributes:
    workdir: of the run; its name is the name of the run.
    start_step: first step that will be written.
    about: the config, and where the run comes from: git commit, versions, digests of its files.
  """

  workdir: Path
  start_step: int
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def id(self, tracker: str) -> str:
    """Returns the id of this run at a tracker, the same one after a resume."""
    path = self.workdir / IDS
    ids = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
      ids = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(ids, dict) or not isinstance(ids.get(tracker), str):
      ids = {**(ids if isinstance(ids, dict) else {}), tracker: secrets.token_hex(6)}
      write_whole(path, json.dumps(ids) + "\n")
    return ids[tracker]


class Tracker(Protocol):
  """Takes the metrics and samples of a run."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes the metrics of a step."""

  def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Takes completions of a step, with prompts and rewards."""

  def close(self) -> None:
    """Ends the run at the tracker."""


class Wandb:
  """Logs to Weights & Biases; `WANDB_MODE=offline` keeps everything in the work directory."""

  def __init__(self, session: Session) -> None:
    import wandb

    self._table = wandb.Table
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT),
      name=session.workdir.name,
      id=session.id("wandb"),
      resume="allow",
      dir=str(session.workdir),
      config=dict(session.about),
      settings=wandb.Settings(silent=True, console="off"),
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs the metrics of a step; a step that was logged before an interruption stays as it was."""
    self._run.log(dict(metrics), step=step)

  def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Logs completions as a table."""
    columns, rows = as_table(samples)
    self._run.log({"samples": self._table(columns=columns, data=rows)}, step=step)

  def close(self) -> None:
    """Finishes the run."""
    self._run.finish()


class Trackio:
  """Logs to Trackio, whose files are on this machine (`TRACKIO_DIR`)."""

  def __init__(self, session: Session) -> None:
    with _quiet():
      import trackio

      # A run of this name goes on after a resume; the id tells folders of the same name apart.
      self._run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{session.workdir.name}-{session.id('trackio')[:6]}",
        resume="allow",
        config=json.loads(json.dumps(session.about, default=str)),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
      )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs the metrics of a step."""
    self._run.log(dict(metrics), step=step)

  def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Logs completions as text, one line per completion."""
    columns, rows = as_table(samples)
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    self._run.log({"samples": "\n".join(lines)}, step=step)

  def close(self) -> None:
    """Finishes the run."""
    with _quiet():
      self._run.finish()


TRACKERS: dict[str, Callable[[Session], Tracker]] = {
  "tensorboard": lambda session: TensorBoardWriter(
    session.workdir / "tensorboard", session.start_step
  ),
  "wandb": Wandb,
  "trackio": Trackio,
}


def check(names: Sequence[str]) -> None:
  """Checks the names of trackers, and that their packages are installed.

  Raises:
    ValueError: a name is unknown, or twice in the list.
    ModuleNotFoundError: a package is missing; the message names its extra.

  Example:
    >>> check(["tensorboard", "mlflow"])
    Traceback (most recent call last):
    ValueError: log.trackers: unknown tracker 'mlflow'; known: tensorboard, wandb, trackio
  """
  for name in names:
    if name not in TRACKERS:
      raise ValueError(f"log.trackers: unknown tracker {name!r}; known: {', '.join(TRACKERS)}")
    if list(names).count(name) > 1:
      raise ValueError(f"log.trackers names {name!r} twice")
    if name in extras.MODULES:
      extras.require(name, f"log.trackers={name}")


class Guarded:
  """A tracker whose errors are reported once, after which it is left out.

  Args:
    name: a key of `TRACKERS`.
    session: the run.
  """

  def __init__(self, name: str, session: Session) -> None:
    self._name, self._tracker = name, None
    with self._reported():
      self._tracker = TRACKERS[name](session)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Hands on the metrics of a step."""
    with self._reported():
      if self._tracker:
        self._tracker.write(step, metrics)

  def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Hands on completions of a step."""
    with self._reported():
      if self._tracker:
        self._tracker.write_samples(step, samples)

  def close(self) -> None:
    """Ends the run at the tracker. A second call does nothing."""
    tracker, self._tracker = self._tracker, None
    with self._reported():
      if tracker:
        tracker.close()

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # whatever a foreign package raises: the run goes on
      self._tracker = None
      print(
        f"warning: log.trackers: {self._name} failed and is left out from here on: "
        f"{type(error).__name__}: {error}",
        file=sys.stderr,
        flush=True,
      )


def as_table(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
  """Returns columns and rows of completions; what is no number or text is shown as JSON.

  Example:
    >>> as_table([{"prompt": "1+1=", "completion": "2", "reward": 1.0, "key": "7"}])
    (['prompt', 'completion', 'reward'], [['1+1=', '2', 1.0]])
  """
  columns = [name for name in SHOWN if any(name in sample for sample in samples)]

  def cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else json.dumps(value)

  return columns, [[cell(sample.get(name)) for name in columns] for sample in samples[:MOST]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps a package from printing into the progress of a run."""
  with contextlib.redirect_stdout(io.StringIO()):
    yield
