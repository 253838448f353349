"""Saves and restores checkpoints: parameters, optimizer state, moving reference, update count.

Nothing else is needed: random streams are functions of (seed, step), and so is the order of the
data, except that a curriculum also needs the counts of its problems, which are saved. Rollouts that
are ahead of the updates are from earlier parameters: their completions are saved. A checkpoint is
written to a folder with a temporary name; the digests of its files come last, then the folder is
renamed. A kill leaves a complete checkpoint or none, and later damage is found before it is read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.distributed import hosts
from grpo_jax.errors import first_line
from grpo_jax.learning.step import TrainState
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.holding import KeepNewest

DIGESTS = "sha256.json"
PENDING = "pending"  # field of the tree that holds rollouts ahead of the updates
DAMAGED = "damaged"  # folder of a work directory that damaged checkpoints are moved to
# Files without a digest. Orbax writes the time of the rename into the second one, after the
# digests; nothing is read from it.
UNCHECKED = (DIGESTS, "_CHECKPOINT_METADATA")
_COMMIT = "commit_success.txt"  # in the folder itself, orbax makes it after the digests


class SaveError(OSError):
  """Reports that a checkpoint could not be written; earlier checkpoints are intact."""


class NotFiniteError(RuntimeError):
  """Reports that a state holds NaN or infinity and was not saved."""


def not_finite(tree: Any) -> list[str]:
  """Returns the paths of the floating-point arrays that hold NaN or infinity.

  Example:
    >>> not_finite({"a": jnp.ones(2), "b": {"c": jnp.array([1.0, jnp.inf])}, "n": jnp.array([3])})
    ['b/c']
  """
  leaves = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  finite = jax.device_get(_all_finite([leaf for _, leaf in leaves]))
  return [name for (name, _), ok in zip(leaves, finite) if not ok]


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(array).all() for array in arrays]


class Checkpoints:
  """Writes the checkpoints of one work directory in the background and restores them.

  Use it as a context manager, or call `close`.

  Args:
    workdir: the work directory.
    keep: number of checkpoints to keep, the newest ones; more while others are being read.
    read_only: change nothing in the directory. Beside a run that writes, use `reading`.
    publish: called with the folder of each checkpoint that is written, and its step, before it
      counts here; it makes the digests. Several hosts then have a work directory each: a host
      writes its shards of a checkpoint to its own, calls `publish`, and waits for no other host.

  Attributes:
    pending: rollouts ahead of the updates, from the checkpoint that was restored last; see `save`.
  """

  def __init__(
    self,
    workdir: str | Path,
    keep: int,
    read_only: bool = False,
    publish: Callable[[Path, int], object] | None = None,
  ) -> None:
    self._folder, self._read_only = folder(workdir), read_only
    self.pending: dict[str, np.ndarray] = {}
    self._publish = publish or (lambda path, step: write_digests(path))
    self._alone = publish is not None and jax.process_count() > 1
    self._saving: int | None = None  # step of the checkpoint that is being written
    self._bytes = 0  # size of a checkpoint
    handler, own = None, {}
    if self._alone:
      handler, own = alone()
      self._folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=KeepNewest(self._folder, DIGESTS, keep),
      create=not read_only and not self._alone,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._before_rename,
        # orbax: if this fails in the background, the process cannot end for minutes.
        create_directories_asynchronously=False,
      ),
      **own,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handler)

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, damaged or not; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, pending: dict[str, Any] | None = None) -> None:
    """Starts saving the state after `step` steps; returns once the arrays are copied to the host.

    Args:
      pending: rollouts that are ahead of the updates: NumPy arrays by name, alike on all hosts.

    Raises:
      SaveError: this checkpoint, or an earlier one in the background, could not be written.
      NotFiniteError: the parameters or the optimizer state hold NaN or infinity.
    """
    if names := not_finite({"params": state.params, "opt_state": state.opt_state}):
      last = self.latest()
      rest = "there is no checkpoint" if last is None else f"the last checkpoint is of step {last}"
      raise NotFiniteError(
        f"the state after step {step} holds NaN or infinity, in {', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}: it is not saved, and {rest}. "
        "Lower optimizer.learning_rate or raise optimizer.eps"
      )
    with self._explain_errors():
      self._manager.wait_until_finished()
      self._saving, tree = step, state.to_dict()
      if pending:
        tree[PENDING] = pending
      self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
      save = ocp.args.PyTreeSave if self._alone else ocp.args.StandardSave
      self._manager.save(step, args=save(tree))

  def check(self) -> None:
    """Checks for errors in the background without waiting.

    Raises:
      SaveError: the last checkpoint could not be written.
    """
    with self._explain_errors():
      if not self._manager.is_saving_in_progress():
        self._manager.wait_until_finished()

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Reads the state after `step` steps, with the shapes, dtypes and shardings of `like`.

    The counts of a curriculum are those of `like` if the checkpoint holds none, or those of another
    number of problems.
    """
    tree, saved = like.to_dict(), self._fields(step)
    if "history" not in saved:  # saved by a version without skipped updates
      tree.pop("history", None)
    tree.pop("counts", None)
    if "counts" in saved:
      tree["counts"] = np.zeros(saved["counts"].shape, saved["counts"].dtype)
    if PENDING in saved:
      tree[PENDING] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), saved[PENDING])
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    if self._alone:
      how = ocp.checkpoint_utils.construct_restore_args(abstract)
      arguments = ocp.args.PyTreeRestore(abstract, restore_args=how)
    else:
      arguments = ocp.args.StandardRestore(abstract)
    tree = self._manager.restore(step, args=arguments)
    self.pending = jax.tree.map(np.asarray, tree.pop(PENDING, {}))
    state = TrainState.from_dict(tree)
    if state.history is None:
      state = dataclasses.replace(state, history=like.history)
    if np.shape(state.counts) != np.shape(like.counts):
      state = dataclasses.replace(state, counts=like.counts)
    return state

  def _fields(self, step: int) -> dict[str, Any]:
    """Returns the fields of the state in a checkpoint, with the metadata of their arrays."""
    with ocp.StandardCheckpointer() as reader:
      return reader.metadata(self._manager.directory / str(step) / "default").item_metadata

  def resume(self, like: TrainState, log: Callable[[str], object]) -> tuple[int, TrainState]:
    """Restores the newest checkpoint without damage.

    Newer, damaged checkpoints are moved to `damaged/`: their steps are run and saved again. A
    checkpoint without digests (from an earlier version) counts as damaged if it cannot be read. All
    hosts have to call this; each checks its share of the files, or all of a copy of its own.

    Args:
      like: state with the shapes, dtypes and shardings to restore to.
      log: called with a line about each damaged checkpoint.

    Returns:
      (number of finished steps, state); (0, like) if there is no checkpoint.

    Raises:
      WorkdirError: all checkpoints are damaged. None is moved.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      shard = () if self._alone else hosts.own_shard()
      problems = find_damage(self._folder / str(step), *shard)
      state, problem = None, next(iter(hosts.gathered_json(problems or [])), "")
      if not problem:
        try:
          state = self.restore(step, like)
        except Exception as error:
          if problems is not None or jax.process_count() > 1:
            raise
          problem = f"it has no {DIGESTS} and cannot be read: {type(error).__name__}"
      if state is None:
        damaged[step] = problem
        continue
      for other, problem in damaged.items():
        log(f"checkpoint {other} is damaged: {problem}; {self._set_aside(other)}")
      if damaged:
        log(f"continuing from checkpoint {step}, the newest without damage")
        self._manager.reload()
      return step, state
    if damaged:
      lines = "".join(f"\n  - {step}: {problem}" for step, problem in damaged.items())
      raise workdirs.WorkdirError(
        f"every checkpoint in {self._folder} is damaged, and nothing was changed:{lines}\nPut "
        "back a copy of one of them, or start again with a new --workdir"
      )
    return 0, like

  def close(self) -> None:
    """Waits until the last checkpoint is written.

    Raises:
      SaveError: it could not be written.
    """
    with self._explain_errors():
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _before_rename(self) -> None:
    """Adds the digests; orbax calls this after it wrote all files and before the rename."""
    if hosts.is_first() or self._alone:
      names = (str(self._saving), f"{self._saving}.")
      for path in self._folder.iterdir():
        if path.name == names[0] or path.name.startswith(names[1]):
          self._publish(path, self._saving)

  def _set_aside(self, step: int) -> str:
    """Moves a checkpoint to `damaged/`, if that is allowed; returns a phrase about it."""
    if self._read_only:
      return "it is skipped"
    target = self._folder.parent / DAMAGED / str(step)
    if hosts.is_first() or self._alone:
      number = 1
      while target.exists():
        number += 1
        target = target.with_name(f"{step}-{number}")
      target.parent.mkdir(exist_ok=True)
      os.rename(self._folder / str(step), target)
    hosts.exchange()  # the other hosts list the folder only after the rename
    return f"it is kept in {target.parent}"

  @contextlib.contextmanager
  def _explain_errors(self) -> Iterator[None]:
    """Turns any error of the body into a `SaveError` with its reason and the free space."""
    try:
      yield
    except Exception as error:
      reason = "the file system is full" if workdirs.is_full(error) else first_line(error)
      if isinstance(error, workdirs.WorkdirError):  # of a store, with its remedy
        raise SaveError(
          f"the checkpoint of step {self._saving} could not be saved: {error}. Earlier checkpoints "
          "are intact"
        ) from error
      raise SaveError(
        f"the checkpoint of step {self._saving} could not be saved: {reason}. It takes up to "
        f"{self._bytes / 2**20:.1f} MiB; {workdirs.free_space(self._folder)}. Earlier checkpoints "
        "are intact"
      ) from error


def alone() -> tuple[ocp.PyTreeCheckpointHandler, dict[str, Any]]:
  """Returns a handler and options with which orbax in this process never waits for the other ones.

  It writes a file for each shard of this process, every shard on one process only: the files of all
  together are a checkpoint. It reads what it needs from a whole copy.
  """
  options = ocp.options.MultiprocessingOptions(
    primary_host=None, active_processes={jax.process_index()}
  )
  # orbax: the handlers of types that all its objects share wait for the first process once another
  # object has been made, so these are our own.
  types = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  own = {"multiprocessing_options": options}
  return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=types, **own), own


def folder(workdir: str | Path) -> Path:
  """Returns the folder of a work directory's checkpoints, absolute, as orbax requires."""
  return Path(workdir).resolve() / "checkpoints"


