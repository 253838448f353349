"""Holds the data of accelerators and opens topologies, including ones that are not present."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grpo_jax.plan.cost import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Holds the data of one chip. None stands for an unknown value, which gives no roofline.

  Attributes:
    name: name shown in a report.
    memory: bytes that a program may use.
    bandwidth: memory bandwidth, bytes per second.
    peak: peak bfloat16 FLOP/s.
    links: bytes per second that the chip can send to other chips, over all its links together.
    source: origin of the numbers.
    float32: precision (`default`, `high` or `highest`) -> time of a float32 matmul relative to a
      bfloat16 one; 1 for a precision that is not listed.
  """

  name: str
  memory: float | None
  bandwidth: float | None = None
  peak: float | None = None
  links: float | None = None
  source: str = ""
  float32: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def matmul_time(self, dtype: DTypeLike, precision: str) -> float:
    """Returns the time of a matmul relative to one in bfloat16.

    Args:
      dtype: the wider dtype of the operands. The precision has no effect below float32.
      precision: `default`, `high` or `highest`, as in `jax.default_matmul_precision`.
    """
    return self.float32.get(precision, 1.0) if jnp.dtype(dtype).itemsize >= 4 else 1.0


# What a float32 matmul is made of is said by the documentation of `jax.lax.Precision`. TPU: 1, 3
# or 6 matmuls in bfloat16. NVIDIA: TF32, TF32, or float32, which has no tensor cores. Rates of the
# data sheets, in TFLOP/s, dense: bfloat16 989, TF32 494.5 and float32 67 for H100 and H200 SXM;
# 312, 156 and 19.5 for A100.
_TPU_FLOAT32 = {"default": 1.0, "high": 3.0, "highest": 6.0}
_H100_FLOAT32 = {"default": 989 / 494.5, "high": 989 / 494.5, "highest": 989 / 67}
_A100_FLOAT32 = {"default": 312 / 156, "high": 312 / 156, "highest": 312 / 19.5}

_TPU = "memory: the limit of libtpu 0.0.42 for a program; the rest: cloud.google.com/tpu/docs/"
_GPU = "data sheet, dense bfloat16"
# fmt: off
TPUS: dict[str, Chip] = {
  # Links: half of the documented bidirectional bandwidth between chips.
  "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 197e12, 200e9, _TPU + "v5e", _TPU_FLOAT32),
  "v5p": Chip("TPU v5p", 95.74 * GIB, 2765e9, 459e12, 600e9, _TPU + "v5p", _TPU_FLOAT32),
  "v6e": Chip("TPU v6e", 31.25 * GIB, 1600e9, 918e12, 400e9, _TPU + "v6e", _TPU_FLOAT32),
}
# By the prefix of the driver's name for the device. The device reports its own memory.
GPUS: tuple[tuple[str, Chip], ...] = (
  ("NVIDIA H200", Chip("H200 SXM", None, 4800e9, 989e12, 450e9, _GPU, _H100_FLOAT32)),
  ("NVIDIA H100", Chip("H100 SXM", None, 3350e9, 989e12, 450e9, _GPU, _H100_FLOAT32)),
  (
    "NVIDIA A100-SXM4-80GB",
    Chip("A100 SXM 80GB", None, 2039e9, 312e12, 300e9, _GPU, _A100_FLOAT32),
  ),
)
# fmt: on

# libtpu: reads these when it is loaded. They skip the metadata server, allow several processes to
# compile at once, and limit the log to errors.
LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Holds the devices to compile for. The devices of a TPU topology need not be present.

  Attributes:
    slices: number of TPU slices that the devices are of, one after another.
  """

  name: str
  devices: list[Any]
  chip: Chip
  slices: int = 1

  @property
  def platform(self) -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`."""
    return self.devices[0].platform


def open_topology(name: str) -> Topology:
  """Opens the topology `name`: `v5e:4x4`, `v5p:2x2x2`, `v6e:4x4`, `cpu:8` or `local`.

  `v5e:4x4:2` is two slices of `v5e:4x4`, connected by the network of the data center.

  Open a TPU topology or `cpu:N` before any other use of JAX in the process: it restricts JAX to
  the CPU backend.

  Raises:
    ValueError: the name is not a topology, its compiler refuses it, or there are too few devices.
    ModuleNotFoundError: the TPU compiler is not installed.
  """
  kind, _, shape = name.partition(":")
  if name == "local":
    return _local()
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    return Topology(name, _cpus(int(shape)), Chip("CPU", _host_memory() / int(shape)))
  if kind in TPUS and (match := re.fullmatch(r"(\d+(?:x\d+)+)(?::([1-9]\d*))?", shape)):
    slices = int(match[2] or 1)
    return Topology(name, _tpus(kind, match[1], slices), TPUS[kind], slices)
  raise ValueError(
    f"topology is {name!r}; use {', '.join(f'{tpu}:AxB' for tpu in TPUS)} (v5p: AxBxC) with the "
    "number of chips along each side, AxB:S for S slices, cpu:N, or local for the devices of this "
    "machine"
  )


def _tpus(kind: str, shape: str, slices: int) -> list[Any]:
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      "planning for a TPU needs its compiler, which is not installed: pip install 'grpo_jax[plan]'"
    )
  for variable, value in LIBTPU_ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  sides = [int(n) for n in shape.split("x")]
  # libtpu: it would split a 2x4 into two hosts. Up to 8 chips in two dimensions are one host.
  one_host = len(sides) == 2 and sides[0] * sides[1] <= 8
  options: dict[str, Any] = {"chips_per_host_bounds": (*sides, 1)} if one_host else {}
  if slices > 1:
    options["num_slices"] = slices
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=f"{kind}:{shape}", **options
    ).devices
  except Exception as error:  # libtpu: its error types have no public names
    raise ValueError(f"the TPU compiler refuses topology {kind}:{shape}: {error}") from error


def _cpus(count: int) -> list[Any]:
  jax.config.update("jax_platforms", "cpu")
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    with contextlib.suppress(RuntimeError):  # JAX is initialized: the number of devices is fixed
      jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"topology cpu:{count} needs {count} CPU devices, but this process has {len(devices)}; start "
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


def roofline(cost: Cost, chip: Chip, matmul_time: float = 1.0) -> tuple[float, str] | None:
  """Returns the roofline bound: (least time in seconds, the resource that sets it).

  Compute, memory and links each run at their full rate, all at the same time. None for a chip with
  unknown rates.

  Args:
    matmul_time: mean time of a FLOP relative to one in bfloat16; see `Chip.matmul_time`.

  >>> chip = Chip("example", memory=None, bandwidth=10.0, peak=100.0, links=1.0)
  >>> roofline(Cost(flops=100.0, bytes=30.0), chip)
  (3.0, 'memory')
  """
  if not (chip.peak and chip.bandwidth and chip.links):
    return None
  return max(
    (cost.flops * matmul_time / chip.peak, "compute"),
    (cost.bytes / chip.bandwidth, "memory"),
    (cost.sent / chip.links, "links"),
  )
