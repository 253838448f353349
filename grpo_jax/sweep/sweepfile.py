"""Keeps what a sweep is, in `sweep.json` of its directory."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax import config as configs
from grpo_jax.run import workdir as workdirs
from grpo_jax.sweep.directory import SWEEP, Directory


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Holds what all runs share, and what differs between them.

  Attributes:
    config: path of the experiment file.
    base: saved form of the config that all runs start from.
    runs: settings of each run by its name, with the runs of earlier commands.
  """

  config: str
  base: dict[str, Any]
  runs: dict[str, dict[str, str]]

  @property
  def fields(self) -> list[str]:
    """Names of the fields that differ between runs."""
    return sorted({field for settings in self.runs.values() for field in settings})


def joined(
  workdir: Directory,
  folder: Path,
  config: str,
  base: dict[str, Any],
  runs: Mapping[str, Mapping[str, str]],
  accept: Sequence[str] = (),
) -> Sweep:
  """Returns the sweep of a directory with the runs of a command added to it.

  Args:
    folder: what it holds now, from `Directory.seen`.
    accept: names of fields that may differ from those of earlier commands.

  Raises:
    WorkdirError: the directory holds a run, another sweep, or this one with another config.
  """
  new = Sweep(config, base, {name: dict(settings) for name, settings in runs.items()})
  if workdirs.read_config(folder) is not None:
    raise workdirs.WorkdirError(f"{workdir} is the directory of a run; use another --workdir")
  if not (folder / SWEEP).is_file():
    return new
  old = read(workdir, folder)
  if old.fields != new.fields or Path(old.config).name != Path(config).name:
    raise workdirs.WorkdirError(
      f"{workdir} holds another sweep: of {', '.join(old.fields)} with {old.config}, and this one "
      f"is of {', '.join(new.fields)} with {config}; use another --workdir"
    )
  before = configs.to_saved(configs.from_saved(old.base, f"{workdir}/{SWEEP}"))
  changes = [
    line
    for line in configs.differences(before, base)
    if (name := line.partition(":")[0]) not in (*accept, *new.fields)
    and not configs.may_change(name)
  ]
  if changes:
    raise workdirs.WorkdirError(
      f"{workdir} was begun with another config: {'; '.join(changes)}. Put that back, use another "
      "--workdir, or --accept the name of each field"
    )
  return dataclasses.replace(new, runs={**old.runs, **new.runs})


def read(workdir: Directory, folder: Path) -> Sweep:
  """Reads the sweep of a directory.

  Args:
    folder: what it holds now, from `Directory.seen`.

  Raises:
    WorkdirError: there is none, or it is damaged.
  """
  path = folder / SWEEP
  if not path.is_file():
    raise workdirs.WorkdirError(f"{workdir} holds no sweep: there is no {SWEEP}")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
    sweep = Sweep(**fields)
    if not (isinstance(sweep.config, str) and isinstance(sweep.base, dict) and sweep.runs):
      raise ValueError("it does not hold a config and runs")
    if not all(Path(name).name == name and isinstance(s, dict) for name, s in sweep.runs.items()):
      raise ValueError("it does not hold settings by the name of a directory")
    return sweep
  except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise workdirs.WorkdirError(
      f"{workdir}/{SWEEP} is damaged ({error}): remove it; the command of the sweep writes it again"
    ) from error


def write(workdir: Directory, sweep: Sweep) -> None:
  """Writes `sweep.json` whole."""
  workdir.write(json.dumps(dataclasses.asdict(sweep), indent=2) + "\n")
