"""Trains a grid of settings, one run after another, and compares them over seeds.

    python -m grpo_jax.sweep --config experiments/X.py --workdir DIR \\
      --set optimizer.learning_rate=1e-5,3e-5 --set seed=0,1,2

Each run has a directory of its own in DIR. The same command continues what is unfinished; more
values may be added. `--config.a.b=v` holds for all runs.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.sweep")

from grpo_jax import config as configs
from grpo_jax.distributed import cluster
from grpo_jax.run import console, record
from grpo_jax.run import workdir as workdirs
from grpo_jax.sweep import checks, results
from grpo_jax.sweep import sweepfile as files
from grpo_jax.sweep.directory import Directory
from grpo_jax.sweep.grid import SweepError, commands, grid, overrides_of, parse_all
from grpo_jax.sweep.launchers import LAUNCHERS
from grpo_jax.sweep.running import Runner, reason_of
from grpo_jax.sweep.states import FINISHED, NEW, State, state_of

METRIC = "eval/accuracy"
FAILED = 3  # exit code: some runs failed, or are not finished


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = _parser()
  arguments, overrides = parser.parse_known_args(argv)
  if unknown := [text for text in overrides if not text.startswith("--config.")]:
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
  with console.guarded():
    try:
      workdir = Directory(arguments.workdir)
      if arguments.table:
        with workdir.seen() as folder:
          sweep = files.read(workdir, folder)
        return _show(workdir, sweep, arguments)
      if not arguments.config:
        parser.error("--config is needed, except with --table")
      return _sweep(arguments, overrides, workdir)
    except (SweepError, configs.ConfigError, workdirs.WorkdirError, cluster.ClusterError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m grpo_jax.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--config", help="an experiment file; it is run as a program")
  parser.add_argument("--workdir", required=True, help="holds a directory for each run")
  parser.add_argument(
    "--set", action="append", default=[], metavar="FIELD=VALUE,VALUE", dest="settings",
    help="values of a field; every combination is a run. 'seed' is averaged over; repeatable",
  )  # fmt: skip
  parser.add_argument(
    "--accept", action="append", default=[], metavar="NAME",
    help="handed to every run: a field or file that may differ from what it was started with",
  )  # fmt: skip
  parser.add_argument(
    "--print", choices=LAUNCHERS, dest="printed",
    help="prints the unfinished runs as commands, a SLURM array or JobSets, and runs nothing",
  )  # fmt: skip
  parser.add_argument("--table", action="store_true", help="only shows the table of DIR")
  parser.add_argument("--metric", default=METRIC, help=f"what is compared; {METRIC} by default")
  parser.add_argument("--json", metavar="FILE", help="writes runs and table there as well")
  return parser


def _sweep(arguments: argparse.Namespace, overrides: list[str], workdir: Directory) -> int:
  """Checks all runs, then prints or trains them."""
  runs = grid(parse_all(arguments.settings))
  fields = list(next(iter(runs.values())))
  if both := [f for f in fields if any(t.startswith(f"--config.{f}=") for t in overrides)]:
    raise SweepError([f"{field} stands in --set and in --config.{field}" for field in both])
  base = configs.to_saved(configs.load(arguments.config, overrides))
  texts = {name: [*overrides, *overrides_of(values)] for name, values in runs.items()}
  saved = _saved_configs(arguments.config, texts)
  with workdir.seen() as folder:
    sweep = files.joined(workdir, folder, arguments.config, base, runs, arguments.accept)
    states = {name: state_of(folder / name, saved[name]) for name in runs}
  todo = commands(arguments.config, runs, str(workdir), overrides, arguments.accept)
  unfinished = {name: todo[name] for name in runs if states[name].kind != FINISHED}
  if arguments.printed:
    _refuse(checks.value_problems(arguments.config, texts))
    if unfinished:
      print(LAUNCHERS[arguments.printed](unfinished), end="")
    else:
      print(f"all {len(runs)} runs in {workdir} are finished", file=sys.stderr)
    return 0
  if cluster.detect(os.environ) is not None:
    raise SweepError(
      ["this is one of several processes of a cluster, and a sweep starts its runs itself: use "
       "--print slurm or --print jobset, or set GRPO_JAX_CLUSTER=off"]
    )  # fmt: skip
  if unfinished:
    print(f"checking the configs of {len(unfinished)} runs", flush=True)
    unchecked = {name: texts[name] for name in unfinished}
    _refuse(checks.in_a_process(checks.build_problems, arguments.config, unchecked))
  with workdir.locked():
    files.write(workdir, sweep)
    stopped, failures = _train(workdir, unfinished, states)
  code = _show(workdir, sweep, arguments, failures)
  if stopped:
    print(f"stopped; the same command continues {workdir}")
    return 128 + stopped
  return FAILED if failures else code


def _saved_configs(path: str, texts: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
  """Returns the saved form of the config of each run.

  Raises:
    SweepError: a setting is none of the config's, or two runs have the same config.
  """
  saved, problems = {}, []
  for name, overrides in texts.items():
    try:
      saved[name] = configs.to_saved(configs.load(path, overrides))
    except configs.ConfigError as error:
      problems += error.problems
  for name, config in saved.items():
    same = next(other for other in saved if saved[other] == config)
    if same != name:
      problems.append(f"{name} and {same} are the same run: their values are equal")
  if problems:
    raise SweepError(list(dict.fromkeys(problems)))
  return saved


def _refuse(problems: Mapping[str, Sequence[str]]) -> None:
  """Raises a SweepError if there are problems; one that all runs share is shown once."""
  by_text: dict[str, list[str]] = {}
  for name, texts in problems.items():
    for text in texts:
      by_text.setdefault(text, []).append(name)
  if by_text:
    raise SweepError(
      [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}"
       for text, names in by_text.items()]
    )  # fmt: skip


def _train(
  workdir: Directory, todo: Mapping[str, Sequence[str]], states: Mapping[str, State]
) -> tuple[int, dict[str, str]]:
  """Trains the unfinished runs.

  Returns:
    (number of the signal that stopped the sweep or 0, reason of each failure by run).
  """
  failures: dict[str, str] = {}
  with Runner() as runner:
    for number, (name, arguments) in enumerate(todo.items(), start=1):
      if runner.received:
        break
      state = states[name]
      how = "" if state.kind == NEW else f", {state}"
      print(f"\nrun {number} of {len(todo)}: {name}{how}", flush=True)
      with workdir.seen() as folder:
        sessions = len(record.read(folder / name))
      code = runner.run([sys.executable, "-m", "grpo_jax.train", *arguments])
      if code and not runner.received:
        # A run that did not come to write a session leaves only its exit code.
        with workdir.seen() as folder:
          new = record.read(folder / name)[sessions:]
          reason = str(state_of(folder / name)) if new and new[-1].get("reason") else ""
        failures[name] = reason or reason_of(code)
        print(f"failed: {name}: {failures[name]}; the sweep goes on", file=sys.stderr, flush=True)
    return runner.received, failures


def _show(
  workdir: Directory,
  sweep: files.Sweep,
  arguments: argparse.Namespace,
  failures: Mapping[str, str] | None = None,
) -> int:
  """Prints the table of a sweep, and what is not finished; writes the JSON file.

  Args:
    failures: reasons of failures by run, for runs that could not write their own.

  Returns:
    0 if all runs are finished, else `FAILED`.
  """
  metric = arguments.metric
  with workdir.seen() as folder:
    paths = {name: folder / name for name in sweep.runs}
    states = {name: state_of(path) for name, path in paths.items()}
    values = {name: results.last_value(path, metric) for name, path in paths.items()}
    names = ", ".join(results.metrics_of(list(paths.values())))
  rows = results.rows_of(sweep.runs, states, values)
  print(f"\n{workdir}: the last {metric}; ± is the standard error over seeds\n")
  print(results.table(rows, metric))
  missing = {name: state for name, state in states.items() if state.kind != FINISHED}
  for name, state in missing.items():
    print(f"not counted: {name}: {(failures or {}).get(name, state)}")
  if len(missing) < len(states) and all(value is None for value in values.values()):
    print(f"no run has {metric}; --metric takes one of: {names}")
  if arguments.json:
    text = json.dumps(results.to_json(sweep.runs, metric, states, values, rows), indent=2) + "\n"
    with _explained(arguments.json):
      workdirs.write_whole(Path(arguments.json), text)
  return FAILED if missing else 0


@contextlib.contextmanager
def _explained(path: str):
  try:
    yield
  except OSError as error:
    raise workdirs.WorkdirError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
  sys.exit(main())
