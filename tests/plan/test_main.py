"""Tests the command: its JSON, its report, its mistakes, and the search for changes that fit."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from grpo_jax import config as configs
from grpo_jax.plan import __main__ as plan
from grpo_jax.plan import estimate
from grpo_jax.plan.cost import Cost
from grpo_jax.plan.hardware import Chip, Topology, open_topology
from grpo_jax.plan.programs import open_programs
from tests.helpers.plans import GIB, TINY, load


def test_a_plan_of_the_tiny_model(capsys):
  arguments = ["--config", "experiments/tiny.py", "--topology", "cpu:8", *TINY]
  assert plan.main([*arguments, "--json"]) == 0
  (record,) = json.loads(capsys.readouterr().out)
  assert (record["fits"], record["devices"], record["mesh"]["data"]) == (True, 8, 8)
  assert set(record["work"]) == {"update", "to_sampling_params", "prefill", "decode"}
  assert record["work"]["decode"]["times"] == 5
  # A decode step: 2 FLOPs per weight of the layers and the head for each of P * G / 8 rows, and
  # attention over 8 + 16 keys (5, rounded up to a vector), 2 matmuls of 64 per layer.
  layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
  flops = 8 * 2 / 8 * 2 * (2 * layer + 257 * 64 + 2 * 2 * 24 * 64)
  assert record["work"]["decode"]["cost"]["flops"] == pytest.approx(flops, rel=1e-6)
  # Keys and values of 8 + 2 * 16 tokens of one prompt, 2 layers, 2 heads of 16, float32.
  cache = 2 * (8 + 2 * 16) * 2 * 2 * 16 * 4
  assert record["memory"]["sample"]["by_purpose"]["KV cache"] == cache


# --- changes that save memory ---------------------------------------------------------------------


def fake_compiler(monkeypatch, gib):
  """Replaces the compiler by `gib(config, program)`; returns the list of compiled programs."""
  compiled = []

  def compile_program(programs, name):
    c = programs.config
    compiled.append((name, c.train.micro_batches, c.model.remat, programs.mesh.shape["tensor"]))
    by_purpose = {"parameters": 1.0 * GIB, "optimizer": 2.0 * GIB, "reference": 0.0}
    total = gib(c, name) * GIB
    return estimate.Memory(by_purpose | {"temporaries": total - 3 * GIB}, total), {}

  monkeypatch.setattr(estimate, "compile_program", compile_program)
  return compiled


def first_change(gib, monkeypatch, *overrides, tries=9):
  c = load("rollout.prompts_per_step=32", *overrides)
  devices = open_topology("cpu:8").devices
  small = Topology("cpu:8", devices, Chip("ten", memory=10.0 * GIB))
  names, compiled = fake_compiler(monkeypatch, gib), {}
  programs = open_programs(c, small)
  first = estimate.make_plan(programs, compiled=compiled)
  assert not first.fits()
  tried, fitting = plan.first_that_fits(programs, first, tries=tries, compiled=compiled)
  assert c.train.micro_batches == 1  # the caller's config is unchanged
  return tried, fitting, names


def test_micro_batches_come_first_and_only_the_update_is_compiled_again(monkeypatch):
  def by_micro_batches(c, name):
    return 3 + 24 / c.train.micro_batches if name == "update" else 5

  tried, fitting, names = first_change(by_micro_batches, monkeypatch)
  assert tried == ["--config.train.micro_batches=2", "--config.train.micro_batches=4"]
  assert fitting.fits()
  assert [name for name, *_ in names] == [
    "update",
    "to_sampling_params",
    "sample",
    "update",
    "update",
  ]


def test_remat_comes_before_the_mesh(monkeypatch):
  def by_remat(c, name):
    return 5 if c.model.remat == "layers" or name != "update" else 30

  tried, fitting, _ = first_change(by_remat, monkeypatch)
  assert tried[-1] == "--config.model.remat=layers"
  assert not any("dots" in overrides for overrides in tried)  # the config has this policy already
  assert fitting.fits()


def test_a_mesh_with_an_axis_for_experts_is_changed_to_one_without(monkeypatch):
  def by_mesh(c, name):
    return 5 if c.mesh.tensor == 2 else 30

  experts = ("model.source=random:tiny_moe", "mesh.data=1", "mesh.expert=8")
  tried, fitting, _ = first_change(by_mesh, monkeypatch, *experts)
  assert "--config.mesh.tensor=2 --config.mesh.expert=1" in tried[-1]
  assert fitting.mesh["tensor"] == 2


def test_the_mesh_comes_first_if_nothing_else_can_help(monkeypatch):
  def by_mesh(c, name):
    return 5 if c.mesh.tensor == 2 else 30

  tried, fitting, _ = first_change(by_mesh, monkeypatch)
  assert "mesh.tensor=2" in tried[-1]
  assert all("mesh" in overrides for overrides in tried)
  assert fitting.mesh == {"data": 1, "fsdp": 4, "tensor": 2}


def test_no_change_fits(monkeypatch):
  tried, fitting, _ = first_change(lambda c, name: 30, monkeypatch, tries=2)
  assert (len(tried), fitting) == (2, None)


# --- the report and mistakes ----------------------------------------------------------------------


def test_a_report_names_what_was_refused():
  by_purpose = {"parameters": 2.0 * GIB, "temporaries": 0.0}
  memory = {
    "update": estimate.Memory(by_purpose, 47.35 * GIB, "too big"),
    "to_sampling_params": estimate.Memory(
      {"parameters": 2.0 * GIB, "KV cache": 1.0 * GIB}, 3.0 * GIB, error=0.01
    ),
  }
  work = {"decode": estimate.Work(9, Cost(2e9, 2.0**30), 1.0, 0.5, "memory")}
  mesh = {"fsdp": 16}
  record = estimate.Plan(
    "m", 10**9, "v5e:4x4", "TPU v5e", 16, mesh, 15.75 * GIB, memory, work, 1, ("a note",)
  )
  text = plan.report(record)
  for words in ("does NOT fit", "update does not compile: too big", "47.350", "1000.0 M", "1.00%"):
    assert words in text
  assert "note: a note" in text
  lines = text.splitlines()
  header = next(line for line in lines if "GiB per device" in line)
  row = next(line for line in lines if line.startswith("  KV cache"))
  assert header.index("to_sampling_params") + len("to_sampling_params") == row.index("1.000") + 5


def test_mistakes_are_named_before_anything_compiles(capsys):
  run = ["--config", "experiments/tiny.py", "--topology"]
  assert plan.main([*run, "v9:4x4"]) == 2
  assert "v5e:AxB" in capsys.readouterr().err
  assert plan.main([*run, "cpu:64"]) == 2
  assert "has 8" in capsys.readouterr().err
  assert plan.main([*run, "cpu:8", *TINY, "--config.mesh.fsdp=3"]) == 2
  assert "fsdp=3" in capsys.readouterr().err
  assert plan.main([*run, "cpu:8", "--config.model.source=Qwen/Qwen3-8B",
                    "--config.rollout.completion_length=99999", *TINY[:1]]) == 2  # fmt: skip
  assert "40960" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", *sorted(map(str, Path("docs").glob("*.md")))])
def test_the_plans_that_the_pages_name_are_of_configs_that_divide(page):
  """Checks the sizes only: the compiler of a topology need not be installed."""
  command = r"-m grpo_jax.plan --config (experiments/\S+) --topology (v\w+):([\dx]+)(.*)"
  for path, _, shape, options in re.findall(command, Path(page).read_text(encoding="utf-8")):
    config = configs.load(path, re.findall(r"--config\.\S+=\S+", options))
    assert configs.check(config, math.prod(map(int, shape.split("x")))) == []


def test_a_missing_tpu_compiler_is_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert plan.main(["--config", "experiments/tiny.py", "--topology", "v5e:2x2", *TINY]) == 2
  assert "grpo_jax[plan]" in capsys.readouterr().err
