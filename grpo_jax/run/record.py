"""Records how a run was started and why it ended, in `run.json`: one session per command.

{"sessions": [{"start": ..., "end": ..., "reason": "finished", "command": [...], ...}]}
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from grpo_jax.errors import first_line
from grpo_jax.run import provenance
from grpo_jax.run.workdir import write_whole

RECORD = "run.json"
PACKAGES = (
  *("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "transformers"),
  *("safetensors", "math-verify", "reasoning-gym"),
)


@contextlib.contextmanager
def session(
  workdir: str | Path,
  version: str,
  folder: str | Path = ".",
  about: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
  """Appends a session to `run.json` when the body starts, and writes why it ended at its end.

  The reason is `finished`; `signal` for Ctrl-C and SIGTERM, with the signal's name; or `error`,
  with the type and the first line of the error. The body may set another, such as `stopped`. A
  session that never came to its end is `killed` in the record of the next one. The peak memory is
  written at the end as well.

  Args:
    workdir: the work directory.
    version: of this package.
    folder: a folder of the code of the run, whose git commit and changes are recorded.
    about: more to record from the start, such as the data and the hosts.

  Yields:
    The session.
  """
  sessions = read(workdir)
  for earlier in sessions:
    if earlier.get("reason") is None:
      earlier["reason"] = "killed"
  now = {
    "start": _now(),
    "end": None,
    "reason": None,
    "command": list(sys.orig_argv),
    "folder": os.getcwd(),
    "host": socket.gethostname(),
    "versions": {"python": platform.python_version(), "grpo_jax": version, **versions()},
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    **provenance.code(folder, workdir),
    **(about or {}),
  }
  sessions.append(now)
  _write(workdir, sessions)
  error: BaseException | None = None
  try:
    yield now
  except BaseException as raised:
    error = raised
    raise
  finally:
    now["end"], now["peak_memory"] = _now(), peak_memory()
    now.update({"reason": now["reason"] or "finished"} if error is None else _reason(error))
    with contextlib.suppress(OSError):  # a full device must not hide the error that is raised
      _write(workdir, sessions)


def read(workdir: str | Path) -> list[dict[str, Any]]:
  """Reads the sessions of a run; none if there is no record. A damaged one is put aside."""
  path = Path(workdir) / RECORD
  if not path.is_file():
    return []
  try:
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    if not isinstance(sessions, list) or not all(isinstance(s, dict) for s in sessions):
      raise ValueError("it does not hold a list of sessions")
    return sessions
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    aside = path.with_name(f"{RECORD}.damaged")
    print(f"warning: {path} is damaged ({error}); it is kept as {aside.name}", file=sys.stderr)
    os.replace(path, aside)
    return []


def peak_memory() -> dict[str, int]:
  """Returns the most memory that was in use so far, in bytes: of this process, and of a device.

  A device that does not say, such as a CPU, is left out.
  """
  unit = 1 if sys.platform == "darwin" else 1024
  peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
  known = [device.memory_stats() or {} for device in jax.local_devices()]
  devices = [stats["peak_bytes_in_use"] for stats in known if "peak_bytes_in_use" in stats]
  return peaks | ({"device": max(devices)} if devices else {})


def memory_of(parts: Mapping[str, Any]) -> dict[str, int]:
  """Returns the bytes that each part takes on the first device of this process.

  Args:
    parts: trees of arrays by name. An array that is in two of them counts in the first.

  Example:
    >>> a, b = jax.numpy.ones(4), jax.numpy.ones(2)
    >>> memory_of({"parameters": {"a": a}, "optimizer": [a, b], "reference": None})
    {'parameters': 16, 'optimizer': 8}
  """
  sizes, seen = {}, set()
  for name, tree in parts.items():
    leaves = [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in seen]
    seen.update(map(id, leaves))
    if total := sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves):
      sizes[name] = total
  return sizes


def _reason(error: BaseException) -> dict[str, str]:
  """Returns why a session ended, from the exception that ended it."""
  if isinstance(error, KeyboardInterrupt):
    number = getattr(error, "exit_code", 128 + signal.SIGINT) - 128
    return {"reason": "signal", "signal": signal.Signals(number).name}
  return {"reason": "error", "error": type(error).__name__, "message": first_line(error)}


def versions() -> dict[str, str]:
  """Returns the versions of the packages that a run's numbers depend on, as far as installed."""
  versions = {}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return versions


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(workdir: str | Path, sessions: list[dict[str, Any]]) -> None:
  write_whole(Path(workdir) / RECORD, json.dumps({"sessions": sessions}, indent=2) + "\n")
