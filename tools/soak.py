"""Checks that nothing grows in a long run whose rewards fail and that is killed: `make soak`.

One run is left alone while its resident memory and open files, and those of its reward workers, are
sampled. A second one is killed every 50 steps and has to end like the first, bit for bit. Prints
the results and writes them to docs/faults.md.

  python -m tools.soak [--steps 500] [--seed 0]
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # before jax: a single device here; all runs share compiled programs
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  cache = tempfile.TemporaryDirectory(prefix="grpo_jax_compiled_")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache.name)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import numpy as np

from tools.fault_kinds import pick
from tools.faulty_runs import Run, children, rows, same_end, steps_written, table, write_section

REWARDS = Path(__file__).with_name("soak_rewards.py")
EVERY = 50  # steps between kills
WARM_UP = 0.5  # share of the steps before growth counts: 250 MiB are freed once, at about step 250
BLOCKS = 10  # number of blocks that the steps after the warm-up are divided into
MIB_PER_100_STEPS, FILES = 3.0, 4  # growth allowed after the warm-up
# glibc: with more arenas, memory also depends on which of them the threads of a save fill.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def main() -> int:
  """Runs both, prints a table and writes it to the page; returns 1 if something grows."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.soak",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--steps", type=int, default=500, help="number of steps of each run")
  parser.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
  arguments = parser.parse_args()
  steps, rng, start = arguments.steps, random.Random(arguments.seed), time.monotonic()
  with tempfile.TemporaryDirectory(prefix="grpo_jax_soak_") as name:
    folder = Path(name)
    settings = soak_settings(folder, steps)
    samples = watch(Run(folder / "whole", settings, variables=ONE_ARENA))
    print(f"{len(samples)} samples in {time.monotonic() - start:.0f} s", flush=True)
    lines, failed = growth(samples, steps)
    kills = kill_repeatedly(folder / "killed", settings, steps, rng)
    compared = same_end(folder / "whole", folder / "killed", settings, steps)
    metrics = [row for row in rows(folder / "whole") if "loss" in row]
  missing = int(sum(row["rewards/missing"] for row in metrics))
  unscored = round(sum(row["frac_unscored"] for row in metrics) * 64)
  text = table(("quantity", "after the warm-up", "at the end", "slope per 100 steps"), lines)
  minutes = (time.monotonic() - start) / 60
  about = (
    f"`make soak`: {steps} steps of the tiny model, 64 completions each. The reward of {missing} "
    f"completions killed its process or exceeded the time limit, {unscored} completions in all had "
    f"no reward, others were slow. Seed {arguments.seed}, jax {version('jax')}, Python "
    f"{platform.python_version()}, {minutes:.0f} minutes. A second run was killed {kills} times, "
    f"about every {EVERY} steps, and ended like the first: {compared}. The table is of the first "
    f"run, with one arena of malloc, after step {int(WARM_UP * steps)}: the minimum of each of "
    f"{BLOCKS} blocks of steps."
  )
  print(f"{about}\n\n{text}")
  write_section("Soak", about, text)
  return 1 if failed or not missing else 0


def soak_settings(folder: Path, steps: int) -> list[str]:
  """Writes a task of 100 prompts; returns the settings of a run on it."""
  problems = [json.dumps({"prompt": f"{letter}{digit}"}) + "\n"
              for letter in "abcdefghij" for digit in range(10)]  # fmt: skip
  (folder / "rows.jsonl").write_text("".join(problems))
  return [
    f"--config.steps={steps}", "--config.checkpoint.every=10", "--config.eval.every=100",
    "--config.eval.batch_prompts=8", "--config.log.samples=0", "--config.task.name=jsonl",
    f"--config.task.settings.path={folder}/rows.jsonl",
    f"--config.task.settings.reward={REWARDS}:letters",
    "--config.task.settings.eval_fraction=0.05", "--config.rollout.completion_length=5",
    # It learns so little that completions keep differing, and with them what their rewards do.
    "--config.optimizer.learning_rate=1e-5",
    "--config.rewards.timeout=8", "--config.rewards.workers=2",
  ]  # fmt: skip


def watch(run: Run) -> list[dict[str, float]]:
  """Samples a run four times a second until it ends.

  Returns:
    Per sample: steps done, resident memory in MiB and number of open files of the run, number of
    reward workers and their resident memory in MiB.
  """
  samples = []
  while run.running:
    pid = run.process.pid
    try:
      memory, files = resident(pid), len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has just ended
      break
    workers = children(pid)
    samples.append({
      "step": steps_written(run.workdir), "memory": memory, "files": files,
      "workers": len(workers), "workers' memory": sum(map(resident_or_zero, workers)),
    })  # fmt: skip
    time.sleep(0.25)
  run.end()
  return samples


def resident(pid: int) -> float:
  """Returns the resident memory of a process in MiB."""
  pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_or_zero(pid: int) -> float:
  """Returns the resident memory of a process in MiB; 0 if it has ended."""
  try:
    return resident(pid)
  except OSError:
    return 0.0


def kill_repeatedly(workdir: Path, settings: list[str], steps: int, rng: random.Random) -> int:
  """Runs to the end with a SIGKILL about every `EVERY` steps; returns the number of kills."""
  kills = 0
  for mark in range(EVERY, steps, EVERY):
    run = Run(workdir, settings)
    goal = mark + rng.randint(-5, 5)
    assert run.until(lambda: steps_written(workdir) >= goal, 1200), run.output  # noqa: B023
    time.sleep(pick(rng, 0.0, 0.3))
    run.kill()
    kills += 1
    print(f"kill {kills} after step {steps_written(workdir)}", flush=True)
  Run(workdir, settings).end(seconds=1200)
  return kills


def growth(samples: list[dict[str, float]], steps: int) -> tuple[list[tuple], int]:
  """Fits a slope to each quantity after the warm-up.

  Returns:
    (rows of the table, number of quantities that grow by more than allowed).
  """
  # The end does not count either: there the run draws the curve and shuts down.
  warm = [
    sample for sample in samples if WARM_UP * steps <= sample["step"] < steps and sample["workers"]
  ]
  for sample in warm:  # a worker that died is replaced only when it is needed
    sample["memory of a worker"] = sample["workers' memory"] / sample["workers"]
  blocks = np.array_split(np.unique([sample["step"] for sample in warm]), BLOCKS)
  titles = {"memory": "resident memory of the run", "files": "open files of the run"}
  lines, failed = [], 0
  for name, unit, limit in (
    ("memory", "MiB", MIB_PER_100_STEPS),
    ("memory of a worker", "MiB", MIB_PER_100_STEPS),
    ("files", "", FILES * 100 / steps),
  ):
    # The minimum of each block: what a save holds is released again, a leak is not.
    least = [min(s[name] for s in warm if block[0] <= s["step"] <= block[-1]) for block in blocks]
    values = np.array([[block.mean(), value] for block, value in zip(blocks, least)])
    slope = 100 * np.polyfit(*values.T, 1)[0]
    print(name, " ".join(f"{step:.0f}:{value:.1f}" for step, value in values), flush=True)
    failed += slope > limit
    note = "" if slope <= limit else f", more than {limit:g}"
    cells = f"{least[0]:.0f} {unit}", f"{least[-1]:.0f} {unit}", f"{slope:+.2f} {unit}{note}"
    cells = tuple(cell.strip() for cell in cells)
    lines.append((titles.get(name, "resident memory of a reward worker"), *cells))
  return lines, failed


if __name__ == "__main__":
  sys.exit(main())