def remedy(error: BaseException) -> str:
  """Returns a clause that follows the message of a SaveError, or of a full file system."""
  if isinstance(error.__cause__, workdirs.WorkdirError):
    return ""  # the error of a store has it
  return ". Make room; then the same command continues"


# --- digests --------------------------------------------------------------------------------------


def write_digests(checkpoint: Path) -> None:
  """Writes the size and the SHA-256 of every file of a checkpoint to `sha256.json` in it."""
  sizes, _ = _list_files(checkpoint)
  names = [name for name in sorted(sizes) if _is_checked(name)]
  with ThreadPoolExecutor() as pool:
    hashes = pool.map(lambda name: _digest(checkpoint / name), names)
    digests = {name: (sizes[name], digest) for name, digest in zip(names, hashes)}
  workdirs.write_whole(checkpoint / DIGESTS, json.dumps(digests, indent=1) + "\n")


def names_in(digests: bytes) -> list[str]:
  """Returns the names of the files that digests list; none if they are damaged."""
  try:
    return list(_parse_digests(digests.decode()))
  except (ValueError, RecursionError):
    return []


def find_damage(checkpoint: Path, shard: int = 0, shards: int = 1) -> list[str] | None:
  """Compares the files of a checkpoint with its digests, which must list all of them.

  Only regular files in the folder are read: no links, no devices, and nothing outside it.

  Args:
    checkpoint: the folder.
    shard, shards: read only every file whose number is `shard` modulo `shards`.

  Returns:
    A phrase for each file that differs; None if the checkpoint has no digests.
  """
  if not os.path.lexists(checkpoint / DIGESTS):
    return None
  sizes, others = _list_files(checkpoint)
  if DIGESTS not in sizes:
    return [f"{DIGESTS} is not a regular file"]
  try:
    digests = _read_digests(checkpoint / DIGESTS)
  except (ValueError, OSError, RecursionError) as error:
    return [f"{DIGESTS} cannot be read ({first_line(error)})"]
  problems = [f"{name} is not a regular file" for name in others]
  unlisted = sorted(name for name in set(sizes) - set(digests) if _is_checked(name))
  problems += [f"{name} is not listed in {DIGESTS}" for name in unlisted]
  rows = sorted(digests.items())[shard::shards]
  with ThreadPoolExecutor() as pool:
    differences = pool.map(
      lambda row: _difference(checkpoint / row[0], sizes.get(row[0]), *row[1]), rows
    )
    found = [
      f"{name} {difference}" for (name, _), difference in zip(rows, differences) if difference
    ]
  return [*problems, *found] if shard == 0 else found


