"""Skipped updates on disk: the batch, the state it met, and what came out, to be run again.

A dump is a folder: `config.json`, `recorded.json`, `batch/` and, unless an earlier dump holds the
same one, `state/`.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.distributed import hosts
from grpo_jax.learning.step import Batch, TrainState

FOLDER = "skipped"  # of a work directory
LIMIT = 3  # dumps that a work directory holds; later skipped updates are only told of
CONFIG, RECORDED = "config.json", "recorded.json"


@dataclasses.dataclass(frozen=True)
class Dump:
  """One skipped update.

  Attributes:
    path: its folder.
    config: of the run, as in `config.json`.
    recorded: step, update (of that step), metrics, devices, mesh, jax, and the name of the dump
      that holds the state.
  """

  path: Path
  config: dict[str, Any]
  recorded: dict[str, Any]

  def batch(self, layout: Any) -> Batch:
    """The batch; `layout` is that of everything with prompts as its first axis."""
    path = self.path.absolute() / "batch"
    with ocp.StandardCheckpointer() as checkpointer:
      found = checkpointer.metadata(path).item_metadata
      like = {
        name: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype, sharding=layout)
        for name in found
      }
      return Batch(**checkpointer.restore(path, like))

  def state(self, like: TrainState) -> TrainState:
    """The state that the update met, laid out as `like`."""
    path = self.path.absolute().parent / self.recorded["state_of"] / "state"
    with ocp.StandardCheckpointer() as checkpointer:
      like_tree = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
      tree = checkpointer.restore(path, like_tree)
    # The update made the row of skips one longer.
    history = dataclasses.replace(like.history, **tree.pop("history"))
    return TrainState(**tree, history=history)


def folder(workdir: str | Path, step: int, update: int) -> Path:
  """Where the dump of an update of a step is."""
  return Path(workdir).absolute() / FOLDER / f"step_{step:06d}_update_{update}"


def write(
  path: Path, config: dict[str, Any], state: TrainState, batch: Batch, recorded: dict[str, Any]
) -> None:
  """Writes a dump; all processes call it. It counts once `recorded.json` is there, the last file.

  Args:
    state: what the update left, which is what it met; written unless `recorded["state_of"]` names
      another dump.
  """
  if hosts.is_first():
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
  hosts.exchange()
  held = {name: value for name, value in vars(batch).items() if value is not None}
  with ocp.StandardCheckpointer() as checkpointer, jax.transfer_guard("allow"):
    checkpointer.save(path / "batch", held)
    if recorded["state_of"] == path.name:
      checkpointer.wait_until_finished()
      checkpointer.save(path / "state", _tree(state))
  if hosts.is_first():
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (path / RECORDED).write_text(json.dumps(recorded, indent=2) + "\n", "utf-8")
  hosts.exchange()  # so that all find it


def read(path: str | Path) -> Dump:
  """A dump without its arrays. Errors: ValueError where `path` is none."""
  path = Path(path)
  if not (path / RECORDED).is_file():
    raise ValueError(f"{path} holds no {RECORDED}: not the dump of an update, or not all of it")
  config, recorded = (json.loads((path / n).read_text("utf-8")) for n in (CONFIG, RECORDED))
  if not (path.absolute().parent / recorded["state_of"] / "state").is_dir():
    raise ValueError(f"{path} needs the state in the dump {recorded['state_of']!r} beside it")
  return Dump(path, config, recorded)


def whole(workdir: str | Path) -> list[Path]:
  """The complete dumps of a work directory."""
  return sorted(file.parent for file in (Path(workdir).absolute() / FOLDER).glob(f"*/{RECORDED}"))


def _tree(state: TrainState) -> dict[str, Any]:
  """What the update of a state depends on."""
  return {
    "step": state.step,
    "params": state.params,
    "opt_state": state.opt_state,
    "history": vars(state.history),
  }
