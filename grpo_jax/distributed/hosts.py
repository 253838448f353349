"""Many hosts: the same program in a process on each, and arrays that lie over all their devices.

JAX's own runtime does the work. Here is what a run on many hosts needs beside it: moving rows
between a host and a global array, values that all hosts have to agree on, and an end of the whole
run where one host fails. With one process all of it does nothing.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.distributed.cluster import METHOD, Limit, detect
from grpo_jax.distributed.mesh import batch_sharding
from grpo_jax.errors import first_line

GRACE = 30.0  # seconds that a process has to end by itself once a host has failed


class HostError(RuntimeError):
  """Another host failed; the text is its error."""


@contextlib.contextmanager
def session(heartbeat: int = 30, wait: float = 1800.0) -> Iterator[None]:
  """Joins the other processes, if there are any, for as long as the `with` lasts.

  Start it before anything touches a device. If its body raises, this process ends within `GRACE`
  seconds, whatever the others do; if it dies, the others end within about `heartbeat` seconds.

  Args:
    heartbeat: seconds of silence after which a process counts as dead.
    wait: seconds without any `exchange` after which this process takes the run for stuck, prints
      where it stands, and ends. It has to be longer than a step, an evaluation or a compilation.
  """
  arguments = detect(os.environ)
  if arguments is None:
    yield
    return
  jax.distributed.initialize(
    **arguments, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=max(heartbeat, 60)
  )
  try:
    _limit.set(wait, f"no exchange between the hosts for {wait:g} s (hosts.wait)")
    yield
    exchange()
    jax.distributed.shutdown()
    _limit.set(None)
  except BaseException as error:
    _limit.set(GRACE, f"this process failed ({first_line(error)}) and could not end by itself")
    raise


_limit = Limit()


# --- what all hosts have to agree on --------------------------------------------------------------


def is_first() -> bool:
  """Whether this is process 0, the one that writes files and prints."""
  return jax.process_index() == 0


def exchange(**arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
  """The arrays that each process gives under these names, bit for bit, in the order of processes.

  All processes have to call it, and wait for each other in it. Shapes may differ.

  >>> exchange(rewards=np.array([0.5, 1.0]))
  [{'rewards': array([0.5, 1. ])}]
  """
  if jax.process_count() == 1:
    return [arrays]
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # float64 too, which a device would round
  return [_unpacked(part) for part in _all_bytes(buffer.getvalue())]


def gathered(**arrays: np.ndarray) -> dict[str, np.ndarray]:
  """The rows of all processes one after another, under the same names."""
  parts = exchange(**arrays)
  return {name: np.concatenate([part[name] for part in parts]) for name in arrays}


def gathered_json(values: Sequence[Any]) -> list[Any]:
  """The values of all processes one after another; what JSON can hold."""
  if jax.process_count() == 1:
    return list(values)
  return [v for part in _all_bytes(json.dumps(list(values)).encode()) for v in json.loads(part)]


def any_host(flag: bool) -> bool:
  """Whether any process says so; the same answer in all of them."""
  return any(bool(part["flag"]) for part in exchange(flag=np.array(flag)))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """Work of each host by itself: where one raises, all raise.

  The body must not start a computation that needs other hosts after something that can fail. All
  processes wait for each other at its end. A process whose body raised raises that error, the
  others `HostError` with its text.

  Args:
    what: the work in words, for the message.
  """
  if jax.process_count() == 1:
    yield
    return
  failed = None
  try:
    yield
  except BaseException as error:
    failed = error
    # The others may be elsewhere and never come to the exchange.
    _limit.set(GRACE, f"{what} failed ({first_line(error)}) and the other hosts do not answer")
  said = _all_bytes(f"{type(failed).__name__}: {failed}".encode() if failed else b"")
  if failed:
    raise failed
  for index, text in enumerate(said):
    if text:
      message = text.decode(errors="replace")
      raise HostError(f"{what} failed on process {index} of {len(said)}: {message}")


def same(what: str, value: str) -> None:
  """Raises ValueError unless all processes give the same text."""
  differing = [i for i, text in enumerate(_all_bytes(value.encode())) if text != value.encode()]
  if differing:
    raise ValueError(f"{what} differs between process {jax.process_index()} and {differing}")


def _all_bytes(own: bytes) -> list[bytes]:
  """What each process gives, by two collectives: sizes, and contents padded to the largest."""
  if jax.process_count() == 1:
    return [own]
  sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
  longest, parts = int(sizes.max()), [b""] * len(sizes)
  if longest:
    # A power of two, so that few sizes are compiled for.
    padded = np.zeros(1 << max(math.ceil(math.log2(longest)), 10), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    parts = [row[:size].tobytes() for row, size in zip(rows, sizes)]
  _limit.renew()
  return parts


def _unpacked(content: bytes) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(content), allow_pickle=False) as archive:
    return dict(archive)


# --- rows of a host and global arrays -------------------------------------------------------------


def check_mesh(mesh: Mesh) -> None:
  """ValueError unless the prompts of a batch lie on the hosts in their order, in equal blocks.

  That is so where the mesh goes through the devices host by host and `tensor` stays inside a host.
  """
  layout, count = batch_sharding(mesh), jax.process_count()
  if count > 1 and not jax.distributed.is_initialized():
    raise ValueError(f"{count} hosts run together and have not met: set {METHOD}=auto on each")
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  owners: list[set[int]] = [set() for _ in range(rows)]
  for device, (part, *_) in layout.devices_indices_map((rows,)).items():
    for row in range(*part.indices(rows)):
      owners[row].add(device.process_index)
  if rows % count or owners != [{row * count // rows} for row in range(rows)]:
    raise ValueError(
      f"the mesh {dict(mesh.shape)} does not fit {count} hosts of {jax.local_device_count()} "
      "devices: mesh.tensor must divide the devices of a host, so that each prompt has one host"
    )


def own_shard() -> tuple[int, int]:
  """(which block of the prompts of a step is this process's, how many blocks there are)."""
  return jax.process_index(), jax.process_count()


def to_global(tree: Any, sharding: Any) -> Any:
  """Global arrays from the rows of each host: the blocks of all processes, one after another."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def to_all(tree: Any, layout: Any) -> Any:
  """What every host has in the same form, on all devices of the mesh that `layout` is of."""
  if not hasattr(layout, "mesh"):
    return jax.device_put(tree)
  whole = NamedSharding(layout.mesh, PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, whole)

  def one(array: np.ndarray) -> jax.Array:  # `device_put`s, which a transfer guard lets through
    copies = [jax.device_put(array, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(array.shape, whole, copies)

  return jax.tree.map(one, tree)


def to_local(tree: Any) -> Any:
  """The rows of global arrays that lie on this host, as numpy arrays."""
  shards = jax.tree.map(_own_shards, tree)
  return jax.tree.map(_joined, jax.device_get(shards), is_leaf=lambda x: isinstance(x, list))


def _own_shards(array: Any) -> Any:
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return array
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return [parts[start] for start in sorted(parts)]


def _joined(parts: Any) -> Any:
  return np.concatenate(parts) if isinstance(parts, list) else parts
