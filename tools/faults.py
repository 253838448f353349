"""Checks that a run that meets faults ends bit for bit like one that does not: `make test-faults`.

A run of the tiny model is killed at many moments and started again by the same command; files are
damaged, disks filled, signals sent. Prints the results and writes them to docs/faults.md.

  python -m tools.faults [--seed 0] [--kills 30] [--only WORD]
"""

import argparse
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # before jax: a single device here; all runs share compiled programs
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  cache = tempfile.TemporaryDirectory(prefix="grpo_jax_compiled_")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache.name)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from grpo_jax.distributed import cluster
from grpo_jax.run import checkpoint
from tools.fault_kinds import (
  MOMENTS,
  contents,
  flip_a_bit,
  largest,
  pick,
  remove,
  small_disk,
  truncate,
)
from tools.faulty_runs import (
  Run,
  checkpoints,
  close_end,
  names,
  rows,
  same_end,
  steps_written,
  table,
  unfinished_checkpoints,
  write_section,
)

STEPS, EVERY = 60, 2
# A KL term with a moving reference, a schedule over the run, evaluations at other steps than saves.
SETTINGS = [
  f"--config.steps={STEPS}", f"--config.checkpoint.every={EVERY}", "--config.eval.every=5",
  "--config.task.settings.eval_size=3", "--config.eval.batch_prompts=8", "--config.log.samples=0",
  "--config.rollout.completion_length=5", "--config.algorithm.name=grpo",
  "--config.algorithm.beta=0.05", "--config.reference.sync_every=3",
  "--config.reference.sync_share=0.5", "--config.optimizer.schedule=cosine",
]  # fmt: skip


