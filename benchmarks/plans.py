"""Plans of well-known models on TPU slices that are not here: writes docs/plans.md.

`python benchmarks/plans.py` compiles what docs/plans.jsonl does not hold yet, a few minutes a row,
and can be stopped and started again; `--minutes 60` begins no row after that; `--only 0.6B` and
`--only v6e` choose rows. One row, with everything the plan says:

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

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "plans.jsonl"
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B")
# The name that a slice is asked for by, its shape and its chips; v5p counts two cores a chip.
SLICES = (("v5e-16", "v5e:4x4", 16), ("v5e-64", "v5e:8x8", 64), ("v5p-16", "v5p:2x2x2", 8),
          ("v6e-16", "v6e:4x4", 16))  # fmt: skip
TENSOR = 4  # of models above 4 B parameters on chips of less than 64 GiB; else 1
PROMPTS = 64

HEAD = """\
# Plans of well-known models

What `python -m grpo_jax.plan` says about runs on slices that were not there: every program was
compiled for them by the TPU compiler, on a machine without a TPU. None of it has run on one.
Written by `python benchmarks/plans.py`.

A step is {prompts} prompts of 256 tokens x 8 completions of 1024 tokens, one update, no KL term
(`dapo`); weights and Adam in float32, activations and the sampler's weights in bfloat16, layers
recomputed in the backward pass, one prompt at a time for each group of chips that share a prompt
(`train.micro_batches`). Mesh: `fsdp` x `tensor`. Memory is GiB per chip, seconds are lower bounds
with what they wait for.

"""
TAIL = """
## What the numbers are

- **Memory** of a program is all that lies on a chip while it runs, what another program left there
  included. Parameters, optimizer state, reference and KV cache follow from shapes and the sharding
  table; a test compares the first two with the buffers on a device: equal to the byte. Our sum of
  a program's arguments and the compiler's are 0.00 to 0.10 % apart in the rows above. Temporaries
  are the compiler's figure, all that it reserves, which may be more than the peak that it reports.
  A program fits if the compiler takes it and the sum is below what a program may use of the chip
  (15.75 GiB of a v5e).
- **Operations** are those of the matrix products in the compiled program, loops multiplied out
  (XLA's own analysis counts a scanned body once). The plan also prints `excess`: operations of all
  devices over those of the traced program. Above 1, devices repeat each other's work.
- **Bytes** read and written are an estimate from above, from the operands and results of what the
  compiler did not fuse and does not keep on the chip.
- **Sent** is what a device sends in ring collectives; the links carry it at their full rate, all of
  them at once. The time that a collective takes to start is not in it, and a program with many
  thousands of them is slower than its bound.
- A **bound** is the slowest of operations, memory and links at full rate. Every completion is taken
  to use its whole budget of tokens. Rewards, tokenizing, evaluations and resamples are not in a step.
- The compiler ran with reduced effort (`--quick`), and can then need more memory, and more time
  on the chip, than at full effort.
"""
COLUMNS = ("model", "slice", "mesh", "state", "KV cache", "update", "sampling", "of", "fits",
           "update takes", "prefill", "all decoding", "step", "compiled in")  # fmt: skip


def get_config() -> ConfigDict:
  c = default_config()
  c.model.source = MODELS[0]
  c.model.dtype = "bfloat16"
  c.model.remat = "layers"
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
  """The settings of one row."""
  large = model.endswith(("-7B-Instruct", "-8B"))
  c = get_config()
  c.model.source = model
  c.mesh.tensor = TENSOR if large and TPUS[topology.split(":")[0]].memory < 64 * GIB else 1
  c.train.micro_batches = max(PROMPTS * c.mesh.tensor // chips, 1)
  return configs.override(c, [])


def row(record: dict[str, Any]) -> str:
  """One line of the table."""
  memory, work = record["memory"], record["work"]
  kinds = memory["update"]["kinds"]

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
    gib(kinds["parameters"] + kinds["optimizer"]), gib(memory["sample"]["kinds"]["KV cache"]),
    gib(memory["update"]["total"]), gib(memory["sample"]["total"]), gib(record["available"]),
    "yes" if record["fits"] else "**no**", seconds("update"), seconds("prefill"), seconds("decode"),
    f"{step:.1f} s" if step else "-", f"{record['compile_seconds']:.0f} s",
  )  # fmt: skip
  return "| " + " | ".join(cells) + " |"


def page(records: list[dict[str, Any]]) -> str:
  """The document."""
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
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=float("inf"))
  parser.add_argument("--only", default="")
  arguments = parser.parse_args()
  began = time.monotonic()
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
  lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
  records = [json.loads(line) for line in lines]
  for model in MODELS:
    for name, topology, chips in SLICES:
      done = (model, name) in {(r["model"], r["slice"]) for r in records}
      late = time.monotonic() - began > 60 * arguments.minutes
      if done or late or arguments.only not in f"{model} {name}":
        continue
      print(f"{model} on {name}", flush=True)
      made = make_plan(config_for(model, topology, chips), open_topology(topology), say=print)
      records.append(as_dict(made) | {"slice": name, "versions": versions})
      print(row(records[-1]), flush=True)
      RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records))
  (ROOT / "docs" / "plans.md").write_text(page(records))


if __name__ == "__main__":
  main()
