"""Measures time and memory of a whole GRPO step, of grpo_jax and of peers.

    python -m benchmarks.step --setting chat --peer trl

A step samples G completions for each of P prompts, computes rewards and advantages, and makes one
AdamW update. All engines have the same float32 weights, prompts, group size, optimizer and loss
(GRPO without a KL term). All completions have exactly T tokens: grpo_jax gets a stop table that no
token reaches, TRL `min_new_tokens = T`, and Tunix an end-of-text id that is not a token. Rewards
differ within every group, so no engine can skip a group. Each engine is a process of its own. The
engines take turns, and each times its step inside its process.

Settings: two-shot is 8 x 8 x 6 with prompts of 29 tokens, chat 4 x 8 x 32 with 48, eight-shot
4 x 8 x 32 with 159. CPU seconds are those of all threads of the process. Peak memory is that of the
process, its start and compilation included. `first s` is the time of the first step, compilation
included. `other cores` is the number of cores that other programs used; wall times are reliable
only if it is near 0.
"""

import argparse

from benchmarks import alternate
from benchmarks.settings import SETTINGS

PEER_MODULES = {"trl": "benchmarks.peers.trl_step", "tunix": "benchmarks.peers.tunix_step"}
COLUMNS = (
  ("engine", "engine", ""),
  ("seconds", "wall s", ".2f"),
  ("seconds_ratio", "/ ours", ".2f"),
  ("cpu_seconds", "CPU s", ".1f"),
  ("cpu_seconds_ratio", "/ ours", ".2f"),
  ("range", "range", ""),
  ("sampling_cpu_seconds", "sampling", ".1f"),
  ("update_cpu_seconds", "update", ".1f"),
  ("peak_gib", "peak GiB", ".2f"),
  ("peak_ratio", "/ ours", ".2f"),
  ("first_seconds", "first s", ".1f"),
  ("other_cores", "other cores", ".2f"),
)


def main(argv: list[str] | None = None) -> None:
  """Measures the engines and prints their rows."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  alternate.add_arguments(parser, tuple(PEER_MODULES))
  parser.add_argument("--setting", choices=tuple(SETTINGS), default="two-shot")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help="a config field of grpo_jax, such as train.micro_batches=4")  # fmt: skip
  parser.add_argument("--learning-rate", type=float, default=1e-6)
  a = parser.parse_args(argv)
  if a.worker:
    from benchmarks import ours

    ours.serve()
    return
  settings = {
    "setting": a.setting,
    "model": alternate.model_for(a.model, a.peer),
    "learning_rate": a.learning_rate,
    "overrides": [f"--config.{text}" for text in a.set],
  }
  commands = alternate.commands_for("benchmarks.step", {p: PEER_MODULES[p] for p in a.peer})
  results = alternate.alternate(commands, settings, rounds=a.rounds, warmup=a.warmup)
  same_tokens(results)
  tokens = results[alternate.OURS]["records"][0]["completion_tokens"]
  rows = alternate.summarize(
    results, {"benchmark": "step", **settings}, {"completion_tokens_per_second": tokens}
  )
  for row in rows:
    row["peak_gib"] = row["peak_bytes"] / 2**30
    row["range"] = "{:.2f} .. {:.2f}".format(*row["cpu_seconds_ratio_range"])
  print(SETTINGS[a.setting].title)
  alternate.show(rows, COLUMNS)


def same_tokens(results: dict) -> None:
  """Checks that all engines worked on the same number of tokens.

  Args:
    results: results of `alternate`.

  Raises:
    ValueError: the counts differ.
  """
  for field in ("prompt_tokens", "completion_tokens"):
    counts = {name: {r[field] for r in result["records"]} for name, result in results.items()}
    if len(set.union(*counts.values())) > 1:
      raise ValueError(f"the engines did not do the same work: {field} were {counts}")


if __name__ == "__main__":
  main()
