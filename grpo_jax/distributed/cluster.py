"""Detects how the processes of a run find each other, and ends a process that waits in vain."""

import faulthandler
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

FAILED = 70  # exit code of a process that ends because another host failed
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METHOD = "GRPO_JAX_CLUSTER"
# Environment variables of launchers: (number of processes, index of this process).
LAUNCHERS = (
  (COUNT, INDEX),
  ("SLURM_NTASKS", "SLURM_PROCID"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
  ("PMI_SIZE", "PMI_RANK"),
)


class ClusterError(ValueError):
  """Reports that the environment does not say how the processes of a run find each other."""


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns the arguments for `jax.distributed.initialize`, or None for a single process.

  The first of these that applies counts:

  1. GRPO_JAX_CLUSTER: `off`, `auto`, or a `cluster_detection_method` of JAX.
  2. JAX_COORDINATOR_ADDRESS, with the number of processes and the index of this one from
     JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM, or MPI.
  3. Several SLURM or Open MPI tasks.
  4. Several TPU hosts, as Google Kubernetes Engine names them.

  The environment of a TPU pod without Kubernetes does not mention other hosts: set
  GRPO_JAX_CLUSTER=auto there.

  Raises:
    ClusterError: the environment is incomplete or contradicts itself.

  Example:
    >>> detect({}) is None
    True
    >>> detect({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "n[1-4]"})
    {'cluster_detection_method': 'slurm'}
  """
  method = environment.get(METHOD, "")
  if method == "off":
    return None
  if method:
    return {} if method == "auto" else {"cluster_detection_method": method}
  launcher = next((pair for pair in LAUNCHERS if pair[0] in environment), None)
  count = _integer(environment, launcher[0]) if launcher else 1
  if address := environment.get(ADDRESS):
    if launcher is None or launcher[1] not in environment:
      raise ClusterError(
        f"{ADDRESS} is {address!r}, but the number of processes and the index of this one are "
        f"unknown: set {COUNT} and {INDEX}, or start with SLURM or MPI"
      )
    index = _integer(environment, launcher[1])
    if not 0 <= index < count:
      raise ClusterError(
        f"{launcher[1]} is {index}: it must be in [0, {count}), as {launcher[0]} is {count}"
      )
    return {
      "coordinator_address": address,
      "num_processes": count,
      "process_id": index,
      # JAX: its SLURM detection would give this process one local device only.
      "cluster_detection_method": "deactivate",
    }
  if launcher is None or count == 1:
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return {"cluster_detection_method": "gketpu"} if "," in hosts else None
  if launcher[0] == "SLURM_NTASKS" and "SLURM_STEP_NODELIST" in environment:
    return {"cluster_detection_method": "slurm"}
  if launcher[0] == "OMPI_COMM_WORLD_SIZE" and "OMPI_MCA_orte_hnp_uri" in environment:
    return {"cluster_detection_method": "ompi"}
  if launcher[0] == "SLURM_NTASKS":  # in an allocation, but not started by srun
    return None
  raise ClusterError(
    f"{launcher[0]} is {count}, but the address of process 0 is unknown: set {ADDRESS}=HOST:PORT "
    f"in all processes, or {METHOD}=mpi4py (with that package), or {METHOD}=off for separate runs"
  )


def _integer(environment: Mapping[str, str], name: str) -> int:
  try:
    return int(environment[name])
  except ValueError:
    raise ClusterError(f"{name} is {environment[name]!r}: it must be an integer") from None


class Watchdog:
  """Ends the process with a message and all stacks, unless it is renewed in time."""

  def __init__(self) -> None:
    self._timer: threading.Timer | None = None
    self._setting: tuple[float | None, str] = (None, "")

  def set(self, seconds: float | None, reason: str = "") -> None:
    """Starts the timeout.

    Args:
      seconds: timeout in seconds; None ends the watch.
      reason: the message to end with.
    """
    self._setting = (seconds, reason)
    self.renew()

  def renew(self) -> None:
    """Restarts the timeout."""
    if self._timer:
      self._timer.cancel()
    seconds, reason = self._setting
    self._timer = threading.Timer(seconds, self._end, (reason,)) if seconds is not None else None
    if self._timer:
      self._timer.daemon = True
      self._timer.start()

  def _end(self, reason: str) -> None:
    print(f"process {jax.process_index()} ends: {reason}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(FAILED)
