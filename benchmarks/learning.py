"""Measures how fast programs learn: held-out accuracy by wall time, CPU time and sampled tokens.

    python -m benchmarks.learning --task sums --peer trl --seeds 0 1 2 --out learning.jsonl
    python -m benchmarks.learning --task sums --figure learning.png --out learning.jsonl

All engines have the same weights, training problems, rewards, numbers of prompts and completions,
temperature, schedule of the learning rate and loss (DAPO's, TRL's default). Each engine draws its
own prompts from the same problems. TRL computes in its default precision (bfloat16 by autocast), or
in that of `--trl-precision`. Every `--every` steps the engine answers the same 200 held-out
problems without randomness; those seconds do not count, and neither does the start of a process.
Compilation counts: it is in the first steps.

The table has the wall and CPU seconds, and the completion tokens, until the accuracy reaches 0.7
and 0.8, interpolated between evaluations: the median over the seeds, and the range. `-` is a run
that did not get there. Curves are appended to `--out`, and a seed that is there is not run again.
Engines take turns, one unit of `--every` steps each, and `other cores` is what other programs used.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import alternate, problems
from grpo_jax.run import style

PEER_MODULES = {"trl": "benchmarks.peers.trl_learning"}
LEVELS = (0.7, 0.8)
AXES = {"seconds": "wall s", "cpu_seconds": "CPU s", "tokens": "tokens"}


def serve() -> None:
  """Serves grpo_jax as an engine: a unit of work is `every` steps and an evaluation."""
  import jax

  from benchmarks.ours import about
  from benchmarks.worker import Channel, clock, since
  from grpo_jax.build import build
  from grpo_jax.evaluate import evaluate
  from grpo_jax.rollout import collect

  channel = Channel()
  s = channel.settings
  run = build(make_config(s))
  state, update = run.initial_state(), run.learner(on_skip=lambda *_: None)
  step, tokens, count = 0, 0, 0  # the first unit has no steps: it is the start of the curve
  with run.scorer() as scorer:
    channel.ready(about())
    while channel.wait():
      with channel.measure() as record:
        before = clock()
        for _ in range(count):
          params = run.to_sampling_params(state.params)
          config, key = run.rollout_at(step), run.key(step)
          rollout = collect(run.sampler, params, run.examples(step), scorer, key, config)
          state, _ = update(state, rollout.batch, step)
          completions = config.group_size * run.config.rollout.prompts_per_step
          tokens += round(rollout.metrics["completions/mean_length"] * completions)
          step += 1
        count = s["every"]
        jax.block_until_ready(state)
        times = since(before)
        params = run.to_sampling_params(state.params)
        result = evaluate(
          run.sampler, params, run.task, run.task.splits["eval"], batch_prompts=50, scorer=scorer
        )
        record |= times | {
          "step": step,
          "tokens": tokens,
          "accuracy": result.metrics["eval/accuracy"],
        }


def make_config(settings: Mapping[str, Any]) -> Any:
  """Returns the config of a run; `settings` are those that all engines get."""
  from grpo_jax import config as configs

  task = problems.TASKS[settings["task"]]
  c = configs.default_config()
  c.seed, c.steps, c.model.source = settings["seed"], task.steps, settings["model"]
  c.task.name = "table"
  with c.unlocked():
    c.task.settings.update(
      path=settings["train"], eval_path=settings["held_out"], reward="benchmarks.problems:reward"
    )
  c.rollout.prompts_per_step, c.rollout.group_size = task.prompts, task.group
  c.rollout.completion_length, c.rollout.temperature = task.tokens, task.temperature
  c.rollout.stop = () if task.chat else ("\n",)
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = settings["learning_rate"]
  c.optimizer.schedule, c.optimizer.warmup_steps = "linear", 3
  return configs.override(c, settings["overrides"])


def curve_of(records: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
  """Returns the points of a curve: seconds are summed over the units of work.

  Args:
    records: of the units of work of an engine, in order; `tokens` is a sum already.
  """
  points, wall, cpu = [], 0.0, 0.0
  for record in records:
    wall, cpu = wall + record["seconds"], cpu + record["cpu_seconds"]
    points.append({
      "step": record["step"],
      "seconds": wall,
      "cpu_seconds": cpu,
      "tokens": record["tokens"],
      "accuracy": record["accuracy"],
    })  # fmt: skip
  return points


def reached(curve: Sequence[Mapping[str, float]], level: float, axis: str) -> float | None:
  """Returns where on an axis the accuracy first reaches a level; None if it does not.

  Example:
    >>> curve = [{"tokens": 0, "accuracy": 0.3}, {"tokens": 100, "accuracy": 0.8}]
    >>> reached(curve, 0.7, "tokens"), reached(curve, 0.9, "tokens")
    (80.0, None)
  """
  for before, after in zip([None, *curve], curve):
    if after["accuracy"] >= level:
      if before is None:
        return float(after[axis])
      share = (level - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
      return before[axis] + share * (after[axis] - before[axis])
  return None


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table with a row per engine, task and learning rate.

  Args:
    runs: each with `engine`, `task`, `learning_rate`, `precision`, `seed` and `curve`.
  """
  titles = [f"{name} to {level}" for level in LEVELS for name in AXES.values()]
  heads = ["engine", "task", "learning rate", "seeds", *titles, "last accuracy"]
  lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
  rows: dict[tuple, list[Mapping[str, Any]]] = {}
  for run in runs:
    name = run["engine"] + (f" ({run['precision']})" if run["precision"] else "")
    rows.setdefault((name, run["task"], run["learning_rate"]), []).append(run)
  for (engine, task, rate), same in rows.items():
    cells = [engine, task, f"{rate:g}", str(len(same))]
    for level in LEVELS:
      cells += [_spread([reached(run["curve"], level, axis) for run in same]) for axis in AXES]
    last = [run["curve"][-1]["accuracy"] for run in same]
    cells.append(f"{statistics.median(last):.3f} ({min(last):.3f} to {max(last):.3f})")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
  """Returns the median and the range of some numbers; "-" if the median does not exist."""
  numbers = sorted(float("inf") if value is None else value for value in values)
  middle = statistics.median_low(numbers)
  if middle == float("inf"):
    return "-"
  ends = [f"{number:.0f}" if number < float("inf") else "-" for number in (numbers[0], numbers[-1])]
  return f"{middle:.0f} ({ends[0]} to {ends[1]})"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Draws accuracy by wall time, one line per seed and one color per engine and learning rate."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  engines = list(dict.fromkeys((run["engine"], run["learning_rate"]) for run in runs))
  colors = (style.BLUE, style.ORANGE, style.GREEN, style.RED, style.PURPLE, style.GREY)
  for number, engine in enumerate(engines):
    label = "{}, learning rate {:g}".format(*engine)
    for run in runs:
      if (run["engine"], run["learning_rate"]) == engine:
        xs = [point["seconds"] / 60 for point in run["curve"]]
        ys = [point["accuracy"] for point in run["curve"]]
        color = colors[number % len(colors)]
        axes.plot(xs, ys, color=color, marker=".", linewidth=1, label=label)
        label = None  # in the legend once
  for level in LEVELS:
    axes.axhline(level, color=style.GREY, linewidth=0.8, linestyle=":", zorder=0)
  axes.set(xlabel="wall time of the steps in minutes", ylabel="accuracy, held-out, greedy")
  axes.set_xlim(left=0)
  axes.legend(loc="lower right")
  figure.savefig(path, dpi=150)


