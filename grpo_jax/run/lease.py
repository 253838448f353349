"""Keeps other runs out of a work directory on a store: a lease, renewed as long as the run lives.

The object `lock` is written if it is absent, and from then on replaced if it is unchanged, every
`HEARTBEAT` seconds. A run that dies leaves it behind; another one takes it over when it has not
changed for `STALE` seconds by the clock of the store, or at once if it was left by a process of
this machine that is gone.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from grpo_jax.run.stores import Store, StoreError
from grpo_jax.run.workdir import LOCK, WorkdirError

HEARTBEAT = 20.0  # seconds between renewals
STALE = 120.0  # seconds without a renewal after which another run takes the lease
PROBE = ".probe"  # of the name of an object that shows that the store can be written


class LeaseLost(WorkdirError):
  """Reports that another run has taken the lease of a work directory."""


class Lease:
  """Holds a work directory from `acquire` to `release`.

  Args:
    store: the work directory.
    heartbeat, stale: seconds, instead of `HEARTBEAT` and `STALE`.
    holder: what identifies this process; by default that of `this_process`.

  Attributes:
    token: a random text, unlike that of any other lease.
  """

  def __init__(
    self,
    store: Store,
    heartbeat: float | None = None,
    stale: float | None = None,
    holder: dict[str, Any] | None = None,
  ) -> None:
    self._store, self.token = store, secrets.token_hex(8)
    self._heartbeat = HEARTBEAT if heartbeat is None else heartbeat
    self._stale = STALE if stale is None else stale
    self._holder = this_process() if holder is None else holder
    self._version, self._renewed, self._count = "", 0.0, 0
    self._lock, self._ended = threading.RLock(), threading.Event()
    self._thread: threading.Thread | None = None
    self._lost: LeaseLost | None = None

  def acquire(self) -> None:
    """Takes the lease, and renews it in a thread from then on.

    If it is held by a process that may have died, waits until its lease is stale or renewed.

    Raises:
      StoreError: the store cannot be read or written.
      WorkdirError: another run holds it.
    """
    skew = self._probe() - time.monotonic()  # the clock of the store minus that of this process
    first: tuple[str, float] | None = None  # version of another's lease, and when it was written
    while True:
      if self._take(""):
        break
      content, entry = self._store.read_version(LOCK)
      if content is None or entry is None:
        continue  # it was released just now
      other = _parse(content)
      age = time.monotonic() + skew - entry.written
      if is_gone(other) or age >= self._stale:
        if self._take(entry.version):
          break
        continue
      if first is None:
        first = entry.version, entry.written
        if is_here(other):
          raise WorkdirError(self._in_use(other))
        wait = f"at most {self._stale - age:.0f} s"
        print(f"waiting    {wait} to see whether {_name(other)} is alive", file=sys.stderr)
      elif entry.version != first[0]:
        raise WorkdirError(self._in_use(other))
      time.sleep(min(self._heartbeat / 4, max(self._stale - age, 0.05)))
    self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
    self._thread.start()

  def confirm(self) -> None:
    """Checks that this run holds the lease: call it before a write that must not be another's.

    Raises:
      LeaseLost: another run has taken it.
      StoreError: the store does not answer.
    """
    self.check()
    if time.monotonic() - self._renewed > self._heartbeat / 2:
      self._renew()

  def check(self) -> None:
    """Raises LeaseLost if it is known that another run has taken the lease; asks nobody."""
    if self._lost:
      raise self._lost

  def release(self) -> None:
    """Gives the lease back, if it is still held."""
    self._ended.set()
    if self._thread:
      self._thread.join()
    with self._lock:
      content, _ = (None, None) if self._lost else self._store.read_version(LOCK)
      if content is not None and _parse(content).get("token") == self.token:
        self._store.remove(LOCK)

  def _probe(self) -> float:
    """Writes and removes an object; returns the time of the store.

    Raises:
      StoreError: the store cannot be written.
    """
    name = f"{PROBE}-{self.token}"
    self._store.write(name, self.token.encode())
    _, entry = self._store.read_version(name)
    self._store.remove(name)
    if entry is None:
      raise StoreError(
        f"{self._store.address}: an object that was just written cannot be read: the store must "
        "show what was written at once, as Google Cloud Storage and S3 do"
      )
    return entry.written

  def _take(self, version: str) -> bool:
    """Writes the lease over a version of it, as this process's; returns whether that went well."""
    with self._lock:
      self._count += 1
      start = time.monotonic()
      content = {**self._holder, "token": self.token, "count": self._count}
      taken = self._store.swap(LOCK, json.dumps(content).encode(), version)
      if taken is not None:
        self._version, self._renewed = taken, start
      return taken is not None

  def _renew(self) -> None:
    with self._lock:
      if self._take(self._version):
        return
      content, _ = self._store.read_version(LOCK)
      if content is None:
        text = f"the object {LOCK} was removed by hand"
      else:
        text = f"it is now in use by {_name(_parse(content))}, as this run was silent for too long"
      self._lost = LeaseLost(
        f"{self._store.address} is not this run's any more: {text}. It stops, and has changed "
        "nothing since; the same command continues what the other one leaves"
      )
      raise self._lost

  def _keep(self) -> None:
    while not self._ended.wait(self._heartbeat):
      try:
        self._renew()
      except LeaseLost:
        return
      except Exception:
        continue  # a store that is down is reported by what is written to it

  def _in_use(self, other: dict[str, Any]) -> str:
    return (
      f"{self._store.address} is in use by {_name(other)}. Use another --workdir, or stop that run "
      "first: with Ctrl-C or `kill` it saves, and the same command continues"
    )


def confirm_token(store: Store, token: str) -> None:
  """Checks that a lease is held, in a process that does not hold it itself.

  Raises:
    LeaseLost: it has another token, or was released.
    StoreError: the store does not answer.
  """
  content, _ = store.read_version(LOCK)
  if content is None or _parse(content).get("token") != token:
    raise LeaseLost(f"{store.address} is not this run's any more: its first host has lost it")


# --- who holds it ---------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
  """Returns what identifies this process, to people and to other processes of this machine."""
  return {
    "process": os.getpid(),
    "host": socket.gethostname(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "machine": _machine(),
    "started": _started(os.getpid()),
  }


def is_gone(holder: dict[str, Any]) -> bool:
  """Tells whether it is certain that the process of a lease has ended: it was on this machine."""
  return _is_ours(holder) and _started(holder.get("process")) != holder.get("started")


def is_here(holder: dict[str, Any]) -> bool:
  """Tells whether it is certain that the process of a lease is alive: it is on this machine."""
  return _is_ours(holder) and not is_gone(holder)


def _is_ours(holder: dict[str, Any]) -> bool:
  return bool(_machine()) and holder.get("machine") == _machine()


def _machine() -> str:
  """Names this boot of this machine and its table of processes; empty if they are unknown."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _started(process: Any) -> str:
  """Returns when a process of this machine started, in its own unit; empty if there is none."""
  try:
    fields = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
  except (OSError, ValueError, TypeError):
    return ""


def _parse(content: bytes) -> dict[str, Any]:
  try:
    holder = json.loads(content)
  except (ValueError, RecursionError):
    return {}
  return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
  if not {"process", "host", "since"} <= set(holder):
    return "another run"
  return f"process {holder['process']} on {holder['host']} since {holder['since']}"[:200]
