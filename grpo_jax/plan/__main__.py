"""Estimates the memory and time of a run before it starts.

`python -m grpo_jax.plan --config experiments/X.py --topology v5e:4x4 [--config.a.b=v]` compiles
the programs of a config from shapes alone, for devices that need not be present. It prints memory,
FLOPs, memory traffic, collective traffic and the roofline of each part, and whether the run fits.
If it does not fit, the command compiles changes to the config until one fits. Topologies: v5e:4x4,
v5p:2x2x2, v6e:4x4, cpu:8, local; v5e:4x4:2 is two slices.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("plan", "grpo_jax.plan")

import jax
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.decoder import REMAT
from grpo_jax.plan.estimate import (
  UNITS,
  Compiled,
  Plan,
  as_dict,
  discard,
  make_plan,
  step_seconds,
)
from grpo_jax.plan.hardware import GIB, open_topology
from grpo_jax.plan.programs import Programs, open_programs
from grpo_jax.run import console

# --- changes that save memory ---------------------------------------------------------------------


def candidates(config: ConfigDict, plan: Plan, kv_heads: int) -> Iterator[list[str]]:
  """Yields overrides that may make a run fit, cheapest first: micro-batches, remat, the mesh.

  Args:
    config: the config that does not fit.
    plan: its plan.
    kv_heads: key-value heads of the model; `mesh.tensor` must divide them.
  """
  c, mesh = config, plan.mesh
  if plan.fits("to_sampling_params", "sample") and _fixed_bytes(plan) <= (plan.available or 0):
    most = _most_micro_batches(c, math.prod(mesh.get(axis, 1) for axis in meshes.PROMPT_AXES))
    micro_batches = c.train.micro_batches
    while (micro_batches := micro_batches * 2) <= most:
      yield [f"--config.train.micro_batches={micro_batches}"]
    policies = tuple(REMAT)
    for policy in policies[policies.index(c.model.remat) + 1 :]:
      yield [f"--config.model.remat={policy}"]
      if most > c.train.micro_batches:
        yield [f"--config.model.remat={policy}", f"--config.train.micro_batches={most}"]
  data = c.mesh.slices  # each slice holds whole copies of the weights
  devices = plan.devices // mesh.get("context", 1)  # that axis stays: it is for long rows
  for tensor in (1, 2, 4, 8):
    fsdp = devices // (data * tensor)
    changed = (mesh["data"], mesh["tensor"], c.mesh.expert) != (data, tensor, 1)
    divides = devices % (data * tensor) == 0 == kv_heads % tensor
    shards = data * fsdp
    if changed and divides and c.rollout.prompts_per_step % (shards * c.train.mini_batches) == 0:
      yield [
        f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.tensor={tensor}",
        *(["--config.mesh.expert=1"] if c.mesh.expert != 1 else []),
        "--config.model.remat=layers",
        f"--config.train.micro_batches={_most_micro_batches(c, shards)}",
      ]  # fmt: skip


def _most_micro_batches(c: ConfigDict, prompt_shards: int) -> int:
  """Returns the number of micro-batches with one prompt on each device."""
  return max(c.rollout.prompts_per_step // (prompt_shards * c.train.mini_batches), 1)


def _fixed_bytes(plan: Plan) -> float:
  """Returns the bytes that neither micro-batches nor remat change."""
  by_purpose = plan.memory["update"].by_purpose
  fixed = ("parameters", "optimizer", "reference", "teachers", "critic")
  return sum(by_purpose.get(purpose, 0.0) for purpose in fixed)


def first_that_fits(
  programs: Programs,
  plan: Plan,
  *,
  tries: int,
  compiled: Compiled | None = None,
  log: Callable[[str], None] = discard,
) -> tuple[list[str], Plan | None]:
  """Compiles changes of a config until one fits.

  Args:
    programs: the programs of a config that does not fit. They are not changed.
    plan: their plan.
    tries: most changes to compile.
    compiled, log: as in `make_plan`.

  Returns:
    The overrides that were compiled, in order, and the plan of the last one; None instead of the
    plan if no change fits.
  """
  config, topology = programs.config, programs.topology
  compiled, tried = {} if compiled is None else compiled, []
  for overrides in candidates(config, plan, programs.model.config.kv_heads):
    if len(tried) == tries:
      break
    tried.append(" ".join(overrides))
    log(f"trying {tried[-1]}")
    changed = configs.override(config.copy_and_resolve_references(), overrides)
    changed = open_programs(changed, topology, prompts=programs.prompts)
    new = make_plan(changed, compiled=compiled, log=log)
    if new.fits():
      return tried, new
  return tried, None


# --- the report -----------------------------------------------------------------------------------


def report(plan: Plan) -> str:
  """Formats a plan as text."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"model      {plan.model}: {plan.parameters / 1e6:.1f} M parameters",
    f"devices    {plan.topology}: {plan.devices} x {plan.chip}, mesh {mesh}",
    "",
    *_memory_table(plan),
    "",
    *_work_table(plan),
  ]
  if plan.step_seconds is not None:
    lines += [f"a step takes at least {plan.step_seconds:.3g} s", *_forms(plan)]
  lines += [f"note: {note}" for note in plan.notes]
  verdict = "fits" if plan.fits() else "does NOT fit"
  return "\n".join([*lines, f"it {verdict} (compiled in {plan.compile_seconds:.0f} s)"])


