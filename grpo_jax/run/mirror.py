"""Stages a work directory of a store in a folder of this machine, and keeps the two alike.

A run works in the folder as in any other. `opened` takes the lease and downloads what the run
reads; files that change are uploaded whole, every `PERIOD` seconds and before a checkpoint counts.
A checkpoint counts from when its digests are there, which are uploaded last. Several hosts have a
folder each: all download, each uploads its shards of a checkpoint, and the first one, which holds
the lease, uploads everything else and makes the checkpoint count.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from grpo_jax import addresses
from grpo_jax.addresses import Address
from grpo_jax.distributed import hosts
from grpo_jax.run import checkpoint
from grpo_jax.run.lease import PROBE, Lease, LeaseLost, confirm_token
from grpo_jax.run.stores import Entry, Store, StoreError, in_parallel, open_store
from grpo_jax.run.workdir import LOCK, WorkdirError, path_of

CHECKPOINTS = "checkpoints"
PERIOD = 30.0  # seconds between uploads of changed files
PEERS = 1800.0  # seconds until the other hosts must have uploaded their files of a checkpoint
STAGES = "GRPO_JAX_STAGES"  # environment variable: the parent of the folders of this machine
ATTEMPTS = 10  # checkpoints that a run may remove while they are copied
_LARGE = 8 * 2**20  # bytes from which a file is uploaded in parts
_CLOSING = 10.0  # seconds for the last requests after a failure
_POLL = 0.2  # seconds between looks at what the other hosts have uploaded
# Files that all hosts write alike, or each for itself: only the first host uploads its own.
_COMMON = {
  checkpoint.DIGESTS, "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "commit_success.txt",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run works.

  Attributes:
    folder: the work directory on this machine.
    mirror: what keeps it and the store alike; None without a store.
  """

  folder: Path
  mirror: "Mirror | None" = None


def place_of(workdir: str | Path | Address) -> Path | Address:
  """Returns the path of a work directory on this machine, or its address on a store.

  Raises:
    WorkdirError: it can be neither.
  """
  try:
    place = addresses.parse(workdir)
  except addresses.AddressError as error:
    raise WorkdirError(f"the work directory: {error}") from None
  return place if isinstance(place, Address) else path_of(workdir)


def folder_of(workdir: Path | Address, index: int = 0) -> Path:
  """Returns the folder of this machine that a work directory is staged in, or is.

  Args:
    index: of the process, of several on this machine that have their own.
  """
  if isinstance(workdir, Path):
    return workdir
  parent = os.environ.get(STAGES)
  if not parent:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parent = Path(caches) / "grpo_jax" / "stages"
  name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
  return Path(parent) / (f"{name}-{index}" if index else name) / PurePosixPath(workdir.prefix).name


@contextlib.contextmanager
def opened(workdir: str | Path | Address | Place) -> Iterator[Place]:
  """Opens a work directory for a run. All hosts call it.

  Raises:
    WorkdirError: another run uses it, or its store cannot be used.
  """
  if isinstance(workdir, Place):
    yield workdir
    return
  address = place_of(workdir)
  if isinstance(address, Path):
    yield Place(address)
    return
  index, count = hosts.own_shard()
  folder = folder_of(address, index)
  with contextlib.ExitStack() as stack, _named(folder, address):
    with hosts.together("taking the work directory"):
      lease = stack.enter_context(_leased(open_store(address))) if hosts.is_first() else None
    [token] = hosts.gathered_json([lease.token] if lease else [])
    mirror = Mirror(open_store(address), folder, lease, (index, count), token)
    with hosts.together("reading the work directory"):
      steps = mirror.download()
    steps = hosts.gathered_json(steps if lease else [])
    with hosts.together("reading the checkpoints"):
      mirror.take_checkpoints(steps)
    with mirror:
      yield Place(folder, mirror)


@contextlib.contextmanager
def _leased(store: Store) -> Iterator[Lease]:
  """Holds the lease of a work directory."""
  lease = Lease(store)
  lease.acquire()
  try:
    yield lease
  finally:
    with contextlib.suppress(StoreError), store.limited(_CLOSING):
      lease.release()


