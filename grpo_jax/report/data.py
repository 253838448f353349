"""Reads runs for the report, as plain data that becomes JSON.

Samples are read file by file when they are asked for; the page holds each file as a part of its
own, which it unpacks when somebody looks.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import addresses
from grpo_jax import config as configs
from grpo_jax.core.diagnosis import Finding
from grpo_jax.run import completions, record, workdir
from grpo_jax.run.health import CURVES, examine
from grpo_jax.run.metrics import METRICS, SAMPLES, read_metrics

LOOKS = 40  # prefixes of a run that are examined, to say since when a finding holds
SAMPLE_FILE = re.compile(r"(step|eval)_(\d+)\.jsonl")
LABEL = 160  # characters of a prompt in lists


@dataclasses.dataclass(frozen=True)
class Samples:
  """One file of samples.

  Attributes:
    kind: "step" or "eval".
    step: its number.
    path: of the file.
  """

  kind: str
  step: int
  path: Path


class RunData:
  """A run as its work directory has it now.

  Args:
    folder: the work directory.
    name: how the report calls it.

  Attributes:
    fields: the config by dotted name; empty without a config.json.
    rows: lines of metrics.jsonl.
    problems: what could not be read, in sentences.

  Raises:
    ValueError: the folder is no work directory.
  """

  def __init__(self, folder: str | Path, name: str) -> None:
    self.folder, self.name = Path(folder), name
    self.problems: list[str] = []
    if not self.folder.is_dir():
      raise ValueError(f"{folder} is not a folder: give the work directory of a run")
    saved = self._read(lambda: workdir.read_config(self.folder), None)
    has_metrics = (self.folder / METRICS).is_file()
    if saved is None and not has_metrics:
      raise ValueError(
        f"{folder} holds neither {workdir.CONFIG} nor {METRICS}: not the work directory of a run"
      )
    self.fields = dict(flat(saved or {}))
    self.rows = self._read(lambda: read_metrics(self.folder), []) if has_metrics else []
    self._loaded = self._read(
      lambda: configs.from_saved(saved, self.folder / workdir.CONFIG) if saved else None, None
    )

  def _read(self, read: Any, otherwise: Any) -> Any:
    """Returns what `read` returns; an error becomes a problem, and the value `otherwise`."""
    try:
      return read()
    except (OSError, ValueError) as error:
      self.problems.append(str(error))
      return otherwise

  def _of_completions(self) -> list[dict[str, Any]]:
    """Returns what the newest completions show; it is so in the last steps."""
    found = self._read(lambda: completions.examine(self.folder), [])
    return [as_plain(finding, _last_step(self.rows)) for finding in found]

  def summary(self) -> dict[str, Any]:
    """Returns everything but the samples."""
    sessions = self._read(lambda: record.read(self.folder), [])
    last = sessions[-1] if sessions else {}
    return {
      "name": self.name,
      "config": self.fields,
      "seedless": json.dumps({k: v for k, v in self.fields.items() if k != "seed"}, sort_keys=True),
      "metrics": series(self.rows),
      "steps": self.fields.get("steps"),
      "findings": [*findings(self.rows, self._loaded), *self._of_completions()],
      "provenance": {
        **{name: last.get(name) for name in ("start", "end", "reason", "devices")},
        **{f"memory_{where}": n for where, n in (last.get("peak_memory") or {}).items()},
        **{f"memory/{part}": n for part, n in (last.get("memory") or {}).items()},
        "sessions": len(sessions),
        "commit": (last.get("git") or {}).get("commit"),
        **(last.get("versions") or {}),
      },
      "problems": self.problems,
    }


def sample_files(folder: str | Path) -> list[Samples]:
  """Returns the files of samples of a run by step, an evaluation before the step after it."""
  folder = Path(folder) / SAMPLES
  found = [
    Samples(match[1], int(match[2]), path)
    for path in (folder.iterdir() if folder.is_dir() else [])
    if (match := SAMPLE_FILE.fullmatch(path.name))
  ]
  return sorted(found, key=lambda s: (s.step, s.kind))


def _last_step(rows: Sequence[Mapping[str, Any]]) -> int:
  """Returns the number of the last training step of some rows."""
  return max((row["step"] for row in rows if "reward" in row), default=0)


def named(folders: Sequence[str]) -> list[RunData]:
  """Reads runs, each under a name of its own: the end of its path, as long as it has to be.

  Raises:
    ValueError: a folder is no work directory, or is given twice.
  """
  folders = [addresses.local(folder, "the run") for folder in folders]
  paths = [folder.resolve() for folder in folders]
  if len(set(paths)) < len(paths):
    twice = next(folder for folder, path in zip(folders, paths) if paths.count(path) > 1)
    raise ValueError(f"{twice} is given twice: give each run once")
  names = [path.name for path in paths]
  for depth in range(2, 9):
    if len(set(names)) == len(names):
      break
    names = ["/".join(path.parts[-depth:]) for path in paths]
  return [RunData(folder, name) for folder, name in zip(folders, names)]


def flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the fields of a config by dotted name.

  Example:
    >>> dict(flat({"a": {"b": 1, "c": {}}, "d": [2]}))
    {'a.b': 1, 'a.c': '{}', 'd': '[2]'}
  """
  for name, value in fields.items():
    if isinstance(value, Mapping) and value:
      yield from flat(value, f"{prefix}{name}.")
    elif isinstance(value, Mapping | list | tuple):
      yield f"{prefix}{name}", json.dumps(value)
    else:
      yield f"{prefix}{name}", value


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
  """Returns (steps, values) of each metric, without its nulls.

  Example:
    >>> series([{"step": 0, "loss": 0.5}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.25}])
    {'loss': [[0, 2], [0.5, 0.25]]}
  """
  columns: dict[str, list[list[float]]] = {}
  for row in rows:
    for name, value in row.items():
      if name == "step" or not isinstance(value, int | float) or not math.isfinite(value):
        continue
      steps, values = columns.setdefault(name, [[], []])
      steps.append(row["step"])
      values.append(value)
  return columns


