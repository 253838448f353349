"""Writes skipped updates to disk and reads them back, so that they can be run again.

A dump is a folder: `config.json`, `recorded.json`, `batch/` and, unless an earlier dump holds the
same one, `state/`.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from grpo_jax.distributed import hosts
from grpo_jax.distributed.mesh import Sharding
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.step import TrainState
from grpo_jax.learning.updates import SkippedUpdate
from grpo_jax.run import checkpoint

FOLDER = "skipped"  # of a work directory
LIMIT = 3  # dumps per work directory; later skipped updates are logged but not written
CONFIG, RECORDED = "config.json", "recorded.json"


@dataclasses.dataclass(frozen=True)
class Dump:
  """A skipped update on disk.

  Attributes:
    path: its folder.
    config: config of the run, as in `config.json`.
    recorded: step, update (number within the step), metrics, temperature, mesh, device, jax
      version, and `state_of`, the name of the dump that holds the state.
  """

  path: Path
  config: dict[str, Any]
  recorded: dict[str, Any]

  @property
  def temperature(self) -> float:
    """The temperature that the batch was sampled at."""
    recorded = self.recorded.get("temperature")
    # Dumps of version 0.1 do not record it; then it was that of the config.
    return self.config["rollout"]["temperature"] if recorded is None else recorded

  def batch(self, layout: Sharding) -> Batch:
    """Reads the batch; `layout` is the sharding of arrays whose first axis is prompts."""
    path = self.path.absolute() / "batch"
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path).item_metadata
      like = {
        name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype, sharding=layout)
        for name in stored
      }
      return Batch(**checkpointer.restore(path, like), temperature=self.temperature)

  def state(self, like: TrainState) -> TrainState:
    """Reads the state that the update met, with the shapes, dtypes and shardings of `like`."""
    path = self.path.absolute().parent / self.recorded["state_of"] / "state"
    with ocp.StandardCheckpointer() as checkpointer:
      like_tree = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
      # Its history is the one after the update: it counts one more skipped update.
      return TrainState.from_dict(checkpointer.restore(path, like_tree))


class Recorder:
  """Logs each skipped update of a run and writes the first ones to its work directory.

  It is the `on_skip` of `learning.updates.Learner`. All processes call it.

  Args:
    config: config of the run, to be read by `grpo_jax.replay`.
    log: called with one line per skipped update.
    share: as in `write`.
  """

  def __init__(
    self,
    workdir: str | Path,
    config: dict[str, Any],
    mesh: Mesh,
    log: Callable[[str], object] = print,
    share: Callable[[Path], object] | None = None,
  ) -> None:
    self._workdir, self._config, self._mesh, self._log = workdir, config, mesh, log
    self._share = share
    self._state_of: str | None = None  # the dump that holds the current state

  def __call__(self, skipped: SkippedUpdate) -> None:
    path = folder(self._workdir, skipped.step, skipped.update)
    dumps = complete(self._workdir)
    if skipped.in_a_row == 1:  # an accepted update has changed the state
      self._state_of = None
    text = (
      f"step {skipped.step}, update {skipped.update} skipped: loss "
      f"{skipped.metrics['loss']:.4g}, gradient norm {skipped.metrics['grad_norm']:.4g}"
    )
    if path in dumps:  # written by an earlier process that did not reach its next checkpoint
      self._state_of = read(path).recorded["state_of"]
    else:
      self._state_of = self._state_of or path.name
      if len(dumps) >= LIMIT:
        self._log(f"{text}; not written, {path.parent} holds {len(dumps)} already")
        return
      recorded = {
        "step": skipped.step,
        "update": skipped.update,
        "state_of": self._state_of,
        "metrics": skipped.metrics,
        "temperature": skipped.batch.temperature,
        "mesh": dict(self._mesh.shape),
        "device": self._mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
      }
      write(path, self._config, skipped.state, skipped.batch, recorded, self._share)
    self._log(f"{text}; see why: python -m grpo_jax.replay {path}")

  def advice(self) -> str:
    """Returns a sentence that says how to look into the skipped updates."""
    paths = ", ".join(str(path) for path in complete(self._workdir))
    return f"See why: python -m grpo_jax.replay DUMP, for {paths}"


def folder(workdir: str | Path, step: int, update: int) -> Path:
  """Returns the folder of the dump of an update of a step."""
  return Path(workdir).absolute() / FOLDER / f"step_{step:06d}_update_{update}"


def write(
  path: Path,
  config: dict[str, Any],
  state: TrainState,
  batch: Batch,
  recorded: dict[str, Any],
  share: Callable[[Path], object] | None = None,
) -> None:
  """Writes a dump; all processes call it.

  The last file written is `recorded.json`; a dump without it is incomplete and ignored.

  Args:
    state: the state that the update left, which is the one it met; written unless
      `recorded["state_of"]` names another dump.
    share: called by all hosts with the folder, to which each has then written its part, where they
      have no folder in common.
  """
  writes = hosts.is_first() or share is not None
  if writes:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
  hosts.exchange()
  with _writer(alone=share is not None) as checkpointer, jax.transfer_guard("allow"):
    checkpointer.save(path / "batch", args=ocp.args.PyTreeSave(batch.arrays()))
    if recorded["state_of"] == path.name:
      checkpointer.save(path / "state", args=ocp.args.PyTreeSave(_tree(state)))
  if share:
    share(path)
  if writes:
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (path / RECORDED).write_text(json.dumps(recorded, indent=2) + "\n", "utf-8")
  hosts.exchange()  # so that every process sees the complete dump


def _writer(alone: bool) -> ocp.Checkpointer:
  """Returns what writes arrays of all processes; `alone`, each to a folder of its own."""
  if not alone:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  handler, options = checkpoint.alone()
  return ocp.Checkpointer(handler, **options)


def read(path: str | Path) -> Dump:
  """Reads a dump without its arrays.

  Raises:
    ValueError: `path` is not a complete dump.
  """
  path = Path(path)
  if not (path / RECORDED).is_file():
    raise ValueError(f"{path} holds no {RECORDED}: it is not a dump of an update, or incomplete")
  try:
    config, recorded = (json.loads((path / n).read_text("utf-8")) for n in (CONFIG, RECORDED))
    state_of, config = recorded["state_of"], dict(config)
  except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
    raise ValueError(f"{path} is a damaged dump: {type(error).__name__}: {error}") from error
  if not isinstance(state_of, str) or not (path.absolute().parent / state_of / "state").is_dir():
    raise ValueError(f"{path} needs the state in the dump {state_of!r} beside it")
  return Dump(path, config, recorded)


def complete(workdir: str | Path) -> list[Path]:
  """Returns the folders of the complete dumps of a work directory, sorted."""
  return sorted(file.parent for file in (Path(workdir).absolute() / FOLDER).glob(f"*/{RECORDED}"))


def _tree(state: TrainState) -> dict[str, Any]:
  """Returns what an update of the policy depends on."""
  return dataclasses.replace(state, reference=None, critic=None, counts=None).to_dict()
