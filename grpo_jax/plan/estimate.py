"""What a config needs on a topology, found out by compiling its programs."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from grpo_jax.errors import first_line
from grpo_jax.plan.cost import Cost, Counter
from grpo_jax.plan.flops import product_ops
from grpo_jax.plan.hardware import Topology, bound
from grpo_jax.plan.programs import Programs, bytes_of, open_programs

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory of one device while one program runs, bytes.

  Attributes:
    kinds: by what it is for; everything that lies there, in use by this program or not.
    total: their sum; what the compiler says it needs where it gave up.
    refused: the compiler's message where it gave up for lack of memory, "" otherwise.
    error: our figure for the program's arguments against the compiler's, `ours / theirs - 1`.
  """

  kinds: dict[str, float]
  total: float
  refused: str = ""
  error: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
  """One part of a step, on one device.

  Attributes:
    times: how often a step runs it.
    cost: of one time.
    excess: operations of all devices over those that the mathematics asks for; 1 is none too many.
    seconds, limit: what one time takes at least, and what it waits for; None without a chip's data.
  """

  times: int
  cost: Cost
  excess: float
  seconds: float | None
  limit: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run needs. `work` is empty for programs that did not compile."""

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

  def fits(self, *names: str) -> bool:
    """Whether these programs (or all) compile, and have the memory they need."""
    chosen = [self.memory[name] for name in names or self.memory]
    return all(not m.refused and m.total <= (self.available or m.total) for m in chosen)

  @property
  def step_seconds(self) -> float | None:
    """The bound of a whole step; None if a part has none."""
    seconds = [w.seconds and w.seconds * w.times for w in self.work.values()]
    whole = self.work and None not in seconds and not any(m.refused for m in self.memory.values())
    return sum(seconds) if whole else None


def silent(text: str) -> None:
  """Says nothing."""


def make_plan(
  config: ConfigDict,
  topology: Topology,
  *,
  known: dict[tuple, Any] | None = None,
  say: Callable[[str], None] = silent,
) -> Plan:
  """Compiles every program of `config` for `topology`. ConfigError with all that is wrong.

  Args:
    known: programs that were compiled for this topology and a config that differs in nothing but
      mesh, remat and micro-batches; those compiled here are added.
    say: is told what is going on, which can take minutes.
  """
  known = {} if known is None else known
  p, c, began = open_programs(config, topology), config, time.monotonic()
  scores = p.has_kl + (p.updates > 1)
  memory, work = {}, {}
  for name in ("update", *(["score"] if scores else []), "to_sampling_params", "sample"):
    key = (name, *p.mesh.shape.values())
    if name in ("update", "score"):
      key += (c.model.remat, c.train.micro_batches, c.train.micro_batch_tokens)
    if key not in known:
      say(f"compiling {name} ...")
      known[key] = compile_part(p, name)
    memory[name], found = known[key]
    for part, (cost, excess) in found.items():
      times = {"update": p.updates, "score": scores, "decode": c.rollout.completion_length - 1}
      seconds, limit = bound(cost, p.topology.chip) or (None, None)
      work[part] = Work(times.get(part, 1), cost, excess, seconds, limit)
  leaves = jax.tree.leaves(p.weights)
  return Plan(
    model=c.model.source,
    parameters=sum(leaf.size for leaf in leaves),
    topology=p.topology.name,
    chip=p.topology.chip.name,
    devices=len(p.topology.devices),
    mesh=dict(p.mesh.shape),
    available=p.topology.chip.memory,
    memory=memory,
    work=work,
    compile_seconds=time.monotonic() - began,
    notes=tuple(_notes(c)),
  )


def _notes(c: ConfigDict) -> Iterator[str]:
  answers = c.eval.batch_prompts * max(c.eval.samples, 1)
  if answers > c.rollout.prompts_per_step * c.rollout.group_size:
    yield (
      f"an evaluation generates {answers} completions at once, more than a step does, and is not "
      "in this plan: lower eval.batch_prompts if memory is short"
    )
  if c.rollout.max_resamples:
    yield "resamples (rollout.max_resamples) and evaluations are not in the time of a step"


# --- one program ----------------------------------------------------------------------------------


def compile_part(p: Programs, name: str) -> tuple[Memory, dict[str, tuple[Cost, float]]]:
  """(memory while the program runs, its parts: cost and excess)."""
  function, arguments = getattr(p, name)()
  traced = function.trace(*arguments)
  lowered = traced.lower(lowering_platforms=(_lowering(p.topology.platform),))
  kinds = _kinds(p, name)
  try:
    compiled = lowered.compile()
  except Exception as error:  # XLA's error type has no public name of its own
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Memory(kinds, _needed(str(error)), refused=first_line(error)), {}
  xla = compiled.memory_analysis()
  ours = bytes_of(_read(traced, arguments))
  kinds["temporaries"] += (
    xla.temp_size_in_bytes + xla.output_size_in_bytes - xla.alias_size_in_bytes
    - kinds.get("KV cache", 0)
    - kinds.get("sampler's weights", 0) * (name == "to_sampling_params")
  )  # fmt: skip
  if p.topology.platform == "tpu":
    kinds["program"] = float(xla.generated_code_size_in_bytes)
  # Tiles of a TPU are padded.
  kinds["padding"] = float(max(xla.argument_size_in_bytes - ours, 0))
  error = ours / max(xla.argument_size_in_bytes, 1) - 1
  memory = Memory(kinds, sum(kinds.values()), error=error)
  once, turn = Counter(compiled.as_text()).cost()
  asked_once, asked_turn = product_ops(traced.jaxpr)
  parts = {"prefill": (once, asked_once), "decode": (turn, asked_turn)}
  parts = parts if name == "sample" else {name: (once, asked_once)}
  count = len(p.topology.devices)
  return memory, {
    part: (_at_least(cost, asked / count), cost.ops * count / asked if asked else 1.0)
    for part, (cost, asked) in parts.items()
  }


def _read(traced: Any, arguments: tuple) -> list[Any]:
  """The leaves of the arguments that a program reads; jit leaves the others out of it."""
  jaxpr = traced.jaxpr.jaxpr
  used = {id(one) for equation in jaxpr.eqns for one in equation.invars}
  used |= {id(one) for one in jaxpr.outvars}
  return [leaf for leaf, name in zip(jax.tree.leaves(arguments), jaxpr.invars) if id(name) in used]


def _lowering(platform: str) -> str:
  return {"gpu": "cuda"}.get(platform, platform)


def _at_least(cost: Cost, ops: float) -> Cost:
  """`cost` with no fewer operations than a device's share: calls into libraries hide theirs."""
  return dataclasses.replace(cost, ops=max(cost.ops, ops))


