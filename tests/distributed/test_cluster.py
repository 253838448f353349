"""Tests how a process finds the others of its run, and the watchdog that ends it."""

import subprocess
import sys

import pytest

from grpo_jax.distributed import cluster


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, None),
    ({"GRPO_JAX_CLUSTER": "auto"}, {}),
    ({"GRPO_JAX_CLUSTER": "mpi4py"}, {"cluster_detection_method": "mpi4py"}),
    ({"GRPO_JAX_CLUSTER": "off", "SLURM_NTASKS": "4"}, None),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # in the batch script, before srun
    (
      {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1.0"},
      {"cluster_detection_method": "ompi"},
    ),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"cluster_detection_method": "gketpu"}),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
  ],
)
def test_other_processes_are_detected_from_the_environment(environment, expected):
  assert cluster.detect(environment) == expected


@pytest.mark.parametrize(
  ("count", "index"),
  [
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
  ],
)
def test_an_address_works_with_any_launcher(count, index):
  environment = {"JAX_COORDINATOR_ADDRESS": "host:1", count: "8", index: "3"}
  assert cluster.detect(environment) == {
    "coordinator_address": "host:1",
    "num_processes": 8,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
    (
      {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      r"JAX_PROCESS_ID is 2: it must be in \[0, 2\)",
    ),
    ({"PMI_SIZE": "two", "PMI_RANK": "0"}, "PMI_SIZE is 'two'"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "set JAX_COORDINATOR_ADDRESS"),
  ],
)
def test_an_incomplete_environment_is_an_error(environment, message):
  with pytest.raises(ValueError, match=message):
    cluster.detect(environment)


WATCHED = """
import time
from grpo_jax.distributed.cluster import Watchdog
watchdog = Watchdog()
watchdog.set(0.6, "nobody came")
for _ in range(4):
  time.sleep(0.2)
  watchdog.renew()
print("renewed", flush=True)
watchdog.set(None)
time.sleep(0.8)
print("not watched", flush=True)
watchdog.set(0.1, "nobody came")
time.sleep(60)
"""


def test_a_watchdog_ends_the_process_unless_it_is_renewed():
  completed = subprocess.run(
    [sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60
  )
  assert completed.returncode == cluster.FAILED
  assert completed.stdout == "renewed\nnot watched\n"
  assert completed.stderr.startswith("process 0 ends: nobody came\n")
  assert "most recent call first" in completed.stderr  # the stacks
