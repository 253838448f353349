"""Plans well-known models on TPU slices that are not present, and writes docs/plans.md.

`python benchmarks/plans.py` compiles the rows that docs/plans.jsonl does not hold, a few minutes
each. It can be stopped and started again. `--minutes 60` starts no row after 60 minutes;
`--only 0.6B` and `--only v6e` choose rows. To plan one row in detail:

python -m grpo_jax.plan --config benchmarks/plans.py --topology v5e:4x4
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.config import default_config
from grpo_jax.plan.estimate import as_dict, make_plan
from grpo_jax.plan.hardware import GIB, TPUS, open_topology
from grpo_jax.plan.programs import open_programs

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "plans.jsonl"
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B")
# Name of a slice, its topology and its number of chips. The name of a v5p counts two cores a chip.
SLICES = (("v5e-16", "v5e:4x4", 16), ("v5e-64", "v5e:8x8", 64), ("v5p-16", "v5p:2x2x2", 8),
          ("v6e-16", "v6e:4x4", 16))  # fmt: skip
TENSOR = 4  # mesh.tensor of models above 4 B parameters on chips of less than 64 GiB; else 1
PROMPTS = 64

HEAD = """\
# Plans of well-known models

This page shows what `python -m grpo_jax.plan` predicts for TPU slices that were not present. The
TPU compiler compiled every program on a machine without a TPU. None of them has run on one. The
page is written by `python benchmarks/plans.py`.

A step is {prompts} prompts of 256 tokens x 8 completions of 1024 tokens, one update, no KL term
(`dapo`). Weights and Adam are in float32, activations and the sampler's weights in bfloat16. Layers
are recomputed in the backward pass. A micro-batch holds one prompt for each group of chips that
share a prompt (`train.micro_batches`). The mesh is `fsdp` x `tensor`. Memory is in GiB per chip.
Seconds are lower bounds, followed by the resource that sets the bound.

"""
TAIL = """
## The numbers

- **Memory** of a program is everything that a chip holds while the program runs, including arrays
  of other programs. Parameters, optimizer state, reference and KV cache follow from shapes and the
  sharding table; a test compares the first two with the buffers on a device, which are equal to the
  byte. Our sum of a program's arguments and the compiler's differ by 0.00 to 0.10 % in the rows
  above. Temporaries are the compiler's figure for the memory that it reserves, which may exceed the
  peak that it reports. A program fits if it compiles and the total is below the memory that a
  program may use on the chip (15.75 GiB on a v5e).
- **FLOPs** are those of the matmuls in the compiled program, with loop bodies multiplied by their
  trip counts (XLA's own analysis counts a scanned body once). The plan also prints `excess`, the
  FLOPs of all devices over those of the traced program. Above 1, devices repeat each other's work.
- **Bytes** read and written are an upper estimate. They are the operands and results of
  instructions that are neither fused nor kept in on-chip memory.
- **Sent** bytes are those of ring collectives. All links carry them at full rate at the same time.
  The start-up time of a collective is left out, so a program with many thousands of collectives is
  slower than its bound.
- A **bound** is the slowest of compute, memory and links at full rate. Every completion uses its
  whole budget of tokens. Rewards, tokenization, evaluations and resampling are left out of a step.
- The compiler ran with reduced effort (`--quick`). At that effort a program can need more memory,
  and more time on the chip, than at full effort.
"""
COLUMNS = ("model", "slice", "mesh", "state", "KV cache", "update", "sampling", "available", "fits",
           "time of update", "prefill", "all decoding", "step", "compiled in")  # fmt: skip


def get_config() -> ConfigDict:
  """Returns the settings of the first row."""
  c = default_config()
  c.model.source = MODELS[0]
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
  c.task.name = "letters"  # needs no data; the plan reads its stop strings
  c.rollout.prompts_per_step = PROMPTS
  c.rollout.group_size = 8
  c.rollout.prompt_length = 256
  c.rollout.completion_length = 1024
  c.algorithm.name = "dapo"
  c.train.micro_batches = 4
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c


def config_for(model: str, topology: str, chips: int) -> ConfigDict:
  """Returns the settings of one row."""
  large = model.endswith(("-7B-Instruct", "-8B"))
  c = get_config()
  c.model.source = model
  c.mesh.tensor = TENSOR if large and TPUS[topology.split(":")[0]].memory < 64 * GIB else 1
  c.train.micro_batches = max(PROMPTS * c.mesh.tensor // chips, 1)
  return configs.override(c, [])


def row(record: dict[str, Any]) -> str:
  """Formats one line of the table."""
  memory, work = record["memory"], record["work"]
  update, sample = memory["update"], memory["sample"]
  state = update["by_purpose"]["parameters"] + update["by_purpose"]["optimizer"]

  def seconds(name: str) -> str:
    if name not in work:
      return "-"
    w = work[name]
    return f"{w['seconds'] * w['times']:.2f} s, {w['limit']}"

  def gib(size: float) -> str:
    return f"{size / GIB:.1f}"

  step = record["step_seconds"]
  cells = (
    record["model"].split("/")[1], record["slice"],
    f"{record['mesh']['fsdp']} x {record['mesh']['tensor']}",
    gib(state), gib(sample["by_purpose"]["KV cache"]), gib(update["total"]), gib(sample["total"]),
    gib(record["available"]),
    "yes" if record["fits"] else "**no**", seconds("update"), seconds("prefill"), seconds("decode"),
    f"{step:.1f} s" if step else "-", f"{record['compile_seconds']:.0f} s",
  )  # fmt: skip
  return "| " + " | ".join(cells) + " |"


def page(records: list[dict[str, Any]]) -> str:
  """Returns the page."""
  order = [(model, name) for model in MODELS for name, _, _ in SLICES]
  records = sorted(records, key=lambda r: order.index((r["model"], r["slice"])))
  missing = [
    f"{model.split('/')[1]} on {name}"
    for model, name in order
    if (model, name) not in {(r["model"], r["slice"]) for r in records}
  ]
  lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(row, records)]
  text = HEAD.format(prompts=PROMPTS) + "\n".join(lines) + "\n"
  versions = sorted({r["versions"] for r in records})
  text += f"\nCompiled with {'; '.join(versions)}.\n" if versions else ""
  if missing:
    text += f"\nNot compiled yet: {', '.join(missing)}.\n"
  return text + TAIL


def main() -> None:
  """Compiles the missing rows and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--minutes", type=float, default=float("inf"), help="start no row after this many minutes"
  )
  parser.add_argument("--only", default="", help="part of a model's or a slice's name")
  arguments = parser.parse_args()
  start = time.monotonic()
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
  lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
  records = [json.loads(line) for line in lines]
  for model in MODELS:
    for name, topology, chips in SLICES:
      done = (model, name) in {(r["model"], r["slice"]) for r in records}
      late = time.monotonic() - start > 60 * arguments.minutes
      if done or late or arguments.only not in f"{model} {name}":
        continue
      print(f"{model} on {name}", flush=True)
      programs = open_programs(config_for(model, topology, chips), open_topology(topology))
      plan = make_plan(programs, log=print)
      records.append(as_dict(plan) | {"slice": name, "versions": versions})
      print(row(records[-1]), flush=True)
      RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records))
  (ROOT / "docs" / "plans.md").write_text(page(records))


if __name__ == "__main__":
  main()
