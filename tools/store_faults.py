"""Checks that a run on an object store that meets faults ends bit for bit like one that does not.

Servers of both stores run on this machine, behind a proxy that breaks requests and kills the run at
chosen ones. After each kill, the same command is started on a machine that has nothing of the run.
`make test-faults` prints the results and writes them to docs/faults.md.

  python -m tools.store_faults [--only WORD]
"""

import argparse
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

if __name__ == "__main__":  # before jax: a single device here; all runs share compiled programs
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  cache = tempfile.TemporaryDirectory(prefix="grpo_jax_compiled_")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache.name)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from grpo_jax.addresses import Address
from grpo_jax.run import checkpoint, mirror
from tests.helpers.fault_proxy import each_once, is_listing
from tests.helpers.stores import Served, served
from tools.faulty_runs import Run, same_end, table, write_section

STEPS, EVERY = 8, 2
SETTINGS = [
  f"--config.steps={STEPS}", f"--config.checkpoint.every={EVERY}", "--config.eval.every=3",
  "--config.task.settings.eval_size=3", "--config.eval.batch_prompts=8", "--config.log.samples=0",
  "--config.rollout.completion_length=5", "--config.algorithm.name=grpo",
  "--config.algorithm.beta=0.05", "--config.reference.sync_every=3",
  "--config.reference.sync_share=0.5", "--config.optimizer.schedule=cosine",
]  # fmt: skip
CHECKPOINT = r"/checkpoints/\d+/"
# Moments to kill at: the first request of a name, and whether it still reaches the store.
MOMENTS: dict[str, tuple[tuple[str, ...], str, bool]] = {
  "as the lease is written": (("PUT", "POST"), r"/lock$", True),
  "as a checkpoint is uploaded": (("PUT", "POST"), rf"{CHECKPOINT}default/_METADATA$", True),
  "as metrics are uploaded": (("PUT", "POST"), r"/metrics\.jsonl$", False),
  "after metrics, before a checkpoint counts": (("PUT", "POST"), r"/metrics\.jsonl$", True),
  "before a checkpoint counts": (("PUT", "POST"), rf"{CHECKPOINT}sha256\.json$", False),
  "as soon as a checkpoint counts": (("PUT", "POST"), rf"{CHECKPOINT}sha256\.json$", True),
  "as an old checkpoint is removed": (("DELETE",), rf"{CHECKPOINT}sha256\.json$", True),
  "as the newest checkpoint is read": (("GET",), rf"{CHECKPOINT}default/_METADATA$", False),
}