def _list_files(folder: Path) -> tuple[dict[str, int], list[str]]:
  """Returns the size of each regular file in a folder by its name, and the names of links etc."""
  sizes, others = {}, []
  for parent, folders, files in os.walk(folder):  # does not follow links
    for path in (Path(parent, name) for name in (*folders, *files)):
      name = path.relative_to(folder).as_posix()
      with contextlib.suppress(FileNotFoundError):  # a run may remove the checkpoint meanwhile
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
          sizes[name] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
          others.append(name)
  return sizes, sorted(others)


def _is_checked(name: str) -> bool:
  return Path(name).name not in UNCHECKED and name != _COMMIT


def _read_digests(path: Path) -> dict[str, tuple[int, str]]:
  """Reads name -> (size, SHA-256).

  Raises:
    ValueError: the file holds something else.
  """
  return _parse_digests(path.read_text(encoding="utf-8"))


def _parse_digests(text: str) -> dict[str, tuple[int, str]]:
  digests = json.loads(text)
  rows = digests.values() if isinstance(digests, dict) else [None]
  for row in rows:
    if not (isinstance(row, list) and list(map(type, row)) == [int, str]):
      raise ValueError("it must hold the size and the SHA-256 of each file by its name")
  return {name: tuple(row) for name, row in digests.items()}


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: Path, actual_size: int | None, size: int, digest: str) -> str:
  """Returns a phrase about how a file differs from its digest; empty if it does not.

  Args:
    path: the file; read only if it has the size.
    actual_size: its size; None if it is not a regular file of the checkpoint.
  """
  if actual_size is None:
    return "is missing"
  if actual_size != size:
    return f"has {actual_size} bytes instead of {size}"
  try:
    return "" if _digest(path) == digest else "has other contents than were written"
  except OSError as error:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