@contextlib.contextmanager
def _named(folder: Path, address: Address) -> Iterator[None]:
  """Puts the address in place of the folder that it is staged in, in the message of an error."""
  try:
    yield
  except Exception as error:
    error.args = tuple(
      text.replace(str(folder), str(address)) if isinstance(text, str) else text
      for text in error.args
    )
    raise


class Mirror:
  """Keeps a folder of this machine and one of a store alike.

  Use it as a context manager: it uploads what changes until its end.

  Args:
    store: the folder of the store.
    folder: the one of this machine.
    lease: of the work directory, held by the first host; None on the others.
    shard: index and number of the hosts.
    token: of the lease.
  """

  def __init__(
    self, store: Store, folder: Path, lease: Lease | None, shard: tuple[int, int], token: str
  ) -> None:
    self.store, self.folder, self._lease, self._token = store, folder, lease, token
    self._index, self._count = shard
    self._alike: dict[str, tuple[int, int]] = {}  # stamps of the files that the store has
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._failing = ""  # the error of the last upload of changed files

  # --- from the store

  def download(self) -> list[int]:
    """Makes the folder what the store has: files that runs read, and the newest whole checkpoint.

    Other files become empty ones, which stand for those of the store. Parts of a checkpoint that
    was never whole are removed from the store.

    Returns:
      The steps of the checkpoints that are in the folder now: a whole one, and newer, damaged ones.
    """
    entries = [entry for entry in self.store.list() if _is_file(entry.name)]
    steps = _steps(entries)
    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_others(self.folder, {LOCK, CHECKPOINTS})
    _remove_others(self.folder / CHECKPOINTS, set(map(str, steps)))

    def get(entry: Entry) -> None:
      path = self.folder / entry.name
      if _is_read(entry.name):
        self.store.download(entry.name, path)
      else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    files = [entry for entry in entries if not _of_checkpoint(entry.name)]
    in_parallel(get, files)
    self._alike = {entry.name: _stamp(self.folder / entry.name) for entry in files}
    if self._lease:
      whole = tuple(f"{CHECKPOINTS}/{step}/" for step in steps)
      parts = [entry.name for entry in entries if _of_checkpoint(entry.name)]
      in_parallel(self.store.remove, [name for name in parts if not name.startswith(whole)])
    chosen = fetch_checkpoint(self.store, self.folder, entries)
    _remove_others(self.folder / CHECKPOINTS, set(map(str, chosen)))
    return chosen

  def take_checkpoints(self, steps: list[int]) -> None:
    """Makes the checkpoints in the folder those that the first host has chosen, if they differ."""
    folder = self.folder / CHECKPOINTS
    _remove_others(folder, set(map(str, steps)))
    for step in steps:
      if not (folder / str(step)).exists():
        _fetch(self.store, folder / str(step), step, self.store.list(f"{CHECKPOINTS}/"))

  def fetch_newest(self) -> None:
    """Makes the newest checkpoint of the store whole in the folder."""
    fetch_checkpoint(self.store, self.folder, self.store.list(f"{CHECKPOINTS}/"))

  # --- to the store

  def sync(self) -> None:
    """Uploads files that have changed, and removes those from the store that are gone.

    Does nothing on hosts other than the first.

    Raises:
      LeaseLost: another run has taken the work directory; nothing is written.
      StoreError: the store does not answer.
    """
    if not self._lease:
      return
    with self._lock:
      self._lease.confirm()
      stamps = {}
      for path in self.folder.rglob("*"):
        name = path.relative_to(self.folder).as_posix()
        if _is_file(name) and not _of_checkpoint(name) and not path.is_symlink():
          with contextlib.suppress(FileNotFoundError):
            if path.is_file():
              stamps[name] = _stamp(path)

      def put(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
          self._write(name, self.folder / name)
          self._alike[name] = stamps[name]

      def remove(name: str) -> None:
        self.store.remove(name)
        del self._alike[name]

      in_parallel(put, [name for name, stamp in stamps.items() if self._alike.get(name) != stamp])
      in_parallel(remove, [name for name in [*self._alike] if name not in stamps])

  def publish(self, folder: Path, step: int, keep: int) -> None:
    """Uploads a checkpoint that is written, so that it counts, and removes older ones.

    Everything else that has changed is uploaded before it counts. All hosts call it, and none waits
    but the first one, which adds the digests when those of the other hosts are in the store.

    Args:
      folder: holds the files that this host has written.
      keep: number of checkpoints to keep.

    Raises:
      LeaseLost: another run has taken the work directory.
      StoreError: the store does not answer, or another host did not upload its files in time.
    """
    root = f"{CHECKPOINTS}/{step}"
    checkpoint.write_digests(folder)
    self._upload(folder, root)
    own = (folder / checkpoint.DIGESTS).read_bytes()
    if not self._lease:
      self.store.write(self._part(root, self._index), own)
      return
    digests = self._with_others(own, root)
    self.sync()
    self._lease.confirm()
    self.store.write(f"{root}/{checkpoint.DIGESTS}", digests)
    entries = self.store.list(f"{CHECKPOINTS}/")
    self._remove_checkpoints([old for old in _steps(entries) if old < step][: 1 - keep or None])

  def resumed(self, step: int) -> None:
    """Removes checkpoints after `step` from the store: they are damaged, and kept elsewhere."""
    if not self._lease:
      return
    newer = [other for other in _steps(self.store.list(f"{CHECKPOINTS}/")) if other > step]
    if newer:
      self.sync()  # with the folder of damaged checkpoints
      self._remove_checkpoints(newer)

  def shown(self, text: str) -> str:
    """Returns a text with the address in place of the folder."""
    return text.replace(str(self.folder), str(self.store.address))

  def share(self, folder: Path) -> None:
    """Uploads a folder in the work directory that every host has written its part of.

    All hosts call it. Files of an earlier one of this name are removed from the store first.
    """
    with hosts.together("uploading files"):
      self.sync()
    with hosts.together("uploading files of each host"):
      if not self._lease:
        self._upload(folder, folder.relative_to(self.folder.absolute()).as_posix())

  def check(self) -> None:
    """Raises LeaseLost if it is known that another run has taken the work directory."""
    if self._lease:
      self._lease.check()

  def _remove_checkpoints(self, steps: list[int]) -> None:
    for step in steps:
      root = f"{CHECKPOINTS}/{step}"
      self.store.remove(f"{root}/{checkpoint.DIGESTS}")  # from now on it does not count
      in_parallel(self.store.remove, [entry.name for entry in self.store.list(f"{root}/")])

  def _upload(self, folder: Path, root: str) -> None:
    """Uploads the files that this host has written to a folder, but no digests."""
    if not self._lease:
      confirm_token(self.store, self._token)
    names = [
      path.relative_to(folder).as_posix()
      for path in sorted(folder.rglob("*"))
      if path.is_file() and path.name not in (_COMMON if self._index else {checkpoint.DIGESTS})
    ]
    in_parallel(lambda name: self._write(f"{root}/{name}", folder / name), names)

  def _part(self, root: str, index: int) -> str:
    return f"{root}/.host-{self._token}-{index}"

  def _with_others(self, own: bytes, root: str) -> bytes:
    """Returns the digests of the files of all hosts, once the others have uploaded theirs.

    Args:
      own: the digests of this host.
    """
    if self._count == 1:
      return own
    digests, deadline = {}, time.monotonic() + PEERS
    parts = [self._part(root, index) for index in range(1, self._count)]
    for index, part in enumerate(parts, 1):
      while (content := self.store.read(part)) is None:
        if time.monotonic() > deadline:
          raise StoreError(
            f"{self.store.address}: host {index} has not uploaded its files of {root} in {PEERS:g} "
            "s. See its log; the same command continues"
          )
        time.sleep(_POLL)
      digests |= json.loads(content)
    in_parallel(self.store.remove, parts)
    digests |= json.loads(own)
    return json.dumps(dict(sorted(digests.items())), indent=1).encode() + b"\n"

  def _write(self, name: str, path: Path) -> None:
    """Uploads a file: a small one as it is at one moment."""
    large = path.stat().st_size >= _LARGE
    self.store.write(name, path if large else path.read_bytes())

  # --- in the background

  def __enter__(self) -> "Mirror":
    self._thread = threading.Thread(target=self._keep, name="mirror", daemon=True)
    self._thread.start()
    return self

  def _keep(self) -> None:
    while not self._ended.wait(PERIOD):
      try:
        self.sync()
        self._failing = ""
      except LeaseLost:
        return  # the run looks for it
      except Exception as error:
        if not self._failing:
          print(f"warning: {error}. Trying again", file=sys.stderr)
        self._failing = str(error)

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._ended.set()
    self._thread.join()
    try:
      with self.store.limited(_CLOSING if kind else self.store.seconds):
        self.sync()
    except (StoreError, LeaseLost) as error:
      if kind is None:
        raise checkpoint.SaveError(f"the last files were not uploaded: {error}") from error
      if not isinstance(error, LeaseLost):
        print(f"warning: the last files were not uploaded: {error}", file=sys.stderr)


# --- readers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetched(
  workdir: str | Path | Address,
  choose: Callable[[list[str]], Iterable[str]] = lambda names: names,
  *,
  checkpoints: bool = False,
  step: int | None = None,
) -> Iterator[Path]:
  """Yields a work directory to read: the folder, or a copy of what the store has now.

  Args:
    workdir: a path, or an address.
    choose: chooses the files to copy from the names of all but those of checkpoints.
    checkpoints: copy the newest whole checkpoint as well, or that of `step`.

  Raises:
    WorkdirError: the store cannot be read, or has nothing there.
  """
  address = place_of(workdir)
  if isinstance(address, Path):
    yield address
    return
  with tempfile.TemporaryDirectory(prefix="grpo_jax_") as parent:
    copy = Copy(address, Path(parent))
    with _named(copy.folder, address):
      copy.refresh(choose)
      if checkpoints:
        copy.fetch_checkpoint(step)
      yield copy.folder


