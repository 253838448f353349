"""Reads and writes objects of a store: whole, if absent, or if unchanged.

A driver makes one attempt at a request; `Store` repeats it while the store is busy, for a stated
time. A lost answer to a conditional write looks like a lost race, so both are settled by reading
the object back. Errors are one sentence with the remedy, without credentials.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from grpo_jax import extras
from grpo_jax.addresses import Address
from grpo_jax.errors import first_line
from grpo_jax.run.workdir import WorkdirError

T = TypeVar("T")
SECONDS = 60.0  # time after the first failure of a request until it is an error
LIMIT = "GRPO_JAX_STORE_SECONDS"  # environment variable: another such time
_PAUSES = 0.2, 5.0  # seconds between attempts: the first, and the longest
THREADS = 8  # requests at a time
ANY = "*"  # the version of an object that may have any, or be missing
MODULES = {"gs": ("gcs", "google.cloud.storage"), "s3": ("s3", "boto3")}


class StoreError(WorkdirError):
  """Reports that a store cannot be used; the message says what to do."""


class Busy(Exception):
  """Reports a failure that another attempt may not meet."""


class Missing(Exception):
  """Reports that there is no such object."""


class Changed(Exception):
  """Reports that the condition of a write does not hold."""


class Refused(Exception):
  """Reports a failure that every attempt would meet; the message is a clause with the remedy."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """Describes an object.

  Attributes:
    name: below the folder of the store.
    size: in bytes.
    version: changes with every write.
    written: time in seconds of its last write, by the clock of the store.
  """

  name: str
  size: int
  version: str
  written: float


class Driver(Protocol):
  """Makes single attempts. Keys are names in the bucket; `version` is `ANY`, "" (absent), or one.

  Its methods raise Busy, Missing, Changed, Refused, or errors that `explain` turns into these.
  """

  def get(self, key: str) -> tuple[bytes, Entry]:
    """Returns the content of an object, and what it is the content of."""

  def fetch(self, key: str, path: Path) -> None:
    """Writes the content of an object to a file."""

  def put(self, key: str, content: bytes | Path, version: str) -> str:
    """Writes an object if it has the version; returns its new one."""

  def entries(self, prefix: str) -> list[Entry]:
    """Returns all objects whose keys begin with the prefix."""

  def remove(self, key: str) -> None:
    """Removes an object."""

  def explain(self, error: Exception) -> Exception:
    """Returns Busy, Missing, Changed or Refused for an error of the library."""


class Store:
  """A folder on a store. Names are those of the objects below it, with `/` between their parts.

  Args:
    address: of the folder.
    driver: makes the requests.
    seconds: time after the first failure of a request until it is an error.
  """

  def __init__(self, address: Address, driver: Driver, seconds: float | None = None) -> None:
    self.address, self._driver = address, driver
    self.seconds = _seconds() if seconds is None else seconds

  def read(self, name: str) -> bytes | None:
    """Returns the content of an object; None if there is none."""
    content, _ = self.read_version(name)
    return content

  def read_version(self, name: str) -> tuple[bytes | None, Entry | None]:
    """Returns the content of an object and its entry; (None, None) if there is none."""
    try:
      return self._attempts(f"read {name}", lambda: self._driver.get(self._key(name)))
    except Missing:
      return None, None

  def download(self, name: str, path: Path) -> bool:
    """Writes an object to a file, whole or not at all; returns whether there was one."""
    partial = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      self._attempts(f"read {name}", lambda: self._driver.fetch(self._key(name), partial))
    except Missing:
      partial.unlink(missing_ok=True)
      return False
    partial.replace(path)
    return True

  def write(self, name: str, content: bytes | Path) -> None:
    """Writes an object whole, whatever was there."""
    self._attempts(f"write {name}", lambda: self._driver.put(self._key(name), content, ANY))

  def create(self, name: str, content: bytes) -> str | None:
    """Writes an object that must not exist; returns its version, or None if there is one already.

    Args:
      content: must be unlike that of any other writer.
    """
    return self.swap(name, content, "")

  def swap(self, name: str, content: bytes, version: str) -> str | None:
    """Writes an object if it still has a version; returns the new one, or None if it has another.

    Args:
      content: must be unlike that of any other writer.
      version: the one to replace; "" if there must be none.
    """
    try:
      return self._attempts(
        f"write {name}", lambda: self._driver.put(self._key(name), content, version)
      )
    except (Changed, Missing):
      now, entry = self.read_version(name)
      return entry.version if entry and now == content else None  # an answer to us was lost

  def list(self, prefix: str = "") -> list[Entry]:
    """Returns the objects whose names begin with a prefix, sorted by name."""
    root = f"{self.address.prefix}/"
    entries = self._attempts("list its objects", lambda: self._driver.entries(root + prefix))
    named = [dataclasses.replace(e, name=e.name.removeprefix(root)) for e in entries]
    return sorted(named, key=lambda entry: entry.name)

  def remove(self, name: str) -> None:
    """Removes an object, if there is one."""
    with contextlib.suppress(Missing):
      self._attempts(f"remove {name}", lambda: self._driver.remove(self._key(name)))

  def _key(self, name: str) -> str:
    return f"{self.address.prefix}/{name}"

  def _attempts(self, task: str, attempt: Callable[[], T]) -> T:
    """Returns what an attempt returns, once the store is not busy.

    Raises:
      Missing, Changed: at the first attempt that says so.
      StoreError: the store was busy for too long, or refuses the request.
    """
    since, pause = None, _PAUSES[0]
    while True:
      try:
        return attempt()
      except Exception as error:
        problem = self._driver.explain(error)
        if isinstance(problem, Missing | Changed):
          raise problem from error
        if isinstance(problem, Refused):
          raise StoreError(f"{self.address}: cannot {task}: {problem}") from error
        if not isinstance(problem, Busy):
          raise
        now = time.monotonic()
        since = now if since is None else since
        if now - since + pause > self.seconds:
          raise StoreError(
            f"{self.address}: cannot {task}: no success for {self.seconds:g} s ({problem}). Check "
            "the network and the state of the store; then the same command continues"
          ) from error
      time.sleep(pause * random.uniform(0.5, 1.0))
      pause = min(2 * pause, _PAUSES[1])

  @contextlib.contextmanager
  def limited(self, seconds: float) -> Iterator[None]:
    """Lets requests fail after a shorter time while the body runs."""
    before, self.seconds = self.seconds, min(seconds, self.seconds)
    try:
      yield
    finally:
      self.seconds = before


def _seconds() -> float:
  text = os.environ.get(LIMIT, str(SECONDS))
  try:
    seconds = float(text)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < float("inf"):
    raise StoreError(f"{LIMIT} is {text!r}, it must be a number of seconds of at least 0")
  return seconds


def in_parallel(do: Callable[[T], Any], items: Iterable[T]) -> None:
  """Calls a function for each item, several at a time; raises the first error."""
  with ThreadPoolExecutor(THREADS) as pool:
    for _ in pool.map(do, items):
      pass


def open_store(address: Address, seconds: float | None = None) -> Store:
  """Opens a folder on a store; the first request shows whether it can be used.

  Raises:
    StoreError: the library is not installed, or there are no credentials.
  """
  extra, module = MODULES[address.scheme]
  try:
    extras.require(extra, str(address), module)
    if address.scheme == "gs":
      from grpo_jax.run.gcs import Gcs as Chosen
    else:
      from grpo_jax.run.s3 import S3 as Chosen
    return Store(address, Chosen(address.bucket), seconds)
  except ModuleNotFoundError as error:
    raise StoreError(str(error)) from error
  except Refused as error:
    raise StoreError(f"{address}: {error}") from error


def busy(error: Exception) -> Busy:
  """Returns a Busy with the type and the first line of an error."""
  return Busy(first_line(error)[:200])
