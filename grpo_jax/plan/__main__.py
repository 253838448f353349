"""What a run will need, before it is paid for.

`python -m grpo_jax.plan --config experiments/X.py --topology v5e:4x4 [--config.a.b=v]` compiles
the programs of a config for devices that need not be here, from shapes alone. It prints memory,
work, traffic between chips, the roofline of each part, and whether it all fits; if not, it compiles
changes until one fits. Topologies: v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8, local.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("plan", "grpo_jax.plan")

import jax
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.models.decoder import REMAT
from grpo_jax.plan.estimate import UNITS, Plan, as_dict, make_plan, silent
from grpo_jax.plan.hardware import GIB, Topology, open_topology
from grpo_jax.plan.programs import open_programs

# --- what would make it fit -----------------------------------------------------------------------


def changes(config: ConfigDict, plan: Plan, kv_heads: int) -> Iterator[list[str]]:
  """Changes worth trying, as overrides, the cheapest first: micro-batches, remat, the mesh."""
  c, mesh = config, plan.mesh
  if plan.fits("to_sampling_params", "sample") and _resident(plan) <= (plan.available or 0):
    here = _most_micro(c, mesh["data"] * mesh["fsdp"])
    micro = c.train.micro_batches
    while (micro := micro * 2) <= here:
      yield [f"--config.train.micro_batches={micro}"]
    policies = tuple(REMAT)
    for policy in policies[policies.index(c.model.remat) + 1 :]:
      yield [f"--config.model.remat={policy}"]
      if here > c.train.micro_batches:
        yield [f"--config.model.remat={policy}", f"--config.train.micro_batches={here}"]
  for tensor in (1, 2, 4, 8):
    fsdp = plan.devices // tensor
    other = (mesh["data"], mesh["tensor"]) != (1, tensor)
    divides = plan.devices % tensor == 0 == kv_heads % tensor
    if other and divides and c.rollout.prompts_per_step % (fsdp * c.train.mini_batches) == 0:
      yield [
        "--config.mesh.data=1", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}",
        "--config.model.remat=layers", f"--config.train.micro_batches={_most_micro(c, fsdp)}",
      ]  # fmt: skip


def _most_micro(c: ConfigDict, rows: int) -> int:
  """Micro-batches with one prompt each on every device."""
  return max(c.rollout.prompts_per_step // (rows * c.train.mini_batches), 1)


def _resident(plan: Plan) -> float:
  """What lies in memory whatever the update is cut into."""
  kinds = plan.memory["update"].kinds
  return sum(kinds[name] for name in ("parameters", "optimizer", "reference"))


def first_that_fits(
  config: ConfigDict,
  topology: Topology,
  plan: Plan,
  *,
  tries: int,
  known: dict[tuple, Any] | None = None,
  say: Callable[[str], None] = silent,
) -> tuple[list[str], Plan | None]:
  """(the overrides that were compiled, the last of which fits, its plan); None if none does."""
  programs = open_programs(config, topology)
  known, tried = {} if known is None else known, []
  for overrides in changes(config, plan, programs.model.config.kv_heads):
    if len(tried) == tries:
      break
    tried.append(" ".join(overrides))
    say(f"trying {tried[-1]}")
    changed = configs.override(config.copy_and_resolve_references(), overrides)
    new = make_plan(changed, topology, known=known, say=say)
    if new.fits():
      return tried, new
  return tried, None


# --- the report -----------------------------------------------------------------------------------


def report(plan: Plan) -> str:
  """The plan as text."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  small = all(m.total < GIB for m in plan.memory.values())
  unit, name_of_unit = (2**20, "MiB") if small else (GIB, "GiB")
  lines = [
    f"model      {plan.model}: {plan.parameters / 1e6:.1f} M parameters",
    f"devices    {plan.topology}: {plan.devices} x {plan.chip}, mesh {mesh}",
    "",
    f"{name_of_unit} per device      " + "".join(f"{name:>10}" for name in plan.memory),
  ]
  kinds = dict.fromkeys(kind for m in plan.memory.values() for kind in m.kinds)
  for kind in kinds:
    sizes = [m.kinds.get(kind, 0.0) for m in plan.memory.values()]
    refused = [m.refused and kind == "temporaries" for m in plan.memory.values()]
    if any(sizes) or any(refused):
      cells = ["?" if no else f"{size / unit:.3f}" for size, no in zip(sizes, refused)]
      lines.append(f"  {kind:18}" + "".join(f"{cell:>10}" for cell in cells))
  lines.append(
    "  total             " + "".join(f"{m.total / unit:10.3f}" for m in plan.memory.values())
  )
  if plan.available:
    lines.append(f"  there is          {plan.available / unit:10.3f}")
  for name, m in plan.memory.items():
    if m.refused:
      lines.append(f"  {name} does not compile: {m.refused}")
  errors = [abs(m.error) for m in plan.memory.values() if m.error is not None]
  if errors:
    lines.append(f"  arguments, our sum against the compiler's: at most {max(errors):.2%} apart")
  lines += ["", "one device         times   Gop    excess  read+written  sent      bound     by"]
  for name, w in plan.work.items():
    seconds = "-" if w.seconds is None else f"{w.seconds:.3g} s"
    lines.append(
      f"  {name:14}{w.times:8}  {w.cost.ops / 1e9:<8.4g}{w.excess:5.2f}  {size(w.cost.bytes):>11}  "
      f"{size(w.cost.sent):>9}  {seconds:>9}  {w.limit or ''}"
    )
  for name, w in plan.work.items():
    for kind, (count, sent) in sorted(w.cost.collectives.items()):
      lines.append(f"    {name}: {count:.0f} x {kind}, {size(sent)}")
  if plan.step_seconds is not None:
    lines.append(f"a step takes at least {plan.step_seconds:.3g} s")
  lines += [f"note: {note}" for note in plan.notes]
  lines.append(
    f"it {'fits' if plan.fits() else 'does NOT fit'} (compiled in {plan.compile_seconds:.0f} s)"
  )
  return "\n".join(lines)


def size(count: float) -> str:
  """`2048` -> `2 KiB`."""
  for unit, one in reversed(UNITS.items()):
    if count >= one and unit:
      return f"{count / one:.3g} {unit}iB"
  return f"{count:.0f} B"


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.plan", description=__doc__)
  parser.add_argument("--config", required=True, help="an experiment file; it is run as a program")
  parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8, local")
  parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
  parser.add_argument(
    "--quick", action="store_true", help="compile with less effort: half the time"
  )
  parser.add_argument("--tries", type=int, default=6, help="changes to compile if it does not fit")
  arguments, overrides = parser.parse_known_args(argv)

  def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  if arguments.quick:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
  try:
    config = configs.load(arguments.config, overrides)
    topology = open_topology(arguments.topology)
    known: dict[tuple, Any] = {}
    plan = make_plan(config, topology, known=known, say=say)
  except (ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  plans = [as_dict(plan)]
  if not arguments.json:
    print(report(plan))
  if not plan.fits() and arguments.tries > 0:
    tried, fitting = first_that_fits(
      config, topology, plan, tries=arguments.tries, known=known, say=say
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