class Copy:
  """A copy of a folder of a store, to read.

  Args:
    address: of the folder.
    parent: a folder of this machine.

  Attributes:
    folder: the copy; its path ends like the address.
  """

  def __init__(self, address: Address, parent: Path) -> None:
    self._store = open_store(address)
    self.folder = parent / address.bucket / address.prefix
    self._entries: list[Entry] = []
    self._versions: dict[str, str] = {}

  def refresh(self, choose: Callable[[list[str]], Iterable[str]]) -> None:
    """Copies the chosen files that have changed, and removes those that are gone.

    Raises:
      StoreError: the store cannot be read, or has nothing there.
    """
    self._entries = [entry for entry in self._store.list() if _is_file(entry.name)]
    if not self._entries:
      raise StoreError(f"{self._store.address} holds nothing: give the work directory of a run")
    self.folder.mkdir(parents=True, exist_ok=True)
    versions = {e.name: e.version for e in self._entries if not _of_checkpoint(e.name)}
    chosen = set(choose(sorted(versions)))
    for name in self._versions.keys() - chosen:
      (self.folder / name).unlink(missing_ok=True)
    new = [name for name in sorted(chosen) if self._versions.get(name) != versions[name]]
    in_parallel(lambda name: self._store.download(name, self.folder / name), new)
    self._versions = {name: versions[name] for name in chosen}

  def fetch_checkpoint(self, step: int | None = None) -> None:
    """Copies the newest whole checkpoint, or that of `step`."""
    (self.folder / CHECKPOINTS).mkdir(exist_ok=True)
    for _ in range(ATTEMPTS):
      steps = fetch_checkpoint(self._store, self.folder, self._entries, step)
      if steps and not checkpoint.find_damage(self.folder / CHECKPOINTS / str(steps[-1])):
        return
      before, self._entries = _steps(self._entries), self._store.list()
      if before == _steps(self._entries):
        return  # the damage is reported by what reads it


