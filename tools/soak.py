"""`make soak`: 500 steps with rewards that fail, and a kill every 50 steps; does anything grow?

One run is left alone and watched: resident memory and open files, of it and of its reward workers.
A second one is killed again and again, and has to end like the first, bit for bit. Prints what it
finds and writes it to docs/faults.md.

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

if __name__ == "__main__":  # before jax: one device here, and all runs share what they compile
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  cache = tempfile.TemporaryDirectory(prefix="grpo_jax_compiled_")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache.name)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import numpy as np

from tools.fault_kinds import pick
from tools.faulty_runs import Run, children, rows, same_end, steps_written, table, write_section

REWARDS = Path(__file__).with_name("soak_rewards.py")
EVERY = 50  # steps between kills
WARM = 0.5  # share of the steps before growth counts: 250 MiB are freed once, at about step 250
BLOCKS = 10  # of the steps after that
MIB_PER_100_STEPS, FILES = 3.0, 4  # that may come on top after that
# Else memory also depends on which of glibc's arenas the threads of a save happen to fill.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=500)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  steps, rng, began = arguments.steps, random.Random(arguments.seed), time.monotonic()
  with tempfile.TemporaryDirectory(prefix="grpo_jax_soak_") as name:
    folder = Path(name)
    settings = soak_settings(folder, steps)
    samples = watched(Run(folder / "whole", settings, variables=ONE_ARENA))
    print(f"{len(samples)} samples in {time.monotonic() - began:.0f} s", flush=True)
    lines, failed = growth(samples, steps)
    kills = killed(folder / "killed", settings, steps, rng)
    compared = same_end(folder / "whole", folder / "killed", settings, steps)
    found = [row for row in rows(folder / "whole") if "loss" in row]
  missing = int(sum(row["rewards/missing"] for row in found))
  unscored = round(sum(row["frac_unscored"] for row in found) * 64)
  text = table(("what", "after the warm-up", "at the end", "slope per 100 steps"), lines)
  minutes = (time.monotonic() - began) / 60
  about = (
    f"`make soak`: {steps} steps of the tiny model, 64 completions each; {missing} completions "
    f"whose reward killed its process or hung beyond the limit of time, {unscored} without a "
    f"reward in all; others slow. Seed {arguments.seed}, jax {version('jax')}, Python "
    f"{platform.python_version()}, {minutes:.0f} minutes. A second run was killed {kills} times, "
    f"about every {EVERY} steps, and ended as the first: {compared}. Of the run left alone, with "
    f"one arena of malloc, after step {int(WARM * steps)}, the least of each of {BLOCKS} blocks:"
  )
  print(f"{about}\n\n{text}")
  write_section("Soak", about, text)
  return 1 if failed or not missing else 0


def soak_settings(folder: Path, steps: int) -> list[str]:
  problems = [json.dumps({"prompt": f"{letter}{digit}"}) + "\n"
              for letter in "abcdefghij" for digit in range(10)]  # fmt: skip
  (folder / "rows.jsonl").write_text("".join(problems))
  return [
    f"--config.steps={steps}", "--config.checkpoint.every=10", "--config.eval.every=100",
    "--config.eval.batch_prompts=8", "--config.log.samples=0", "--config.task.name=jsonl",
    f"--config.task.settings.path={folder}/rows.jsonl",
    f"--config.task.settings.reward={REWARDS}:letters",
    "--config.task.settings.eval_fraction=0.05", "--config.rollout.completion_length=5",
    # It learns so little that completions stay all different, as are then their fates.
    "--config.optimizer.learning_rate=1e-5",
    "--config.rewards.timeout=8", "--config.rewards.workers=2",
  ]  # fmt: skip


def watched(run: Run) -> list[dict[str, float]]:
  """Steps done, MiB and open files of the run and of its reward workers, four times a second."""
  samples = []
  while run.running:
    pid = run.process.pid
    try:
      own, files = resident(pid), len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has just ended
      break
    workers = children(pid)
    samples.append({
      "step": steps_written(run.workdir), "memory": own, "files": files, "workers": len(workers),
      "workers' memory": sum(map(resident_or_gone, workers)),
    })  # fmt: skip
    time.sleep(0.25)
  run.end()
  return samples


def resident(pid: int) -> float:
  """Resident memory of a process, MiB."""
  pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_or_gone(pid: int) -> float:
  try:
    return resident(pid)
  except OSError:
    return 0.0


def killed(workdir: Path, settings: list[str], steps: int, rng: random.Random) -> int:
  """Runs to the end with a SIGKILL about every `EVERY` steps; how many there were."""
  for number, mark in enumerate(range(EVERY, steps, EVERY), start=1):
    run = Run(workdir, settings)
    goal = mark + rng.randint(-5, 5)
    assert run.until(lambda: steps_written(workdir) >= goal, 1200), run.output  # noqa: B023
    time.sleep(pick(rng, 0.0, 0.3))
    run.kill()
    print(f"kill {number} after step {steps_written(workdir)}", flush=True)
  Run(workdir, settings).end(seconds=1200)
  return number


def growth(samples: list[dict[str, float]], steps: int) -> tuple[list[tuple], int]:
  """(rows of the table, how many of them grow more than they may)."""
  # Not the end either: it draws the curve, and takes the run down.
  warm = [
    sample for sample in samples if WARM * steps <= sample["step"] < steps and sample["workers"]
  ]
  for sample in warm:  # one that died is missing until it is needed again
    sample["memory of a worker"] = sample["workers' memory"] / sample["workers"]
  blocks = np.array_split(np.unique([sample["step"] for sample in warm]), BLOCKS)
  lines, failed = [], 0
  for name, unit, most in (
    ("memory", "MiB", MIB_PER_100_STEPS),
    ("memory of a worker", "MiB", MIB_PER_100_STEPS),
    ("files", "", FILES * 100 / steps),
  ):
    # The least of each block of steps: what is held for a save goes again, a leak stays.
    least = [min(s[name] for s in warm if block[0] <= s["step"] <= block[-1]) for block in blocks]
    values = np.array([[block.mean(), value] for block, value in zip(blocks, least)])
    slope = 100 * np.polyfit(*values.T, 1)[0]
    print(name, " ".join(f"{step:.0f}:{value:.1f}" for step, value in values), flush=True)
    failed += slope > most
    first, last = least[0], least[-1]
    title = {"memory": "resident memory of the run", "files": "open files of the run"}
    note = "" if slope <= most else f", more than {most:g}"
    cells = f"{first:.0f} {unit}", f"{last:.0f} {unit}", f"{slope:+.2f} {unit}{note}"
    cells = tuple(cell.strip() for cell in cells)
    lines.append((title.get(name, "resident memory of a reward worker"), *cells))
  return lines, failed


if __name__ == "__main__":
  sys.exit(main())