class Faults:
  """Runs the cases, each compared with the run in `whole` that meets no fault.

  Args:
    folder: for all work directories.
    seed: of the moments of kills.
    kills: number of kills.
  """

  def __init__(self, folder: Path, seed: int, kills: int) -> None:
    self.folder, self.kills, self.rng = folder, kills, random.Random(seed)
    self.whole = folder / "whole"
    Run(self.whole, SETTINGS).end()

  def finish(self, workdir: Path) -> str:
    """Runs the same command to the end and compares; returns a phrase about what was compared."""
    self.output = Run(workdir, SETTINGS).end()
    return same_end(self.whole, workdir, SETTINGS, STEPS)

  def copy(self, name: str) -> Path:
    """Copies the finished work directory."""
    return Path(shutil.copytree(self.whole, self.folder / name))

  def killed(self) -> list[tuple[str, ...]]:
    """Kills one run at random moments of each kind, in random order; returns rows of the table."""
    workdir = self.folder / "killed"
    kinds = [kind for kind in MOMENTS for _ in range(-(-self.kills // len(MOMENTS)))]
    self.rng.shuffle(kinds)
    # By kind: (steps written, step of the newest checkpoint, an unfinished checkpoint is left).
    kills: dict[str, list[tuple[int, int, bool]]] = {kind: [] for kind in MOMENTS}
    for kind in kinds[: self.kills]:
      run, before = Run(workdir, SETTINGS), checkpoints(workdir)
      reached = MOMENTS[kind](run, self.rng)
      assert reached, f"{kind}: the run ended before it could be killed\n{run.output}"
      run.kill()
      saved, unfinished = checkpoints(workdir), unfinished_checkpoints(workdir)
      assert saved[-1:] >= before[-1:], f"{kind}: checkpoint {before} became {saved}"
      kills[kind].append((steps_written(workdir), (saved or [0])[-1], bool(unfinished)))
      print(f"  killed ({kind}) after {kills[kind][-1]}", flush=True)
    compared = self.finish(workdir)
    print(f"  {sum(map(len, kills.values()))} kills: {compared}", flush=True)
    return [
      (f"SIGKILL {kind}", len(met), f"{sum(left for *_, left in met)} left a partial checkpoint; "
       f"lost {sum(a - b for a, b, _ in met) / len(met):.1f} steps on average; {compared}")
      for kind, met in kills.items() if met
    ]  # fmt: skip

  def stopped(self, number: int, code: int) -> str:
    workdir = self.folder / f"signal_{number}"
    for moment in (3, 12):
      run = Run(workdir, SETTINGS)
      assert run.until(lambda: steps_written(workdir) > moment)  # noqa: B023 - used at once
      time.sleep(pick(self.rng, 0.0, 0.1))
      run.process.send_signal(number)
      output = run.end(code)
      done = checkpoints(workdir)[-1]
      assert f"stopped after step {done}, which is saved" in output
      assert [row["step"] for row in rows(workdir) if "loss" in row] == list(range(done))
    return f"exit code {code}, the current step saved; {self.finish(workdir)}"

  # --- damage

  def damaged(self, harm: Callable[[Path], None], message: str) -> str:
    workdir = self.copy(f"damaged_{harm.__name__}")
    harm(largest(workdir / "checkpoints" / str(STEPS)))
    compared = self.finish(workdir)
    assert f"checkpoint {STEPS} is damaged: " in self.output
    assert message in self.output
    assert f"continuing from checkpoint {STEPS - EVERY}" in self.output
    assert names(workdir / "damaged") == {str(STEPS)}
    return f"reported, continued from the one before; {compared}"

  def all_damaged(self) -> str:
    workdir = self.copy("all_damaged")
    for step in checkpoints(workdir):
      flip_a_bit(largest(workdir / "checkpoints" / str(step)))
    return self.refused(workdir, SETTINGS, f"every checkpoint in {workdir / 'checkpoints'}")

  def damaged_config(self) -> str:
    workdir = self.copy("damaged_config")
    truncate(workdir / "config.json")
    refused = self.refused(workdir, SETTINGS, f"{workdir / 'config.json'} is damaged")
    shutil.copy(self.whole / "config.json", workdir)
    return f"{refused}; put back, {self.finish(workdir)}"

  def other_config(self) -> str:
    workdir = self.copy("other_config")
    settings = [*SETTINGS, "--config.seed=5", "--config.optimizer.beta2=0.95"]
    refused = self.refused(workdir, settings, "seed: 0 -> 5", "optimizer.beta2: 0.99 -> 0.95")
    return f"{refused}; both fields named"

  def refused(self, workdir: Path, settings: list[str], *messages: str) -> str:
    """Asserts that a command ends with exit code 2 and these messages, and changes no file."""
    before = contents(workdir)
    output = Run(workdir, settings).end(2)
    for message in messages:
      assert message in output, output
    assert contents(workdir) == before, "files were changed"
    return "refused with exit code 2, no file changed"

  def two(self) -> str:
    workdir = self.folder / "two"
    first = Run(workdir, SETTINGS)
    assert first.until(lambda: steps_written(workdir) > 1)
    first.process.send_signal(signal.SIGSTOP)  # it must not end before the second one starts
    second = Run(workdir, SETTINGS)
    output = second.end(2)
    first.process.send_signal(signal.SIGCONT)
    assert f"{workdir} is in use by process {first.process.pid} on {platform.node()}" in output
    first.end()
    return f"the second refused with exit code 2; {self.finish(workdir)}"

  # --- full disks

  def full_at_a_save(self) -> str:
    with small_disk(self.folder / "full_at_a_save") as (workdir, leave, make_room):
      run = Run(workdir, SETTINGS)
      assert run.until(lambda: len(checkpoints(workdir)) > 1)
      leave(run, 100)
      output = run.end(74)
      for message in ("could not be saved: the file system is full", "the same command continues"):
        assert message in output, output
      saved = checkpoints(workdir)
      assert saved, "no checkpoint is left"
      folders = [workdir / "checkpoints" / str(step) for step in saved]
      assert not any(map(checkpoint.find_damage, folders))
      make_room()
      return f"exit code 74 with checkpoint {saved[-1]} intact; {self.finish(workdir)}"

  def full_at_a_line(self) -> str:
    with small_disk(self.folder / "full_at_a_line") as (workdir, leave, make_room):
      run = Run(workdir, [*SETTINGS, "--config.checkpoint.every=1000"])
      assert run.until(lambda: steps_written(workdir) > 2)
      leave(run, 8)
      output = run.end(74)
      assert "the file system is full" in output
      assert "MiB are free on the file system at " in output
      steps = steps_written(workdir)
      make_room()
      return f"exit code 74 after {steps} steps; {self.finish(workdir)}"

  # --- other machines

  def other_mesh(self, axis: str) -> str:
    workdir, settings = self.half(f"mesh_{axis}")
    sizes = {name: 8 if name == axis else 1 for name in ("data", "fsdp", "tensor")}
    mesh = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    Run(workdir, [*settings, *mesh], devices=8).end()
    return close_end(self.folder / "short", workdir, 1e-4)

  def other_hosts(self) -> str:
    """Damages the newest checkpoint: both hosts have to find the same one instead."""
    workdir, settings = self.half("hosts")
    flip_a_bit(largest(workdir / "checkpoints" / "6"))
    with socket.socket() as listener:
      listener.bind(("localhost", 0))
      address = f"localhost:{listener.getsockname()[1]}"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.hosts.heartbeat=20"]
    runs = []
    for index in range(2):
      variables = {cluster.ADDRESS: address, cluster.COUNT: "2", cluster.INDEX: str(index)}
      runs.append(Run(workdir, [*settings, *mesh], devices=4, variables=variables))
    for run in runs:
      run.end()
    assert "checkpoint 6 is damaged: " in runs[0].output
    assert "continuing from checkpoint 4" in runs[0].output
    return close_end(self.folder / "short", workdir, 1e-4)

  def half(self, name: str) -> tuple[Path, list[str]]:
    """Returns a run stopped at step 6 of 10 on one device, and the settings that finish it."""
    settings = [*SETTINGS, "--config.steps=10", "--config.optimizer.schedule=constant"]
    if not (self.folder / "short").exists():
      Run(self.folder / "short", settings).end()
      Run(self.folder / "short6", [*settings, "--config.steps=6"]).end()
    return Path(shutil.copytree(self.folder / "short6", self.folder / name)), settings


CASES: tuple[tuple[str, Callable[[Faults], str]], ...] = (
  ("SIGTERM, twice in a run", lambda f: f.stopped(signal.SIGTERM, 143)),
  ("Ctrl-C, twice in a run", lambda f: f.stopped(signal.SIGINT, 130)),
  ("a finished run is started again", lambda f: f.finish(f.copy("again"))),
  ("newest checkpoint: a bit flipped", lambda f: f.damaged(flip_a_bit, "other contents")),
  ("newest checkpoint: a file truncated", lambda f: f.damaged(truncate, "bytes instead of")),
  ("newest checkpoint: a file missing", lambda f: f.damaged(remove, "is missing")),
  ("all checkpoints damaged", Faults.all_damaged),
  ("config.json truncated", Faults.damaged_config),
  ("a work directory of another config", Faults.other_config),
  ("two processes, one work directory", Faults.two),
  ("disk full at a checkpoint", Faults.full_at_a_save),
  ("disk full at a line of metrics", Faults.full_at_a_line),
  ("1 device, then 8 (data=8)", lambda f: f.other_mesh("data")),
  ("1 device, then 8 (fsdp=8)", lambda f: f.other_mesh("fsdp")),
  ("1 process, then 2 of 4 devices; the newest checkpoint damaged", Faults.other_hosts),
)


def main() -> int:
  """Runs the cases, prints a table and writes it to the page; returns 1 if one failed."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.faults",
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
  parser.add_argument("--kills", type=int, default=30, help="number of kills")
  parser.add_argument("--only", default="", help="run the cases with this word; write no page")
  arguments = parser.parse_args()
  start, lines, failed = time.monotonic(), [], 0
  with tempfile.TemporaryDirectory(prefix="grpo_jax_faults_") as folder:
    faults = Faults(Path(folder), arguments.seed, arguments.kills)
    if arguments.only in "SIGKILL":
      lines += faults.killed()
    for name, case in CASES:
      if arguments.only not in name:
        continue
      try:
        lines.append((name, 1, case(faults)))
      except AssertionError as error:
        failed += 1
        lines.append((name, 1, f"FAILED: {[*str(error).splitlines(), 'see above'][0]}"))
        traceback.print_exc()
      print(f"{name}: {lines[-1][2]}", flush=True)
  minutes = (time.monotonic() - start) / 60
  text = table(("fault", "times", "result"), lines)
  print(text)
  if not arguments.only:
    about = (
      f"`make test-faults`: {STEPS} steps of the tiny model, a checkpoint every {EVERY}, a KL term "
      f"with a moving reference, an evaluation every 5; seed {arguments.seed}, jax "
      f"{version('jax')}, orbax {version('orbax-checkpoint')}, Python {platform.python_version()}, "
      f'{minutes:.0f} minutes. After every fault, the same command was run again. "The same" is '
      "bit for bit, compared with a run that met no fault: parameters, optimizer state, reference "
      "and count; every line of metrics.jsonl except for its times; every file of samples, with "
      "the prompts in their order. SIGKILL ends a process; it does not cut the power of a machine."
    )
    write_section("Kills, damage, full disks", about, text)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
