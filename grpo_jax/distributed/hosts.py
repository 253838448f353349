"""Runs the same program in a process on each host, with arrays that lie over all their devices.

JAX's own runtime does the work. This module adds what a run on several hosts needs beside it: rows
that move between a host and a global array, values that all hosts agree on, and an end of the whole
run when one host fails. In a single process, all of it is trivial.
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

from grpo_jax.distributed import rollcall
from grpo_jax.distributed.cluster import ADDRESS, COUNT, INDEX, METHOD, Watchdog, detect
from grpo_jax.distributed.mesh import Sharding, batch_sharding, prompt_shards
from grpo_jax.errors import first_line

_STILL_JOINING = (
  f"not all processes have joined after {rollcall.NOTICE:g} s. To be told which are missing, set "
  f"{ADDRESS}, {COUNT} and {INDEX} in all of them"
)
GRACE = 30.0  # time in seconds that a process has to end by itself once a host has failed


class HostError(RuntimeError):
  """Reports the error of another host; the message is that error's."""


@contextlib.contextmanager
def session(heartbeat: int = 30, wait: float = 1800.0) -> Iterator[None]:
  """Joins the other processes, if there are any, for the duration of the `with` block.

  Enter it before anything touches a device. If its body raises, this process ends within `GRACE`
  seconds, whatever the other processes do. If this process dies, the others end within about
  `heartbeat` seconds.

  Args:
    heartbeat: silence in seconds after which a process is considered dead.
    wait: if no exchange completes for this many seconds, the run is considered stuck: dumps all
      stacks and exits. Must exceed the slowest step, evaluation and compilation.

  Raises:
    ClusterError: the environment does not say how the processes find each other.
    HostError: some processes did not start within `rollcall.TIMEOUT` seconds. Who is missing is
      said every `rollcall.NOTICE` seconds.
  """
  arguments = detect(os.environ)
  if arguments is None:
    yield
    return
  _wait_for_others(arguments)
  with rollcall.notice_after(rollcall.NOTICE, _STILL_JOINING):
    jax.distributed.initialize(
      **arguments, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=max(heartbeat, 60)
    )
  try:
    _watchdog.set(wait, f"no exchange between the hosts for {wait:g} s (hosts.wait)")
    yield
    exchange()
    jax.distributed.shutdown()
    _watchdog.set(None)
  except BaseException as error:
    _watchdog.set(GRACE, f"this process failed ({first_line(error)}) and could not end by itself")
    raise


def _wait_for_others(arguments: dict[str, Any]) -> None:
  """Waits until all processes have started, if it is known where they meet.

  Raises:
    HostError: some did not start in time.
  """
  if "coordinator_address" not in arguments:
    return
  names = ("coordinator_address", "num_processes", "process_id")
  try:
    rollcall.wait_for_all(
      *(arguments[name] for name in names), notice=rollcall.NOTICE, timeout=rollcall.TIMEOUT
    )
  except TimeoutError as error:
    raise HostError(str(error)) from error


_watchdog = Watchdog()


# --- values that all hosts agree on ---------------------------------------------------------------


def is_first() -> bool:
  """Tells whether this is process 0, which writes files and prints."""
  return jax.process_index() == 0


