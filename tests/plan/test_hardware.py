"""Tests the topologies that need no accelerator, and the roofline by hand."""

import importlib.util

import jax
import pytest

from grpo_jax.plan import hardware
from grpo_jax.plan.cost import Cost
from grpo_jax.plan.hardware import GPUS, TPUS, Chip, open_topology, roofline


def test_the_roofline_names_what_binds():
  chip = Chip("example", None, bandwidth=10.0, peak=100.0, links=5.0)
  assert roofline(Cost(flops=500.0, bytes=20.0), chip) == (5.0, "compute")
  assert roofline(Cost(flops=100.0, bytes=20.0), chip) == (2.0, "memory")
  sent = Cost(500.0, 20.0, {"all-gather": (1, 20.0), "all-reduce": (2, 15.0)})
  assert roofline(sent, chip) == (7.0, "links")
  assert roofline(sent, Chip("unknown", None)) is None


@pytest.mark.parametrize(
  ("chip", "default", "high", "highest"),
  [
    *((chip, 1, 3, 6) for chip in TPUS.values()),  # bfloat16 passes
    *((chip, 2, 2, 989 / 67 if "H" in chip.name else 16) for _, chip in GPUS),  # TF32, float32
    (Chip("unknown", None), 1, 1, 1),
  ],
)
def test_float32_matmuls_take_longer(chip, default, high, highest):
  expected = {"default": default, "high": high, "highest": highest}
  for precision, time in expected.items():
    assert chip.matmul_time("float32", precision) == pytest.approx(time)
    assert chip.matmul_time("bfloat16", precision) == 1


def test_the_roofline_counts_the_time_of_float32():
  chip = Chip("example", None, bandwidth=10.0, peak=100.0, links=5.0)
  assert roofline(Cost(flops=100.0, bytes=30.0), chip, 2.0) == (3.0, "memory")
  assert roofline(Cost(flops=100.0, bytes=30.0), chip, 6.0) == (6.0, "compute")


def test_cpu_devices_share_the_memory_of_the_host():
  four, eight = open_topology("cpu:4"), open_topology("cpu:8")
  assert (len(four.devices), len(eight.devices)) == (4, 8)
  assert four.platform == "cpu"
  assert four.chip.memory == 2 * eight.chip.memory > 0


def test_local_devices():
  local = open_topology("local")
  assert local.devices == jax.devices()
  assert local.chip.peak is None  # the rates of a CPU are unknown


@pytest.mark.parametrize(
  "name", ["v9:4x4", "v5e", "v5e:4", "v5e:4x4:0", "v5e:4x4:2:2", "cpu:0", "cpu", "gpu:8", ""]
)
def test_an_unknown_topology_is_refused(name):
  with pytest.raises(ValueError, match="v5e:AxB"):
    open_topology(name)


def test_too_many_cpu_devices_are_refused():
  with pytest.raises(ValueError, match=r"has 8.*device_count=64"):
    open_topology("cpu:64")


@pytest.mark.parametrize(("name", "slices"), [("v5e:4x4", 1), ("v5e:4x4:2", 2), ("v5p:2x2x2:3", 3)])
def test_a_topology_may_be_of_several_slices(monkeypatch, name, slices):
  asked = []
  monkeypatch.setattr(hardware, "_tpus", lambda *arguments: asked.append(arguments) or ["chip"])
  assert open_topology(name).slices == slices
  kind, shape, *_ = name.split(":")
  assert asked == [(kind, shape, slices)]


def test_a_missing_tpu_compiler_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r"grpo_jax\[plan\]"):
    open_topology("v5e:2x2")
