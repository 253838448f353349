"""Estimates what a config needs on a topology by compiling its programs."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from grpo_jax.build import matmul_precision
from grpo_jax.errors import first_line
from grpo_jax.plan.cost import Cost, Counter
from grpo_jax.plan.flops import matmul_flops
from grpo_jax.plan.hardware import roofline
from grpo_jax.plan.programs import Programs, bytes_of

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Compiled programs of one topology: name, mesh and settings -> what `compile_program` returns.
Compiled = dict[tuple, tuple["Memory", dict[str, tuple[Cost, float, float]]]]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Holds the memory of one device while one program runs, in bytes.

  Attributes:
    by_purpose: bytes by purpose, including buffers this program does not touch.
    total: their sum; the compiler's figure for a refused program.
    refused: the compiler's message if it ran out of memory, else "".
    error: relative error of our estimate of the program's arguments, `ours / compiler's - 1`.
  """

  by_purpose: dict[str, float]
  total: float
  refused: str = ""
  error: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
  """Holds the work of one part of a step on one device.

  Attributes:
    times: runs per step.
    cost: cost of one run.
    excess: FLOPs of all devices over those of the traced program, at least 1; above 1, devices
      repeat work.
    seconds: roofline bound of one run; None if the chip's rates are unknown.
    limit: the resource that sets the bound: `"compute"`, `"memory"` or `"links"`.
    matmul_time: mean time of a FLOP relative to one in bfloat16, as the dtypes and precisions of
      the matmuls have it.
  """

  times: int
  cost: Cost
  excess: float
  seconds: float | None
  limit: str | None
  matmul_time: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """Holds the estimate of a run.

  Attributes:
    model: `model.source` of the config.
    parameters: number of parameters of the model.
    topology, chip, devices, mesh: the hardware, and the size of each mesh axis.
    available: bytes of memory that a program may use per device; None if unknown.
    memory: by program: `update`, `score`, `teach`, `to_sampling_params` and `sample`; with a critic
      also `update_critic` and `values`.
    work: by part of a step, `sample` as `prefill` and `decode`; refused programs are left out.
    compile_seconds: time spent compiling.
    notes: what the estimate leaves out.
    rollout_devices: number of devices that only sample, of `devices`.
    ahead: `rollout.ahead` of the config.
  """

  model: str
  parameters: int
  topology: str
  chip: str
  devices: int
  mesh: dict[str, int]
  available: float | None
  memory: dict[str, Memory]
  work: dict[str, Work]
  compile_seconds: float
  notes: tuple[str, ...] = ()
  rollout_devices: int = 0
  ahead: int = 0

  def fits(self, *names: str) -> bool:
    """Returns whether the programs `names` (default: all) compile and fit into the memory."""
    chosen = [m for name, m in self.memory.items() if not names or name in names]
    return all(not m.refused and m.total <= (self.available or m.total) for m in chosen)

  @property
  def step_seconds(self) -> float | None:
    """Lower bound of a step's time in seconds, without rewards; None if a part has no bound."""
    parts = self.parts
    return parts and step_seconds(*parts, 0.0, self.ahead, self.rollout_devices > 0)

  @property
  def parts(self) -> tuple[float, float] | None:
    """Lower bounds of the time of sampling and of learning in seconds, each on its devices."""
    seconds = {name: w.seconds and w.seconds * w.times for name, w in self.work.items()}
    complete = self.work and None not in seconds.values()
    if not complete or any(m.refused for m in self.memory.values()):
      return None
    sampling = sum(seconds.get(name, 0.0) for name in ("prefill", "decode"))
    return sampling, sum(seconds.values()) - sampling


def step_seconds(
  sampling: float, learning: float, rewards: float, ahead: int, apart: bool
) -> float:
  """Returns the time of a step from its parts, all in seconds.

  A rollout takes the sum of the parts from its parameters to the end of its updates, and
  `ahead + 1` of them are under way.

  Args:
    ahead: `rollout.ahead`.
    apart: whether sampling and learning have devices of their own.

  Example:
    >>> [step_seconds(2.0, 1.0, 4.0, ahead, apart=True) for ahead in (0, 1, 2)]
    [7.0, 4.0, 4.0]
    >>> step_seconds(2.0, 1.0, 4.0, 1, apart=False), step_seconds(2.0, 1.0, 1.0, 1, apart=False)
    (4.0, 3.0)
  """
  total = sampling + learning + rewards
  busiest = max(sampling, learning) if apart else sampling + learning
  return total if not ahead else max(busiest, rewards, total / (ahead + 1))