def _kinds(p: Programs, name: str) -> dict[str, float]:
  """Bytes on one device by kind, of all that we lay there ourselves while the program runs."""
  state = p.state
  kinds = {
    "parameters": bytes_of((state.params, p.base_params)),
    "optimizer": bytes_of((state.opt_state, state.step)),
    "reference": bytes_of((state.reference, p.reference)),
  }
  r = p.config.rollout
  if name in ("to_sampling_params", "sample"):
    kinds["sampler's weights"] = bytes_of(p.sampling_params)
  if name == "sample":
    kinds["KV cache"] = bytes_of(p.cache)
    kinds["batch"] = bytes_of(p.sample()[1][1:])
  if name in ("update", "score"):
    parts = p.config.train.mini_batches if name == "update" else 1
    kinds["batch"] = bytes_of(p.batch(r.prompts_per_step // parts, finished=name == "update"))
  return {kind: float(size) for kind, size in kinds.items()} | {"temporaries": 0.0}


def _needed(message: str) -> float:
  """Bytes that the compiler says a program needs when it refuses it."""
  found = re.search(r"(?:Used |required for [^(]*\()([\d.]+)([KMGT]?)", message)
  return float(found.group(1)) * UNITS[found.group(2)] if found else float("inf")


def as_dict(plan: Plan, tried: list[str] | None = None) -> dict[str, Any]:
  """The plan for a machine."""
  found = dataclasses.asdict(plan) | {"fits": plan.fits(), "step_seconds": plan.step_seconds}
  return found if tried is None else found | {"tried": tried}
