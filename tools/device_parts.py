"""Measures one thing on the devices of this machine and prints it as JSON lines.

python -m tools.device_parts PART [--dry-run] [--folder DIR]; `tools.device_check` runs all parts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import backend

import grpo_jax
from grpo_jax import config as configs
from grpo_jax import train
from grpo_jax.plan.estimate import as_dict, make_plan
from grpo_jax.plan.hardware import open_topology
from grpo_jax.plan.programs import open_programs
from grpo_jax.run import record
from grpo_jax.run.metrics import read_metrics

Rows = Iterator[dict[str, Any]]
DEMO = "experiments/smollm2_addition.py"
TINY = "experiments/tiny.py"
SMALL = [
  "task.settings.eval_size=8", "rollout.group_size=4", "rollout.completion_length=4",
  "log.trackers=()", "log.samples=0",
]  # fmt: skip


def machine(dry_run: bool, folder: Path) -> Rows:
  """Describes the machine and its versions."""
  devices = jax.devices()
  stats = devices[0].memory_stats() or {}
  yield {
    "what": "machine",
    "platform": devices[0].platform,
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "device memory, GiB": round(stats.get("bytes_limit", 0) / 2**30, 1) or None,
    "cores": os.cpu_count(),
    "memory, GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    "system": platform.platform(),
    "python": platform.python_version(),
    "backend": backend.get_backend().platform_version.splitlines()[0],
    "grpo_jax": grpo_jax.__version__,
    **record.versions(),
  }


def precision(dry_run: bool, folder: Path) -> Rows:
  """Compares log-probs of each precision of matmuls with float64 on the host."""
  rows, width, vocab = (16, 64, 256) if dry_run else (512, 2048, 32768)
  rng = np.random.default_rng(0)
  for dtype in ("float32", "bfloat16"):
    hidden = np.asarray(jnp.asarray(rng.normal(size=(rows, width)), dtype), np.float64)
    head = rng.normal(size=(width, vocab)) / width**0.5
    head = np.asarray(jnp.asarray(head, dtype), np.float64)
    tokens = rng.integers(0, vocab, rows)
    logits = hidden @ head
    largest = logits.max(axis=-1)
    total = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
    expected = logits[np.arange(rows), tokens] - total
    for name in ("highest", "high", "default"):
      with jax.default_matmul_precision(name):
        given = [jnp.asarray(a, dtype) for a in (hidden, head)]
        logp, _ = jax.jit(grpo_jax.head_logprobs)(*given, jnp.asarray(tokens))
      errors = np.abs(np.asarray(logp, np.float64) - expected)
      yield {
        "what": "log-probs against float64",
        "dtype": dtype,
        "precision": name,
        "largest error, nats": float(f"{errors.max():.3g}"),
        "mean error, nats": float(f"{errors.mean():.3g}"),
      }


def forecast(dry_run: bool, folder: Path) -> Rows:
  """Plans a run for these devices, runs some steps of it, and compares memory and time."""
  name, steps = (TINY, 3) if dry_run else (DEMO, 8)
  more = SMALL if dry_run else ["rollout.prompts_per_step=64", "log.trackers=()", "log.samples=0"]
  overrides = [f"--config.{text}" for text in (*more, f"steps={steps}", "checkpoint.every=0")]
  config = configs.load(name, overrides)
  plan = as_dict(make_plan(open_programs(config, open_topology("local"))))
  peak = max(memory["total"] for memory in plan["memory"].values())
  row = {"what": "forecast", "experiment": name, "memory, MiB": round(peak / 2**20, 1)}
  if plan["step_seconds"] is not None:
    row["least time of a step, s"] = float(f"{plan['step_seconds']:.3g}")
  yield row
  train.run(config, folder / "forecast")
  times = [row["step_time"] for row in read_metrics(folder / "forecast") if "step_time" in row]
  measured = statistics.median(times[2:] or times[-1:])  # the first ones compile
  peaks = record.peak_memory()
  row = {"what": "measured", "experiment": name, "time of a step, s": float(f"{measured:.3g}")}
  if "device" in peaks:
    row["peak memory of a device, MiB"] = round(peaks["device"] / 2**20, 1)
    row["forecast / peak"] = round(peak / peaks["device"], 3)
  if plan["step_seconds"]:
    row["time / least time"] = round(measured / plan["step_seconds"], 2)
  yield row


def demo(dry_run: bool, folder: Path) -> Rows:
  """Trains the demo, or as much of it as its time allows."""
  name, more = (TINY, [*SMALL, "steps=2"]) if dry_run else (DEMO, ["stop.after_hours=0.02"])
  overrides = [f"--config.{text}" for text in (*more, "checkpoint.every=0")]
  train.run(configs.load(name, overrides), folder / "demo")
  rows = read_metrics(folder / "demo")
  evaluations = [row for row in rows if "eval/accuracy" in row]
  times = [row["step_time"] for row in rows if "step_time" in row]
  yield {
    "what": "demo",
    "experiment": name,
    "steps": len(times),
    "accuracy before": evaluations[0]["eval/accuracy"],
    "accuracy after": evaluations[-1]["eval/accuracy"],
    "time of a step, s": float(f"{statistics.median(times):.3g}"),
    "tokens per second": round(statistics.median(row["tokens_per_second"] for row in rows
                                                 if "tokens_per_second" in row)),
  }  # fmt: skip


PARTS: dict[str, Callable[[bool, Path], Rows]] = {
  "machine": machine, "precision": precision, "forecast": forecast, "demo": demo,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  """Runs a part and returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m tools.device_parts", description=__doc__)
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("--dry-run", action="store_true", help="the smallest sizes")
  parser.add_argument("--folder", type=Path, default=Path("runs/device-check"))
  arguments = parser.parse_args(argv)
  for row in PARTS[arguments.part](arguments.dry_run, arguments.folder):
    print(json.dumps(row), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