class StoreFaults:
  """Runs the cases on one store, each compared with a run on this machine that meets no fault.

  Args:
    folder: for what lies on this machine.
    store: is served.
    whole: work directory of the run without faults; run if it does not exist.
    settings: of all runs.
    steps: of all runs.
  """

  def __init__(
    self,
    folder: Path,
    store: Served,
    whole: Path,
    settings: list[str] = SETTINGS,
    steps: int = STEPS,
  ) -> None:
    self.folder, self.store, self.whole = folder, store, whole
    self.settings, self.steps, self.starts = settings, steps, 0
    folder.mkdir(exist_ok=True)
    if not whole.exists():
      Run(whole, settings).end()

  def start(self, address: Address, **variables: str) -> Run:
    """Starts the run on a machine that has nothing of it yet."""
    self.starts += 1
    stage = {mirror.STAGES: str(self.folder / f"stage{self.starts}")}
    return Run(
      self.folder / f"run{self.starts}",
      self.settings,
      variables=self.store.variables | stage | variables,
      target=str(address),
    )

  def finish(self, address: Address) -> str:
    """Runs the same command to the end and compares; returns a phrase about what was compared."""
    self.store.proxy.plan = lambda *_: None
    self.output = self.start(address).end()
    return self.compared(address)

  def compared(self, address: Address) -> str:
    """Asserts that a store holds what the run without faults left; returns a phrase about it."""
    self.store.proxy.plan = lambda *_: None
    names = set(self.store.contents(address))
    assert not {name for name in names if name == "lock" or name.startswith(".")}, names
    with mirror.fetched(address, checkpoints=True) as copied:
      return same_end(self.whole, copied, self.settings, self.steps)

  def killed(self, moments: list[str]) -> list[tuple[str, ...]]:
    """Kills one run at each of the moments, in this order; returns rows of the table."""
    address, lines = self.store.new("killed"), []
    for moment in moments:
      methods, pattern, forwarded = MOMENTS[moment]
      run, reached = self.start(address), []
      self.store.proxy.plan = partial(_kill_at, run, reached, methods, pattern, forwarded)
      assert run.until(lambda: reached), f"{moment}: never met\n{run.output}"  # noqa: B023
      time.sleep(0.02)  # until the store has answered the request
      run.kill()
      self.store.proxy.plan = lambda *_: None
      with_digests = [n for n in self.store.contents(address) if n.endswith("sha256.json")]
      steps = sorted(int(name.split("/")[1]) for name in with_digests)
      lines.append((moment, ", ".join(map(str, steps)) or "none"))
      print(f"  killed {moment}: checkpoints {steps}", flush=True)
    compared = self.finish(address)
    return [
      (f"SIGKILL {moment}", self.store.scheme, f"checkpoints then: {steps}; {compared}")
      for moment, steps in lines
    ]

  def broken(self, what: int | str) -> str:
    """Breaks the first two requests of each kind to each object."""
    address = self.store.new("broken")
    self.store.proxy.plan = each_once(what, times=2)
    before = len(self.store.proxy.requests)
    self.start(address).end()
    count = sum(happened is not None for *_, happened in self.store.proxy.requests[before:])
    return f"{count} requests broken; {self.compared(address)}"

  def lagging(self) -> str:
    """Answers each second listing as it was before, and kills the run in between."""
    address, count = self.store.new("lagging"), []

    def plan(method: str, path: str, name: str) -> str | None:
      if is_listing(method, path):
        count.append(path)
        return "stale" if len(count) % 2 else None
      return None

    self.store.proxy.plan = plan
    run = self.start(address)
    assert run.until(lambda: len(self._digests(address)) > 1), run.output
    run.kill()
    self.start(address).end()
    return f"{len(count)} listings; {self.compared(address)}"

  def _digests(self, address: Address) -> list[str]:
    pattern = f"{address.prefix}{CHECKPOINT}sha256\\.json$"
    written = [n for m, n, _ in list(self.store.proxy.requests) if m in ("PUT", "POST")]
    return [name for name in written if re.search(pattern, name)]

  def down(self) -> str:
    """Takes the store down in the middle of a run, for good."""
    address = self.store.new("down")
    counted = []

    def plan(method: str, path: str, name: str) -> str | None:
      if counted:
        return "cut"
      if method in ("PUT", "POST") and name.endswith(checkpoint.DIGESTS):
        counted.append(time.monotonic())
      return None

    self.store.proxy.plan = plan
    output = self.start(address, GRPO_JAX_STORE_SECONDS="3").end(74)
    seconds = time.monotonic() - counted[0]
    assert "could not be saved: " in output, output
    assert f"{address}: cannot " in output, output
    assert "no success for 3 s" in output, output
    compared = self.finish(address)
    return f"exit code 74, {seconds:.0f} s later, naming the request (limit 3 s); {compared}"

  def two(self) -> str:
    """Starts a second run on the work directory of one that goes on."""
    address = self.store.new("two")
    first = self.start(address)
    assert first.until(lambda: self._digests(address)), first.output
    first.process.send_signal(signal.SIGSTOP)  # it must not end before the second one starts
    output = self.start(address).end(2)
    first.process.send_signal(signal.SIGCONT)
    assert f"error: {address} is in use by process {first.process.pid} on " in output, output
    assert "Traceback" not in output
    first.end()
    return f"the second refused with exit code 2; {self.compared(address)}"

  def damaged(self) -> str:
    """Damages the newest checkpoint of a finished run in the store."""
    address = self.store.new("damaged")
    self.start(address).end()
    store = mirror.open_store(address)
    root = f"checkpoints/{self.steps}/"
    largest = max(store.list(root), key=lambda entry: entry.size)
    content = bytearray(store.read(largest.name) or b"")
    content[len(content) // 2] ^= 1
    store.write(largest.name, bytes(content))
    compared = self.finish(address)
    assert f"checkpoint {self.steps} is damaged: " in self.output, self.output
    assert f"continuing from checkpoint {self.steps - EVERY}" in self.output
    kept = [name for name in self.store.contents(address) if name.startswith("damaged/")]
    assert f"damaged/{self.steps}/sha256.json" in kept, kept
    return f"reported, continued from the one before; {compared}"


def _kill_at(
  run: Run,
  reached: list[str],
  methods: tuple[str, ...],
  pattern: str,
  forwarded: bool,
  method: str,
  path: str,
  name: str,
) -> str | None:
  """Kills a run at the first request of a kind; a plan of the proxy with its first arguments."""
  if reached:
    return "cut"  # those of threads that have not ended yet
  if method not in methods or not re.search(pattern, f"/{name}"):
    return None
  if not forwarded:
    run.process.kill()
  reached.append(name)
  return "lost" if forwarded else "cut"


CASES: dict[str, Callable[[StoreFaults], str]] = {
  "429 for two requests of each kind": lambda f: f.broken(429),
  "503 for two requests of each kind": lambda f: f.broken(503),
  "two connections of each kind cut": lambda f: f.broken("cut"),
  "two answers of each kind lost": lambda f: f.broken("lost"),
  "two slow requests of each kind": lambda f: f.broken("slow"),
  "listings that lag, and a SIGKILL": StoreFaults.lagging,
  "the store is down from the first checkpoint on": StoreFaults.down,
  "two processes, one work directory": StoreFaults.two,
  "newest checkpoint: a bit flipped": StoreFaults.damaged,
}


def main() -> int:
  """Runs the cases on both stores and writes them to the page; returns 1 if one failed."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.store_faults",
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("--only", default="", help="run the cases with this word; write no page")
  only = parser.parse_args().only
  start, lines, failed = time.monotonic(), [], 0
  root = Path(tempfile.mkdtemp(prefix="grpo_jax_faults_"))
  for scheme in ("gs", "s3"):
    with pytest.MonkeyPatch.context() as patch, served(scheme, patch) as store:
      faults = StoreFaults(root / scheme, store, root / "whole")
      cases = {name: case for name, case in CASES.items() if only in name}
      if only in "SIGKILL":
        cases = {"SIGKILL": lambda f: f.killed(list(MOMENTS))} | cases
      for name, case in cases.items():
        try:
          result = case(faults)
          lines += result if isinstance(result, list) else [(name, scheme, result)]
        except AssertionError as error:
          failed += 1
          lines.append((name, scheme, f"FAILED: {[*str(error).splitlines(), 'see above'][0]}"))
          traceback.print_exc()
        print(f"{scheme} {name}: {lines[-1][2]}", flush=True)
  shutil.rmtree(root)
  minutes = (time.monotonic() - start) / 60
  text = table(("fault", "store", "result"), lines)
  print(text)
  if not only:
    about = (
      f"`make test-faults`: {STEPS} steps of the tiny model with a checkpoint every {EVERY}, on a "
      f"server of our own that speaks as Google Cloud Storage does, and on moto "
      f"{version('moto')} as S3, on this machine; google-cloud-storage "
      f"{version('google-cloud-storage')}, boto3 {version('boto3')}, jax {version('jax')}, Python "
      f"{platform.python_version()}, {minutes:.0f} minutes. Every start is one on a machine that "
      "has nothing of the run. A request that kills reaches the store, except for those named "
      '"as metrics are uploaded", "before a checkpoint counts" and "is read". What is "the same" '
      "is as above, compared with a run on a local disk. No real cloud was tried."
    )
    write_section("Object stores", about, text)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