def discard(text: str) -> None:
  """Ignores a line of progress."""


def make_plan(
  programs: Programs,
  *,
  compiled: Compiled | None = None,
  log: Callable[[str], None] = discard,
) -> Plan:
  """Compiles the programs of a config and estimates what a run needs.

  Args:
    programs: the programs of a config on a topology.
    compiled: compiled programs of this topology and of configs that differ only in mesh, remat and
      micro-batches. Programs compiled here are added to it.
    log: called with a line of progress before each program, which can take minutes.
  """
  compiled = {} if compiled is None else compiled
  config, topology, start = programs.config, programs.topology, time.monotonic()
  memory, work = {}, {}
  for name in programs.names:
    key = (name, *programs.mesh.shape.values(), *_settings_of(config, name))
    if key not in compiled:
      log(f"compiling {name} ...")
      with matmul_precision(config):
        compiled[key] = compile_program(programs, name)
    memory[name], parts = compiled[key]
    for part, (cost, excess, matmul_time) in parts.items():
      seconds, limit = roofline(cost, topology.chip, matmul_time) or (None, None)
      times = programs.runs_per_step(part)
      work[part] = Work(times, cost, excess, seconds, limit, matmul_time)
  return Plan(
    model=config.model.source,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(programs.weights)),
    topology=topology.name,
    chip=topology.chip.name,
    devices=len(topology.devices),
    mesh=dict(programs.mesh.shape),
    available=topology.chip.memory,
    memory=memory,
    work=work,
    compile_seconds=time.monotonic() - start,
    notes=(*programs.prompts.notes, *_notes(config, work)),
    rollout_devices=config.mesh.rollout_devices,
    ahead=config.rollout.ahead,
  )


def _settings_of(c: ConfigDict, name: str) -> tuple:
  """Returns the settings that change a program, of those that `make_plan` may see changed."""
  learns = name in ("update", "score", "teach", "update_critic", "values")
  return (c.model.remat, c.train.micro_batches, c.train.micro_batch_tokens) if learns else ()


def _notes(c: ConfigDict, work: dict[str, Work]) -> Iterator[str]:
  times = {part: w.matmul_time for part, w in work.items() if w.matmul_time >= 1.005}
  if times:
    shown = ", ".join(f"{time:.3g} times in {part}" for part, time in times.items())
    yield (
      f"the bounds count that matmuls take longer in float32 than in bfloat16: {shown} "
      f"(model.dtype={c.model.dtype}, model.matmul_precision={c.model.matmul_precision})"
    )
  if any(w.cost.between_slices for w in work.values()):
    yield (
      "the bounds leave out the time of the network between slices, whose rate is not known here: "
      "divide the bytes to other slices by that of a chip"
    )
  completions = c.eval.batch_prompts * max(c.eval.samples, 1)
  if completions > c.rollout.prompts_per_step * c.rollout.group_size:
    yield (
      f"an evaluation generates {completions} completions at once, more than a step, and is not "
      "part of this plan: lower eval.batch_prompts if memory is short"
    )
  if c.rollout.cache_gib:
    yield (
      "decode is counted as if every completion were as long as it may be; with rollout.cache_gib "
      "a shorter one makes room for the next"
    )
  if c.rollout.max_resamples:
    yield "the time of a step leaves out resampling (rollout.max_resamples) and evaluations"


# --- one program ----------------------------------------------------------------------------------