def findings(rows: Sequence[dict[str, Any]], config: ConfigDict | None) -> list[dict[str, Any]]:
  """Returns what the doctor finds at the end of a run, and since which step it has been so."""
  if config is None:
    return []
  now = examine(rows, config)
  if not now:
    return []
  since = dict.fromkeys((f.name for f in now), rows[-1]["step"])
  holds = set(since)
  for end in sorted({round(len(rows) * i / LOOKS) for i in range(1, LOOKS)} - {0}, reverse=True):
    holds &= {f.name for f in examine(rows[:end], config)}
    since |= dict.fromkeys(holds, rows[end - 1]["step"])
    if not holds:
      break
  return [as_plain(f, since[f.name]) for f in now]


def as_plain(finding: Finding, since: int) -> dict[str, Any]:
  """Returns a finding as plain data, with the metric on whose curve it is drawn."""
  fields = {f: getattr(finding, f) for f in ("name", "seen", "reason", "advice", "confidence")}
  return fields | {"since": since, "metric": CURVES.get(finding.name)}


# --- samples --------------------------------------------------------------------------------------


def groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns completions by prompt: what they share once, and the completions in their order.

  Example:
    >>> [group] = groups([{"prompt": "1+1=", "key": "a", "completion": c} for c in "23"])
    >>> group["prompt"], group["completions"]
    ('1+1=', [{'completion': '2'}, {'completion': '3'}])
  """
  found: dict[str, dict[str, Any]] = {}
  for row in rows:
    shared = {name: row[name] for name in ("prompt", "key", "answer") if name in row}
    which = identity(row)
    group = found.setdefault(which, {"id": which, **shared, "completions": []})
    own = {name: v for name, v in row.items() if name not in (*shared, "columns")}
    group["completions"].append(own)
  return list(found.values())


def identity(row: Mapping[str, Any]) -> str:
  """Returns a short text that tells the prompts of runs apart."""
  text = json.dumps([row.get("key"), row["prompt"]], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def label(prompt: Any) -> str:
  """Returns the end of a prompt, to list it; that of its last message for a chat.

  Example:
    >>> label([{"role": "user", "content": "What is 1 + 1?"}])
    'What is 1 + 1?'
  """
  if not isinstance(prompt, str):
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    prompt = str(last.get("content", "")) if isinstance(last, dict) else str(prompt)
  text = prompt.strip()
  return text if len(text) <= LABEL else "…" + text[-LABEL:]
