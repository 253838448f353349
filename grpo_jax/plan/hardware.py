"""Accelerators as numbers, and the devices of a topology, whether they are there or not."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from grpo_jax.plan.cost import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip has; None is not known, and gives no bound.

  Attributes:
    memory: bytes that a program may use.
    bandwidth: of that memory, bytes per second.
    peak: bfloat16 operations per second.
    links: bytes per second that it can send to other chips, over all links together.
    source: where the numbers are from.
  """

  name: str
  memory: float | None
  bandwidth: float | None = None
  peak: float | None = None
  links: float | None = None
  source: str = ""


_TPU = "memory: what libtpu 0.0.42 lets a program use; the rest: cloud.google.com/tpu/docs/"
_GPU = "data sheet, dense bfloat16"
# fmt: off
TPUS: dict[str, Chip] = {
  # Links: half of the documented bidirectional bandwidth between chips.
  "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 197e12, 200e9, _TPU + "v5e"),
  "v5p": Chip("TPU v5p", 95.74 * GIB, 2765e9, 459e12, 600e9, _TPU + "v5p"),
  "v6e": Chip("TPU v6e", 31.25 * GIB, 1600e9, 918e12, 400e9, _TPU + "v6e"),
}
# By the start of the name that the driver gives; memory as the device reports it.
GPUS: tuple[tuple[str, Chip], ...] = (
  ("NVIDIA H200", Chip("H200 SXM", None, 4800e9, 989e12, 450e9, _GPU)),
  ("NVIDIA H100", Chip("H100 SXM", None, 3350e9, 989e12, 450e9, _GPU)),
  ("NVIDIA A100-SXM4-80GB", Chip("A100 SXM 80GB", None, 2039e9, 312e12, 300e9, _GPU)),
)
# fmt: on

# Read by libtpu when it is loaded: ask no metadata server what machine this is, let several
# processes compile at once, keep its log to errors.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for. Those of a TPU topology need not exist."""

  name: str
  devices: list[Any]
  chip: Chip

  @property
  def platform(self) -> str:
    """`cpu`, `gpu` or `tpu`."""
    return self.devices[0].platform


def open_topology(name: str) -> Topology:
  """The devices that `name` means: `v5e:4x4`, `v5p:2x2x2`, `v6e:4x4`, `cpu:8` or `local`.

  For TPUs and `cpu:n`, JAX must not have been used in this process before: they are compiled for
  without the accelerators that may be here. ValueError for a name that is none of these,
  ModuleNotFoundError where the TPU compiler is not installed.
  """
  kind, _, shape = name.partition(":")
  if name == "local":
    return _local()
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    return Topology(name, _cpus(int(shape)), Chip("CPU", _host_memory() / int(shape)))
  if kind in TPUS and re.fullmatch(r"\d+(x\d+)+", shape):
    return Topology(name, _tpus(kind, shape), TPUS[kind])
  raise ValueError(
    f"topology is {name!r}; write {', '.join(f'{tpu}:AxB' for tpu in TPUS)} (v5p: AxBxC), with "
    "numbers of chips along each side, cpu:N, or local for the devices at hand"
  )


def _tpus(kind: str, shape: str) -> list[Any]:
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      "planning for a TPU needs its compiler, which is not installed: pip install 'grpo_jax[plan]'"
    )
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  sides = [int(n) for n in shape.split("x")]
  # Up to 8 chips of a flat kind are one host; libtpu would make two of a 2x4.
  one_host = len(sides) == 2 and sides[0] * sides[1] <= 8
  bounds = {"chips_per_host_bounds": (*sides, 1)} if one_host else {}
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=f"{kind}:{shape}", **bounds
    ).devices
  except Exception as error:  # the plugin raises its own types
    raise ValueError(f"topology {kind}:{shape} is refused by the TPU compiler: {error}") from error


def _cpus(count: int) -> list[Any]:
  jax.config.update("jax_platforms", "cpu")
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    with contextlib.suppress(RuntimeError):  # used before: there are as many as there are
      jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"topology cpu:{count} needs {count} CPU devices, and this process has {len(devices)}; start "
      f"it with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    )
  return devices[:count]


def _local() -> Topology:
  devices = jax.devices()
  kind = devices[0].device_kind
  chips = [chip for start, chip in GPUS if kind.startswith(start)]
  stats = devices[0].memory_stats() or {}
  on_host = devices[0].platform == "cpu"
  memory = stats.get("bytes_limit", _host_memory() / len(devices) if on_host else None)
  chip = dataclasses.replace(chips[0] if chips else Chip(kind, None), memory=memory)
  return Topology("local", devices, chip)


def _host_memory() -> float:
  return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def bound(cost: Cost, chip: Chip) -> tuple[float, str] | None:
  """The roofline: (seconds that the work takes at least, what it waits for); None if not known.

  Operations, memory and links each at their full rate, all three at the same time.

  >>> chip = Chip("one", memory=None, bandwidth=10.0, peak=100.0, links=1.0)
  >>> bound(Cost(ops=100.0, bytes=30.0), chip)
  (3.0, 'memory')
  """
  if not (chip.peak and chip.bandwidth and chip.links):
    return None
  return max(
    (cost.ops / chip.peak, "operations"),
    (cost.bytes / chip.bandwidth, "memory"),
    (cost.sent / chip.links, "links"),
  )