def compile_program(
  programs: Programs, name: str
) -> tuple[Memory, dict[str, tuple[Cost, float, float]]]:
  """Compiles one program.

  Args:
    programs: the programs of a config on a topology.
    name: one of `programs.names`.

  Returns:
    The memory of a device while the program runs, and part -> (cost, excess, matmul_time) as in
    `Work`; no parts if the compiler ran out of memory.
  """
  platform, count = programs.topology.platform, programs.mesh_of(name).devices.size
  program = getattr(programs, name)()
  traced = program.trace()
  lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
  by_purpose = _resident_bytes(programs, name)
  try:
    executable = lowered.compile()
  except Exception as error:  # XLA: its error type has no public name
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Memory(by_purpose, _required_bytes(str(error)), refused=first_line(error)), {}
  xla = executable.memory_analysis()
  argument_bytes = bytes_of(_used_arguments(traced, program.arguments))
  by_purpose["temporaries"] += (
    xla.temp_size_in_bytes + xla.output_size_in_bytes - xla.alias_size_in_bytes
    - by_purpose.get("KV cache", 0)
    - by_purpose.get("sampler's weights", 0) * (name == "to_sampling_params")
  )  # fmt: skip
  if platform == "tpu":
    by_purpose["program"] = float(xla.generated_code_size_in_bytes)
  # XLA:TPU: tiles are padded.
  by_purpose["padding"] = float(max(xla.argument_size_in_bytes - argument_bytes, 0))
  error = argument_bytes / max(xla.argument_size_in_bytes, 1) - 1
  memory = Memory(by_purpose, sum(by_purpose.values()), error=error)
  once, iteration = Counter(executable.as_text()).cost()
  names = ("prefill", "decode") if name == "sample" else (name,)
  flops = matmul_flops(traced.jaxpr)
  slowed = matmul_flops(traced.jaxpr, weight=programs.topology.chip.matmul_time)
  return memory, {
    part: _part_cost(*numbers, count)
    for part, *numbers in zip(names, (once, iteration), flops, slowed)
  }


def _part_cost(cost: Cost, flops: float, slowed: float, devices: int) -> tuple[Cost, float, float]:
  """Returns (cost, excess, matmul_time) of a part, as in `Work`.

  Args:
    cost: cost of one device, from the compiled program.
    flops: FLOPs of the traced program, over all devices.
    slowed: the same, each weighted by its time relative to bfloat16.
    devices: number of devices.
  """
  if not flops:
    return cost, 1.0, 1.0
  # A compiled program hides the FLOPs of library calls and of matmuls that became other operations,
  # but each device does at least its share.
  cost = dataclasses.replace(cost, flops=max(cost.flops, flops / devices))
  return cost, cost.flops * devices / flops, slowed / flops


def _used_arguments(traced: jax.stages.Traced, arguments: tuple) -> list[Any]:
  """Returns the leaves of the arguments that a program uses; jit drops the others."""
  jaxpr = traced.jaxpr.jaxpr
  used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
  used |= {id(variable) for variable in jaxpr.outvars}
  leaves = jax.tree.leaves(arguments)
  return [leaf for leaf, variable in zip(leaves, jaxpr.invars) if id(variable) in used]


def _resident_bytes(programs: Programs, name: str) -> dict[str, float]:
  """Returns the bytes on one device of the arrays that a run holds while a program runs."""
  state = programs.state
  if name == "sample" and programs.has_rollout_devices:
    return _sampler_bytes(programs) | {"temporaries": 0.0}
  by_purpose = {
    "parameters": bytes_of((state.params, programs.base_params)),
    "optimizer": bytes_of((state.opt_state, state.step, state.history)),
    "reference": bytes_of((state.reference, programs.reference)),
    "teachers": bytes_of([teacher.params for teacher in programs.taught_by]),
  }
  if programs.critic_state is not None:
    by_purpose["critic"] = bytes_of(programs.critic_state)
  r = programs.config.rollout
  if name == "to_sampling_params":
    by_purpose["sampler's weights"] = bytes_of(programs.copied_for_sampling)
  if name == "sample":
    by_purpose |= _sampler_bytes(programs)
  if name in ("update", "score", "teach", "update_critic", "values"):
    updates = name.startswith("update")
    parts = programs.config.train.mini_batches if updates else 1
    batch = programs.batch(r.prompts_per_step // parts, scored=updates)
    by_purpose["batch"] = bytes_of(batch)
  return {purpose: float(size) for purpose, size in by_purpose.items()} | {"temporaries": 0.0}


def _sampler_bytes(programs: Programs) -> dict[str, float]:
  """Returns the bytes on one device of what the sampler holds."""
  held = {
    "sampler's weights": programs.copied_for_sampling,
    "KV cache": programs.cache,
    "batch": programs.sample().arguments[1:],
  }
  return {purpose: float(bytes_of(tree)) for purpose, tree in held.items()}


def _required_bytes(message: str) -> float:
  """Returns the bytes that the compiler says a refused program needs."""
  match = re.search(r"(?:Used |required for [^(]*\()([\d.]+)([KMGT]?)", message)
  return float(match.group(1)) * UNITS[match.group(2)] if match else float("inf")


def as_dict(plan: Plan) -> dict[str, Any]:
  """Returns the plan as a JSON object."""
  return dataclasses.asdict(plan) | {"fits": plan.fits(), "step_seconds": plan.step_seconds}
