"""How the processes of a run find each other, and a limit on the time that one waits in vain."""

import faulthandler
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

FAILED = 70  # exit code of a process that ends because of another host
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METHOD = "GRPO_JAX_CLUSTER"
# Variables in which launchers give (the number of processes, the number of this one).
LAUNCHERS = (
  (COUNT, INDEX),
  ("SLURM_NTASKS", "SLURM_PROCID"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
  ("PMI_SIZE", "PMI_RANK"),
)


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments for `jax.distributed.initialize`, or None where this process is alone.

  In this order: GRPO_JAX_CLUSTER (`off`, `auto`, or a `cluster_detection_method` of JAX); an
  explicit JAX_COORDINATOR_ADDRESS, with the count and the index from JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, SLURM or MPI; several SLURM or Open MPI tasks; TPU hosts as Kubernetes names them.
  On a TPU pod without Kubernetes nothing in the environment says so: set GRPO_JAX_CLUSTER=auto.

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
  found = next((pair for pair in LAUNCHERS if pair[0] in environment), None)
  count = _number(environment, found[0]) if found else 1
  if address := environment.get(ADDRESS):
    if found is None or found[1] not in environment:
      raise ValueError(
        f"{ADDRESS} is {address!r}, but the number of processes and of this one is not known: set "
        f"{COUNT} and {INDEX}, or start with SLURM or MPI"
      )
    index = _number(environment, found[1])
    if not 0 <= index < count:
      raise ValueError(f"{found[1]} is {index}: it must be in [0, {count}), as {found[0]} says")
    return {
      "coordinator_address": address,
      "num_processes": count,
      "process_id": index,
      "cluster_detection_method": "deactivate",  # else SLURM's task would see one device only
    }
  if found is None or count == 1:
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return {"cluster_detection_method": "gketpu"} if "," in hosts else None
  if found[0] == "SLURM_NTASKS" and "SLURM_STEP_NODELIST" in environment:
    return {"cluster_detection_method": "slurm"}
  if found[0] == "OMPI_COMM_WORLD_SIZE" and "OMPI_MCA_orte_hnp_uri" in environment:
    return {"cluster_detection_method": "ompi"}
  if found[0] == "SLURM_NTASKS":  # an allocation, and this process was not started by srun
    return None
  raise ValueError(
    f"{found[0]} is {count}, but where process 0 listens is not known: set {ADDRESS}=HOST:PORT in "
    f"all processes, or {METHOD}=mpi4py (with that package), or {METHOD}=off for separate runs"
  )


def _number(environment: Mapping[str, str], name: str) -> int:
  try:
    return int(environment[name])
  except ValueError:
    raise ValueError(f"{name} is {environment[name]!r}: it must be a number") from None


class Limit:
  """Ends the process, saying why and where it stands, unless it is set anew in time."""

  def __init__(self) -> None:
    self._timer: threading.Timer | None = None
    self._renew: tuple[float | None, str] = (None, "")

  def set(self, seconds: float | None, why: str = "") -> None:
    """None = no limit."""
    self._renew = (seconds, why)
    self.renew()

  def renew(self) -> None:
    """The full time again."""
    if self._timer:
      self._timer.cancel()
    seconds, why = self._renew
    self._timer = threading.Timer(seconds, self._end, (why,)) if seconds is not None else None
    if self._timer:
      self._timer.daemon = True
      self._timer.start()

  def _end(self, why: str) -> None:
    print(f"process {jax.process_index()} ends: {why}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(FAILED)