def _forms(plan: Plan) -> Iterator[str]:
  """Yields lines about the time of a step with rollouts ahead, by the time of the rewards."""
  sampling, learning = plan.parts
  apart = plan.rollout_devices > 0
  yield (
    f"of it sampling {sampling:.3g} s and learning {learning:.3g} s"
    + (f", on {plan.rollout_devices} and {plan.devices - plan.rollout_devices} devices" * apart)
  )
  times = (0.0, (sampling + learning) / 2, 2 * (sampling + learning))
  yield f"{'with rewards of':24}" + "".join(f"{f'{time:.3g} s':>12}" for time in times)
  for ahead in (0, 1, 2):
    seconds = (step_seconds(sampling, learning, time, ahead, apart) for time in times)
    name = f"  rollout.ahead={ahead}" + " (this one)" * (ahead == plan.ahead)
    yield f"{name:24}" + "".join(f"{f'{time:.3g} s':>12}" for time in seconds)


def _memory_table(plan: Plan) -> Iterator[str]:
  """Yields the lines of memory by purpose and program."""
  small = all(m.total < GIB for m in plan.memory.values())
  unit, unit_name = (2**20, "MiB") if small else (GIB, "GiB")
  widths = [max(len(name) + 2, 10) for name in plan.memory]

  def line(title: str, cells: Iterable[str]) -> str:
    return f"{title:20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

  yield line(f"{unit_name} per device", plan.memory)
  for purpose in dict.fromkeys(key for m in plan.memory.values() for key in m.by_purpose):
    sizes = [m.by_purpose.get(purpose, 0.0) for m in plan.memory.values()]
    unknown = [bool(m.refused) and purpose == "temporaries" for m in plan.memory.values()]
    if any(sizes) or any(unknown):
      cells = ["?" if u else f"{size / unit:.3f}" for size, u in zip(sizes, unknown)]
      yield line(f"  {purpose}", cells)
  yield line("  total", (f"{m.total / unit:.3f}" for m in plan.memory.values()))
  if plan.available:
    yield line("  available", [f"{plan.available / unit:.3f}"])
  for name, m in plan.memory.items():
    if m.refused:
      yield f"  {name} does not compile: {m.refused}"
  errors = [abs(m.error) for m in plan.memory.values() if m.error is not None]
  if errors:
    yield f"  bytes of arguments, ours against the compiler's: at most {max(errors):.2%} apart"


def _work_table(plan: Plan) -> Iterator[str]:
  """Yields the lines of work and collectives by part of a step."""
  width = max(len(name) for name in ("one device", *plan.work)) + 2
  yield f"{'one device':{width}}{'times':>8}  GFLOP   excess  read+written  sent      bound     by"
  for name, w in plan.work.items():
    seconds = "-" if w.seconds is None else f"{w.seconds:.3g} s"
    traffic, sent = format_bytes(w.cost.bytes), format_bytes(w.cost.sent)
    yield (
      f"  {name:{width - 2}}{w.times:8}  {w.cost.flops / 1e9:<8.4g}{w.excess:6.2f}  "
      f"{traffic:>12}  {sent:<8}  {seconds:<8}  {w.limit or ''}"
    )
  for name, w in plan.work.items():
    for kind, (count, sent) in sorted(w.cost.collectives.items()):
      yield f"    {name}: {count:.0f} x {kind}, {format_bytes(sent)}"
    if w.cost.between_slices:
      yield f"    {name}: {format_bytes(w.cost.between_slices)} to other slices"


def format_bytes(count: float) -> str:
  """Formats a number of bytes with its binary unit.

  >>> format_bytes(2048), format_bytes(3 * 2**30), format_bytes(7)
  ('2 KiB', '3 GiB', '7 B')
  """
  for unit, size in reversed(UNITS.items()):
    if count >= size and unit:
      return f"{count / size:.3g} {unit}iB"
  return f"{count:.0f} B"


# --- the command ----------------------------------------------------------------------------------


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns 0 if the config fits, 1 if it does not, 2 for a mistake in it."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.plan", description=__doc__)
  parser.add_argument("--config", required=True, help="an experiment file; it is run as a program")
  parser.add_argument(
    "--topology", required=True, help="v5e:4x4, v5p:2x2x2, v6e:4x4, v5e:4x4:2, cpu:8, local"
  )
  parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
  parser.add_argument(
    "--quick", action="store_true", help="compile with less effort, in half the time"
  )
  parser.add_argument(
    "--tries", type=configs.at_least(0), default=6, help="changes to compile if it does not fit"
  )
  arguments, overrides = parser.parse_known_args(argv)

  def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  if arguments.quick:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
  try:
    config = configs.load(arguments.config, overrides)
    programs = open_programs(config, open_topology(arguments.topology))
    compiled: Compiled = {}
    plan = make_plan(programs, compiled=compiled, log=log)
  except (ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  plans = [as_dict(plan)]
  if not arguments.json:
    print(report(plan))
  if not plan.fits() and arguments.tries > 0:
    tried, fitting = first_that_fits(
      programs, plan, tries=arguments.tries, compiled=compiled, log=log
    )
    plans[0]["tried"] = tried
    if fitting:
      plans.append(as_dict(fitting))
    if not arguments.json:
      print(f"\nthe first change that makes it fit: {tried[-1]}\n" if fitting else
            f"\nnone of the {len(tried)} changes tried makes it fit")  # fmt: skip
      print(report(fitting) if fitting else "\n".join(tried))
  if arguments.json:
    print(json.dumps(plans, indent=1))
  return 0 if plan.fits() else 1


if __name__ == "__main__":
  sys.exit(main())