@dataclasses.dataclass(frozen=True)
class Followed:
  """A work directory to read again and again.

  Attributes:
    folder: the work directory, or a copy of it.
    refresh: copies what has changed.
  """

  folder: Path
  refresh: Callable[[], None]


@contextlib.contextmanager
def followed(workdir: str | Path | Address) -> Iterator[Followed]:
  """Yields a work directory without its checkpoints, to read it again and again.

  Raises:
    WorkdirError: the store cannot be read, or has nothing there.
  """
  address = addresses.parse(workdir)
  if isinstance(address, Path):
    yield Followed(address, lambda: None)
    return
  # A refresh in another thread may still write to it.
  with tempfile.TemporaryDirectory(prefix="grpo_jax_", ignore_cleanup_errors=True) as parent:
    copy = Copy(address, Path(parent))
    refresh = partial(copy.refresh, _of_report)
    with _named(copy.folder, address):
      refresh()
      yield Followed(copy.folder, refresh)


def _of_report(names: Iterable[str]) -> list[str]:
  return [name for name in names if "/" not in name or name.startswith("samples/")]


def top_level(names: Iterable[str]) -> list[str]:
  """Chooses the files of a work directory that are in no folder.

  Example:
    >>> top_level(["config.json", "samples/step_000000.jsonl"])
    ['config.json']
  """
  return [name for name in names if "/" not in name]


