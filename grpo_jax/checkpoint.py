"""Checkpoints: parameters, optimizer state, a moving reference and the number of updates.

That is everything: data order and random streams are functions of (seed, step).
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.train_step import TrainState

CONFIG = "config.json"


class Checkpoints:
  """The checkpoints of one work directory, written in the background, the newest `keep` kept."""

  def __init__(self, workdir: str | Path, keep: int) -> None:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    self._manager = ocp.CheckpointManager(folder(workdir), options=options)

  def latest(self) -> int | None:
    """Steps finished in the newest complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; returns once the arrays are copied to the host."""
    self._manager.save(step, args=ocp.args.StandardSave(_tree(state)))

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state after `step` steps, with the shapes, dtypes and layout of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
    tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    return TrainState(**tree)

  def close(self) -> None:
    """Waits for what is still being written."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def folder(workdir: str | Path) -> Path:
  """Where the checkpoints of a work directory are (absolute, as orbax wants it)."""
  return Path(workdir).resolve() / "checkpoints"


def write_config(workdir: str | Path, config: dict[str, Any]) -> None:
  """Puts the config of the run beside its checkpoints."""
  path = Path(workdir) / CONFIG
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(workdir: str | Path) -> dict[str, Any] | None:
  """The config that the work directory was started with; None in a new one."""
  path = Path(workdir) / CONFIG
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _tree(state: TrainState) -> dict[str, Any]:
  tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
  return tree if state.reference is None else tree | {"reference": state.reference}