def exchange(**arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
  """Exchanges arrays between all processes, bit for bit.

  All processes have to call it, with the same names, and wait in it for each other. Shapes may
  differ.

  Returns:
    The arrays of each process by name, in the order of the processes.

  Example:
    >>> exchange(rewards=np.array([0.5, 1.0]))
    [{'rewards': array([0.5, 1. ])}]
  """
  if jax.process_count() == 1:
    return [arrays]
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # keeps float64, which a device would round
  return [_unpack(content) for content in _exchange_bytes(buffer.getvalue())]


def gathered(**arrays: np.ndarray) -> dict[str, np.ndarray]:
  """Concatenates the rows of all processes, in their order, under the same names."""
  parts = exchange(**arrays)
  return {name: np.concatenate([part[name] for part in parts]) for name in arrays}


def gathered_json(values: Sequence[Any]) -> list[Any]:
  """Concatenates the values of all processes, in their order; JSON must be able to hold them."""
  if jax.process_count() == 1:
    return list(values)
  parts = _exchange_bytes(json.dumps(list(values)).encode())
  return [value for part in parts for value in json.loads(part)]


def any_host(flag: bool) -> bool:
  """Tells whether the flag is true in any process; the answer is the same in all of them."""
  return any(bool(part["flag"]) for part in exchange(flag=np.array(flag)))


def of_first(flag: bool) -> bool:
  """Returns the flag of process 0, the same in all processes; all have to call it."""
  return bool(exchange(flag=np.array(flag))[0]["flag"])


def reached_preemption(step: int) -> bool:
  """Tells whether all processes have to save after this step, as JAX's preemption service decides.

  The service runs where `jax_enable_preemption_service` is set, as it is by default, and there are
  several processes. It takes a SIGTERM of any of them, until something else handles that signal,
  and gives the same later step to all. All processes have to call this after every step.
  """
  enabled = getattr(jax.config, "jax_enable_preemption_service", False)
  if jax.process_count() == 1 or not enabled:
    return False
  return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def together(task: str) -> Iterator[None]:
  """Runs the body on each host by itself; if it raises on one, all of them raise.

  The body must not start a computation across hosts after something that can fail. All processes
  wait for each other at its end.

  Args:
    task: what the body does, in words, for the message.

  Raises:
    HostError: the body raised in another process. In that process, its own error is raised.
  """
  if jax.process_count() == 1:
    yield
    return
  error = None
  try:
    yield
  except BaseException as raised:
    error = raised
    # The others may wait elsewhere and never reach the exchange.
    _watchdog.set(GRACE, f"{task} failed ({first_line(error)}) and the other hosts do not answer")
  messages = _exchange_bytes(
    f"{type(error).__name__}: {error}".encode(errors="replace") if error else b""
  )
  if error:
    error.raised_together = True
    raise error
  for index, message in enumerate(messages):
    if message:
      text = message.decode(errors="replace")
      raise HostError(f"{task} failed on process {index} of {len(messages)}: {text}")


def raised_together(error: BaseException) -> bool:
  """Tells whether all hosts raise because of this error, as `together` makes them do."""
  return isinstance(error, HostError) or getattr(error, "raised_together", False)


def same(name: str, text: str) -> None:
  """Checks that all processes give the same text.

  Args:
    name: of the text, for the message.
    text: the text of this process.

  Raises:
    ValueError: some differ from this process's.
  """
  own, texts = text.encode(), _exchange_bytes(text.encode())
  differing = [index for index, other in enumerate(texts) if other != own]
  if differing:
    raise ValueError(f"{name} differs between process {jax.process_index()} and {differing}")


def _exchange_bytes(own: bytes) -> list[bytes]:
  """Exchanges bytes by two collectives: their sizes, then their contents, padded to the largest."""
  if jax.process_count() == 1:
    return [own]
  sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
  longest, contents = int(sizes.max()), [b""] * len(sizes)
  if longest:
    # Padded to a power of two, so that only few sizes are compiled.
    padded = np.zeros(1 << max(math.ceil(math.log2(longest)), 10), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    contents = [row[:size].tobytes() for row, size in zip(rows, sizes)]
  _watchdog.renew()
  return contents


def _unpack(content: bytes) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(content), allow_pickle=False) as archive:
    return dict(archive)


# --- rows of a host and global arrays -------------------------------------------------------------


def check_mesh(mesh: Mesh) -> None:
  """Checks that the prompts of a batch lie on the hosts in order, in shards of equal size.

  They do if the mesh lists the devices host by host and `tensor` and `context` stay within a host.

  Raises:
    ValueError: they do not, or the processes have not joined.
  """
  sharding, count = batch_sharding(mesh), jax.process_count()
  if count > 1 and not jax.distributed.is_initialized():
    raise ValueError(f"{count} hosts run together but have not joined: set {METHOD}=auto on each")
  rows = prompt_shards(sharding)
  owners: list[set[int]] = [set() for _ in range(rows)]
  for device, (part, *_) in sharding.devices_indices_map((rows,)).items():
    for row in range(*part.indices(rows)):
      owners[row].add(device.process_index)
  if rows % count or owners != [{row * count // rows} for row in range(rows)]:
    raise ValueError(
      f"the mesh {dict(mesh.shape)} does not fit {count} hosts of {jax.local_device_count()} "
      "devices: mesh.tensor x mesh.context must divide the devices of a host, so that each prompt "
      "has one host"
    )


def own_shard() -> tuple[int, int]:
  """Returns (index of this process's shard of the prompts of a step, number of shards)."""
  return jax.process_index(), jax.process_count()


def to_global(tree: Any, sharding: Sharding) -> Any:
  """Makes global arrays from the rows of each host, concatenated in the order of the processes.

  Args:
    tree: NumPy arrays with the same leading size on every host.
    sharding: of the global arrays; splits their leading axis over the hosts in order.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def to_all(tree: Any, sharding: Sharding) -> Any:
  """Replicates arrays that every host holds alike over all devices of the mesh of `sharding`."""
  if not hasattr(sharding, "mesh"):
    return jax.device_put(tree)
  replicated = NamedSharding(sharding.mesh, PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, replicated)

  def replicate(array: np.ndarray) -> jax.Array:
    # Explicit `device_put`s: a transfer guard lets them through.
    copies = [jax.device_put(array, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(array.shape, replicated, copies)

  return jax.tree.map(replicate, tree)


def to_local(tree: Any) -> Any:
  """Returns the rows of global arrays that lie on this host, as NumPy arrays."""
  shards = jax.tree.map(_own_shards, tree)
  return jax.tree.map(_concatenate, jax.device_get(shards), is_leaf=lambda x: isinstance(x, list))


def _own_shards(array: Any) -> Any:
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return array
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return [parts[start] for start in sorted(parts)]


def _concatenate(parts: Any) -> Any:
  return np.concatenate(parts) if isinstance(parts, list) else parts
