"""Measures the memory of a GRPO step: XLA's plan for the update, and the peak of the process.

    python -m benchmarks.memory --setting chat --peer trl

The first table is `memory_analysis()` of the compiled update: its arguments (weights, optimizer
state, batch), the part of them that is donated to the results, and its temporary memory. The second
table is the peak resident memory of the whole process after some steps, with compilation, tokenizer
and libraries. The processes are those of `benchmarks.step`.
"""

import argparse
from typing import Any

from benchmarks import alternate
from benchmarks.settings import SETTINGS
from benchmarks.step import PEER_MODULES

GIB = 2**30
PLANNED = (
  ("setting", "setting", ""),
  ("argument_gib", "arguments GiB", ".3f"),
  ("donated_gib", "donated GiB", ".3f"),
  ("output_gib", "results GiB", ".3f"),
  ("temporary_gib", "temporary GiB", ".3f"),
  ("logits", "x [P, G, T, V]", ".2f"),
)
HELD = (
  ("engine", "engine", ""),
  ("start_gib", "ready GiB", ".2f"),
  ("peak_gib", "peak GiB", ".2f"),
  ("peak_ratio", "/ ours", ".2f"),
)


def planned(settings: dict[str, Any]) -> dict[str, Any]:
  """Returns XLA's memory plan for the update of a setting, which is compiled and not run."""
  import jax

  from benchmarks import ours

  engine = ours.Engine(settings)
  shape = SETTINGS[settings["setting"]]
  batch = engine.empty_batch()
  program = engine.update.lower(engine.state, batch).compile()
  plan = program.memory_analysis()
  logits = 4 * shape.prompts * shape.group * shape.tokens * engine.run.model.config.vocab_size
  return {
    "benchmark": "memory of the update",
    **settings,
    "jax": jax.__version__,
    "argument_gib": plan.argument_size_in_bytes / GIB,
    "donated_gib": plan.alias_size_in_bytes / GIB,
    "output_gib": plan.output_size_in_bytes / GIB,
    "temporary_gib": plan.temp_size_in_bytes / GIB,
    "logits": plan.temp_size_in_bytes / logits,
  }


def main(argv: list[str] | None = None) -> None:
  """Measures both tables and prints them."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  alternate.add_arguments(parser, tuple(PEER_MODULES))
  parser.set_defaults(rounds=2, warmup=1)
  parser.add_argument("--setting", choices=tuple(SETTINGS), default="two-shot")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help="a config field of grpo_jax, such as train.micro_batches=4")  # fmt: skip
  a = parser.parse_args(argv)
  settings = {
    "setting": a.setting,
    "model": alternate.model_for(a.model, a.peer),
    "learning_rate": 1e-6,
    "overrides": [f"--config.{text}" for text in a.set],
  }
  commands = alternate.commands_for("benchmarks.step", {p: PEER_MODULES[p] for p in a.peer})
  results = alternate.alternate(commands, settings, rounds=a.rounds, warmup=a.warmup)
  rows = []
  for name, result in results.items():
    peak = max(record["peak_bytes"] for record in result["records"])
    rows.append({"benchmark": "peak memory of the process", "engine": name, **settings,
                 "start_gib": result["ready_bytes"] / GIB, "peak_gib": peak / GIB})  # fmt: skip
  for row in rows:
    row["peak_ratio"] = row["peak_gib"] / rows[0]["peak_gib"]
  alternate.show([planned(settings)], PLANNED)
  alternate.show([row | alternate.machine() for row in rows], HELD)


if __name__ == "__main__":
  main()
