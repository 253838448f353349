"""Reads checkpoints of a run, also beside the run while it saves new ones and deletes old ones.

A reader holds on to a checkpoint (`holding`). If the run had decided on a deletion just before, the
files vanish while they are read: then there is a newer checkpoint, and that one is read instead.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.run import checkpoint, workdir
from grpo_jax.run.holding import hold

T = TypeVar("T")
ATTEMPTS = 100  # checkpoints that may vanish while they are read, before it is an error
_PAUSE = 0.1  # seconds until a run that deletes a checkpoint has surely begun another one


def read_params(path: str | Path, like: Any = None, step: int | None = None) -> tuple[int, Any]:
  """Reads the trained parameters of a checkpoint, without the optimizer state.

  Args:
    path: the work directory of a run.
    like: parameters with the shapes, dtypes and shardings to restore to; None restores NumPy arrays
      on any number of devices.
    step: of the checkpoint; None is the newest one without damage.

  Returns:
    (step, trained parameters or adapters).

  Raises:
    FileNotFoundError: there is no such checkpoint.
    WorkdirError: it is damaged; for None, all of them are.
  """
  return read_newest(path, lambda folder: _params(folder, like), step)


def read_newest(
  path: str | Path, read: Callable[[Path], T], step: int | None = None
) -> tuple[int, T]:
  """Returns (step, `read(folder)`) for the newest checkpoint without damage.

  Args:
    path: the work directory of a run.
    read: reads the folder of a checkpoint; it may be called again for another one.
    step: of the only checkpoint to read; None is any.

  Raises:
    FileNotFoundError: there is no such checkpoint.
    WorkdirError: it is damaged; for None, all of them are.
  """
  folder, damaged = checkpoint.folder(path), {}
  for _ in range(ATTEMPTS):
    steps = _choose(folder, step)
    for number in steps:
      problem, error, value = _read(folder / str(number), read)
      if not problem:
        for other, text in damaged.items():
          print(f"warning: checkpoint {other} is damaged: {text}; it is skipped", file=sys.stderr)
        return number, value
      time.sleep(_PAUSE)
      if _choose(folder, step) != steps:
        break  # a run has saved or deleted one meanwhile
      if error is not None:
        raise error
      damaged[number] = problem
    else:
      lines = "".join(f"\n  - {number}: {damaged[number]}" for number in steps)
      raise workdir.WorkdirError(f"all of these checkpoints in {folder} are damaged:{lines}")
  raise workdir.WorkdirError(
    f"{ATTEMPTS} checkpoints in {folder} were deleted while they were read: set checkpoint.keep or "
    "checkpoint.every of the run higher"
  )


def _choose(folder: Path, step: int | None) -> list[int]:
  """Returns the steps of the finished checkpoints, newest first, or just `step`."""
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder.parent} holds no checkpoints: not the work directory of a run, or of one that has "
      "saved nothing yet"
    )
  for _ in range(20):
    # A checkpoint gets its name, the number of its step, when it is whole.
    steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
    if steps:
      break
    # A listing may miss the new name and the old one, where a run changes the folder meanwhile.
    time.sleep(_PAUSE / 2)
  if not steps or (step is not None and step not in steps):
    wanted = "complete checkpoint" if step is None else f"checkpoint of step {step}"
    raise FileNotFoundError(f"there is no {wanted} in {folder}; there are: {steps[::-1]}")
  return steps if step is None else [step]


def _read(folder: Path, read: Callable[[Path], T]) -> tuple[str, Exception | None, T | None]:
  """Returns (what is wrong or "", the error that is not damage of the files, the value)."""
  with hold(folder / checkpoint.DIGESTS):
    problems = checkpoint.find_damage(folder)
    if problems:
      return problems[0], None, None
    try:
      return "", None, read(folder)
    except Exception as error:
      text = f"it cannot be read: {type(error).__name__}"
      # With digests that match, the files are what was written: the error is another one.
      return text, None if problems is None else error, None


def _params(folder: Path, like: Any) -> Any:
  """Reads the parameters in the folder of a checkpoint, whatever other processes do."""
  handler, options = checkpoint.alone()
  with ocp.Checkpointer(handler, **options) as reader:
    if like is None:
      saved = handler.metadata(folder / "default").tree["params"]
      item = jax.tree.map(lambda _: 0, saved)
      how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    else:
      item = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      how = ocp.checkpoint_utils.construct_restore_args(item)
    arguments = ocp.args.PyTreeRestore(
      item={"params": item}, restore_args={"params": how}, partial_restore=True
    )
    return reader.restore(folder / "default", args=arguments)["params"]
