"""Checkpoints: parameters, optimizer state, a moving reference and the number of updates.

That is everything: data order and random streams are functions of (seed, step). A checkpoint is
written to a folder of another name, which gets the digests of its files last and is then renamed:
a kill leaves all of it or nothing, and damage that comes later is found before it is read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from grpo_jax.distributed import hosts
from grpo_jax.errors import first_line
from grpo_jax.learning.step import TrainState
from grpo_jax.run import workdir as workdirs

DIGESTS = "sha256.json"
DAMAGED = "damaged"  # the folder of a work directory that damaged checkpoints are moved to
# Orbax writes the time of the rename into it, after the digests; nothing is read from it.
_UNCHECKED = (DIGESTS, "_CHECKPOINT_METADATA")


class SaveError(OSError):
  """A checkpoint could not be written; those before it are intact."""


class Checkpoints:
  """The checkpoints of one work directory, written in the background, the newest `keep` kept.

  Args:
    read_only: change nothing in the directory: for readers beside a run that writes.
  """

  def __init__(self, workdir: str | Path, keep: int, read_only: bool = False) -> None:
    self._folder, self._read_only = folder(workdir), read_only
    self._saving: int | None = None  # the step being written
    self._bytes = 0  # of a checkpoint
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=not read_only,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._before_the_rename,
        # If that fails in the background, the process cannot end for minutes.
        create_directories_asynchronously=False,
      ),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def latest(self) -> int | None:
    """Steps finished in the newest checkpoint, damaged or not; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; returns once the arrays are copied to the host.

    Errors: SaveError, also for an earlier one that failed meanwhile.
    """
    with self._explained():
      self._manager.wait_until_finished()
      self._saving, tree = step, state.to_dict()
      self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
      self._manager.save(step, args=ocp.args.StandardSave(tree))

  def check(self) -> None:
    """Raises SaveError if what was written in the background has failed; waits for nothing."""
    with self._explained():
      if not self._manager.is_saving_in_progress():
        self._manager.wait_until_finished()

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state after `step` steps, with the shapes, dtypes and layout of `like`."""
    wanted = like.to_dict()
    if not self._holds(step, "history"):  # older than skipped updates: as if none had been seen
      wanted.pop("history", None)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    state = TrainState.from_dict(tree)
    if state.history is None:
      state = dataclasses.replace(state, history=like.history)
    return state

  def _holds(self, step: int, name: str) -> bool:
    with ocp.StandardCheckpointer() as reader:
      found = reader.metadata(self._manager.directory / str(step) / "default").item_metadata
    return name in found

  def resume(self, like: TrainState, tell: Callable[[str], object]) -> tuple[int, TrainState]:
    """(steps finished, state) of the newest checkpoint without damage; (0, like) if there is none.

    Damaged ones after it are moved to `damaged/`, as those steps are run and saved again, and
    `tell` gets a line about each. A checkpoint without digests (of an earlier version) counts as
    damaged if it cannot be read. Many hosts check one part of the files each, and all have to call.

    Errors: WorkdirError if all checkpoints are damaged; nothing is moved then.
    """
    found: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      wrong = damage(self._folder / str(step), *hosts.own_shard())
      state, first = None, next(iter(hosts.gathered_json(wrong or [])), "")
      if not first:
        try:
          state = self.restore(step, like)
        except Exception as error:
          if wrong is not None or jax.process_count() > 1:
            raise
          first = f"it has no {DIGESTS} and cannot be read: {type(error).__name__}"
      if state is None:
        found[step] = first
        continue
      for bad, why in found.items():
        tell(f"checkpoint {bad} is damaged: {why}; {self._set_aside(bad)}")
      if found:
        tell(f"continuing from checkpoint {step}, the newest that is whole")
        self._manager.reload()
      return step, state
    if found:
      lines = "".join(f"\n  - {step}: {why}" for step, why in found.items())
      raise workdirs.WorkdirError(
        f"every checkpoint in {self._folder} is damaged, and nothing was changed:{lines}\nPut "
        "back a copy of one of them, or start again with a new --workdir"
      )
    return 0, like

  def close(self) -> None:
    """Waits for what is still being written. Errors: SaveError."""
    with self._explained():
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _before_the_rename(self) -> None:
    """Called by orbax when all files of a checkpoint are written, before it gets its name."""
    if hosts.is_first():
      names = (str(self._saving), f"{self._saving}.")
      for path in self._folder.iterdir():
        if path.name == names[0] or path.name.startswith(names[1]):
          write_digests(path)

  def _set_aside(self, step: int) -> str:
    """Moves a checkpoint out of the way; what was done, in words."""
    if self._read_only:
      return "it is left out"
    target = self._folder.parent / DAMAGED / str(step)
    if hosts.is_first():
      number = 1
      while target.exists():
        number += 1
        target = target.with_name(f"{step}-{number}")
      target.parent.mkdir(exist_ok=True)
      os.rename(self._folder / str(step), target)
    hosts.exchange()  # the others list the folder once it is gone
    return f"it is kept in {target.parent}"

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      reason = "the file system is full" if workdirs.is_full(error) else first_line(error)
      raise SaveError(
        f"the checkpoint of step {self._saving} could not be saved: {reason}. It takes up to "
        f"{self._bytes / 2**20:.1f} MiB; {workdirs.room(self._folder)}. Those before it are intact"
      ) from error


def folder(workdir: str | Path) -> Path:
  """Where the checkpoints of a work directory are (absolute, as orbax wants it)."""
  return Path(workdir).resolve() / "checkpoints"


# --- digests --------------------------------------------------------------------------------------


def write_digests(checkpoint: Path) -> None:
  """Puts size and SHA-256 of every file of a checkpoint beside them."""
  files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
  files = [path for path in files if path.name not in _UNCHECKED]
  with ThreadPoolExecutor() as pool:
    digests = dict(zip([str(p.relative_to(checkpoint)) for p in files], pool.map(_digest, files)))
  workdirs.write_whole(checkpoint / DIGESTS, json.dumps(digests, indent=1) + "\n")


def damage(checkpoint: Path, block: int = 0, blocks: int = 1) -> list[str] | None:
  """What differs from the digests of a checkpoint, in words; None where it has no digests.

  With `blocks`, only every file `block` modulo `blocks` is read.
  """
  if not (checkpoint / DIGESTS).is_file():
    return None
  try:
    wanted = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
    mine = sorted((name, *digest) for name, digest in wanted.items())[block::blocks]
  except (ValueError, TypeError, AttributeError, OSError) as error:
    return [f"{DIGESTS} cannot be read ({first_line(error)})"]
  with ThreadPoolExecutor() as pool:
    found = pool.map(lambda row: _difference(checkpoint / row[0], *row[1:]), mine)
  return [f"{row[0]} {text}" for row, text in zip(mine, found) if text]


def _digest(path: Path) -> tuple[int, str]:
  with path.open("rb") as file:
    return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: Path, size: int, digest: str) -> str:
  """How a file differs from what it was; empty if it does not."""
  try:
    if path.stat().st_size != size:
      return f"has {path.stat().st_size} bytes instead of {size}"
    return "" if _digest(path)[1] == digest else "has other contents than were written"
  except OSError as error:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