def measure(options: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
  """Trains all engines with a seed, in turns; returns a run for each."""
  task = problems.TASKS[options.task]
  train, held_out = problems.make_problems(task)
  problems.write(train, folder / "train.jsonl")
  problems.write(held_out[: options.held_out], folder / "held_out.jsonl")
  settings = {
    "task": options.task,
    "model": alternate.model_for(options.model, options.peer),
    "seed": seed,
    "every": options.every,
    "learning_rate": options.learning_rate or task.learning_rate,
    "precision": options.trl_precision,
    "train": str(folder / "train.jsonl"),
    "held_out": str(folder / "held_out.jsonl"),
    "overrides": [f"--config.{text}" for text in options.set],
  }
  peers = {name: PEER_MODULES[name] for name in options.peer}
  commands = alternate.commands_for("benchmarks.learning", peers)
  units = -(-(options.steps or task.steps) // options.every)
  results = alternate.alternate(commands, settings, rounds=1 + units, warmup=0)
  runs = []
  for name, result in results.items():
    records = result["records"]
    runs.append({
      "engine": name,
      **{field: settings[field] for field in ("task", "seed", "learning_rate")},
      "precision": "" if name == alternate.OURS else options.trl_precision,
      "other_cores": statistics.median(record.get("other_cores", 0.0) for record in records),
      "peak_bytes": max(record["peak_bytes"] for record in records),
      "curve": alternate.rounded(curve_of(records)),
      **alternate.machine(),
    })  # fmt: skip
  return runs


def main(argv: Sequence[str] | None = None) -> None:
  """Trains what is missing and prints the table of all runs of the task."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--task", choices=tuple(problems.TASKS), default="sums")
  parser.add_argument("--peer", choices=tuple(PEER_MODULES), action="append", default=[])
  parser.add_argument("--model", help=f"default: {alternate.MODEL}; with a peer, its export")
  parser.add_argument("--seeds", type=int, nargs="*", default=[], help="none: only print the table")
  parser.add_argument("--learning-rate", type=float, help="of all engines; default: by task")
  parser.add_argument("--trl-precision", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
  parser.add_argument("--steps", type=int, help="end before the schedule does")
  parser.add_argument("--held-out", type=int, default=200, help="problems of an evaluation")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help="a config field of grpo_jax, such as optimizer.beta2=0.99")  # fmt: skip
  parser.add_argument("--out", type=Path, help="JSON lines, one per run")
  parser.add_argument("--figure", type=Path, help="picture of all runs of the task")
  options = parser.parse_args(argv)
  if options.worker:
    serve()
    return
  if options.out is None:
    parser.error("--out is missing: the file of the curves")
  runs = problems.read(options.out) if options.out.exists() else []
  rate = options.learning_rate or problems.TASKS[options.task].learning_rate
  with options.out.open("a", encoding="utf-8") as out:
    for seed in options.seeds:
      wanted = (options.task, seed, rate)
      same = [run for run in runs if (run["task"], run["seed"], run["learning_rate"]) == wanted]
      if {alternate.OURS, *options.peer} <= {run["engine"] for run in same}:
        continue
      with tempfile.TemporaryDirectory() as folder:
        for run in measure(options, seed, Path(folder)):
          runs.append(run)
          print(json.dumps(run), file=out, flush=True)
  runs = [run for run in runs if run["task"] == options.task]
  print(table(runs))
  if options.figure:
    with style.use():
      draw(runs, options.figure)


if __name__ == "__main__":
  main()
