"""Runs a program in several processes that join, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from grpo_jax.distributed import cluster


def xla_flags(devices=1):
  """Returns the XLA_FLAGS of the tests, with another number of virtual devices."""
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  return " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])


def start(program, index, count, port, devices=4, **variables):
  """Starts one of `count` processes that join at `port`, with CPU devices of its own."""
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=xla_flags(devices),
    PYTHONUNBUFFERED="1",
    PYTHONPATH=str(Path.cwd()),
  )
  if count > 1:
    environment |= {
      cluster.ADDRESS: f"localhost:{port}", cluster.COUNT: str(count), cluster.INDEX: str(index)
    }  # fmt: skip
  return subprocess.Popen(
    [sys.executable, *program],
    env=environment | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def free_port():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def run(program, count, **options):
  """Runs `count` processes; returns (exit code, output) of each."""
  port = free_port()
  processes = [start(program, i, count, port, **options) for i in range(count)]
  return finish(processes)


def finish(processes, seconds=600):
  """Waits for the processes and kills them after a time limit in seconds."""
  try:
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, output) for process, output in zip(processes, outputs)]