def put_files(address: Address, folder: Path, name: str) -> None:
  """Uploads the files of a folder to one of a store.

  Raises:
    StoreError: the store cannot be written.
  """
  store = open_store(address)
  in_parallel(
    lambda path: store.write(f"{name}/{path.name}", path),
    [p for p in folder.iterdir() if p.is_file()],
  )


def fetch_checkpoint(
  store: Store, folder: Path, entries: list[Entry], step: int | None = None
) -> list[int]:
  """Copies the newest checkpoint without damage, and damaged ones that are newer.

  Args:
    entries: all objects of the store.
    step: of the only checkpoint to copy; None is any.

  Returns:
    The steps of the checkpoints that are in the folder now, and whole in the store.
  """
  chosen = []
  for number in reversed(_steps(entries)):
    if step is not None and number != step:
      continue
    if not _fetch(store, folder / CHECKPOINTS / str(number), number, entries):
      continue  # it was removed meanwhile
    chosen.append(number)
    if not checkpoint.find_damage(folder / CHECKPOINTS / str(number)):
      break
  return chosen


def _fetch(store: Store, target: Path, step: int, entries: list[Entry]) -> bool:
  """Copies a checkpoint, unless it is there already; returns whether it counts."""
  root = f"{CHECKPOINTS}/{step}/"
  digests = store.read(f"{root}{checkpoint.DIGESTS}")
  if digests is None:
    return False
  with contextlib.suppress(OSError):
    same = (target / checkpoint.DIGESTS).read_bytes() == digests
    if same and not checkpoint.find_damage(target):
      return True
  shutil.rmtree(target, ignore_errors=True)
  target.mkdir(parents=True)
  # By the digests, since a listing may lag behind; files without a digest are only listed.
  listed = {entry.name.removeprefix(root) for entry in entries if entry.name.startswith(root)}
  names = {name for name in listed if PurePosixPath(name).name in checkpoint.UNCHECKED}
  names |= {name for name in checkpoint.names_in(digests) if _is_file(name)}
  names -= {checkpoint.DIGESTS}
  in_parallel(lambda name: store.download(root + name, target / name), sorted(names))
  (target / checkpoint.DIGESTS).write_bytes(digests)
  return True


# --- names ----------------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
  """Tells whether a name is one of a file of a work directory, and stays inside of it.

  Example:
    >>> list(map(_is_file, ("metrics.jsonl", "a/b", "lock", "a/", "../a", "/a", "a/.b.part")))
    [True, True, False, False, False, False, False]
  """
  parts = name.split("/")
  return (
    name != LOCK
    and not name.startswith(PROBE)
    and not name.endswith(".part")
    and not {"", ".", ".."} & set(parts)
    and name.isprintable()
    and "\\" not in name
  )


def _of_checkpoint(name: str) -> bool:
  return name.startswith(f"{CHECKPOINTS}/")


def _is_read(name: str) -> bool:
  """Tells whether a run reads a file that an earlier one has written."""
  folder = name.partition("/")[0]
  return "/" not in name or folder == "compilation_cache" or (
    folder == "skipped" and name.endswith(".json")
  )  # fmt: skip


def _steps(entries: list[Entry]) -> list[int]:
  """Returns the steps of the checkpoints that count, in order."""
  found = (entry.name.split("/") for entry in entries)
  return sorted(
    int(parts[1])
    for parts in found
    if len(parts) == 3
    and parts[0] == CHECKPOINTS
    and parts[2] == checkpoint.DIGESTS
    and parts[1].isdecimal()
  )


def _stamp(path: Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_mtime_ns, status.st_size


def _remove_others(folder: Path, names: set[str]) -> None:
  """Removes everything from a folder but the entries of these names."""
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.name not in names:
      shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
