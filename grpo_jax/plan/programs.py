"""Opens the programs of a run from shapes alone, with the arrays that the run holds meanwhile.

The programs are those of the run: the factories of `learning.updates`, `sampling.sampler` and
`build` make them. Nothing reads weights or creates an array, so the devices need not be present.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from grpo_jax import build, misfits, rollout, tasks
from grpo_jax import config as configs
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.critic import Critic
from grpo_jax.learning.entropy import EntropyControl
from grpo_jax.learning.skipping import History
from grpo_jax.learning.step import Batch, TrainState, ValueHead, WithAdapters, only_trained
from grpo_jax.learning.updates import (
  Teacher,
  in_the_loss,
  make_critic_update,
  make_scoring,
  make_update,
  make_valuation,
)
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder, route_dtype
from grpo_jax.models.io.gguf_blocks import Stored
from grpo_jax.models.io.presets import config_of
from grpo_jax.models.io.weights import Weights, shapes_of, with_value_head
from grpo_jax.models.load import open_weights
from grpo_jax.models.protocol import Cache, Model, Params
from grpo_jax.models.quantized import FROM_FILE, quantized_shapes
from grpo_jax.plan.hardware import Topology
from grpo_jax.sampling.sampler import make_generate
from grpo_jax.sampling.stopping import stop_table


def put(tree: Any, shardings: Any) -> Any:
  """Returns the shapes of a tree with shardings: one for all leaves, or a tree of them."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


def bytes_of(tree: Any) -> int:
  """Returns the bytes of a tree on one device, for arrays or for shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class Program:
  """Holds a jitted function with its arguments.

  Attributes:
    function: a function with `jax.jit`'s `trace`.
    arguments: shapes with shardings, in the place of arrays.
    static: static arguments by name.
  """

  function: Any
  arguments: tuple
  static: dict[str, Any] = dataclasses.field(default_factory=dict)

  def trace(self) -> jax.stages.Traced:
    """Traces the function for its arguments."""
    return self.function.trace(*self.arguments, **self.static)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Holds the sizes that depend on the task.

  Attributes:
    length: padded length of a prompt, in tokens.
    stop_states: number of states of the stop table, S.
    notes: what is left out, for the report.
    episodes: whether completions are episodes of several turns.
  """

  length: int
  stop_states: int
  notes: tuple[str, ...] = ()
  episodes: bool = False


@dataclasses.dataclass(frozen=True)
class Programs:
  """Holds the programs of a config on a topology.

  Attributes:
    config: the config of the run.
    topology: the devices to compile for.
    mesh, model, algorithm, schedule, optimizer: as in `build.Run`.
    rollout_mesh, sampler_model: the devices that sample, and the model there; `mesh` and `model`
      unless some devices do nothing else.
    new_adapters: key -> LoRA adapters, as in `build.Run`; None if all weights are trained.
    prompts: what the task determines.
    stored: as in `Weights`.
    critic: as in `build.Run`.
    teachers: models that the policy learns from, the largest first.
  """

  config: ConfigDict
  topology: Topology
  mesh: Mesh
  model: Decoder
  algorithm: Algorithm
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  new_adapters: Callable[[jax.Array], Params] | None
  prompts: Prompts
  stored: Mapping[str, Sequence[Stored]] = dataclasses.field(default_factory=dict)
  critic: Critic | ValueHead | None = None
  teachers: tuple[Decoder, ...] = ()
  rollout_mesh: Mesh | None = None
  sampler_model: Decoder | None = None

  def mesh_of(self, name: str) -> Mesh:
    """Returns the mesh that a program runs on."""
    return self.rollout_mesh or self.mesh if name == "sample" else self.mesh

  @property
  def has_rollout_devices(self) -> bool:
    """True if some devices only sample."""
    return self.rollout_mesh not in (None, self.mesh)

  @property
  def cache_rows(self) -> int:
    """Completions in the sampler's cache at a time, over all devices."""
    r, mesh = self.config.rollout, self.mesh_of("sample")
    shards = meshes.prompt_shards(meshes.batch_sharding(mesh))
    own = r.prompts_per_step * r.group_size // shards
    return shards * min(self._bounded_rows or own, own)

  @property
  def _bounded_rows(self) -> int:
    """Completions of a shard that `rollout.cache_gib` has room for; 0: all of them."""
    mesh, prompts = self.mesh_of("sample"), self.prompts
    return build.cache_rows(
      self.config, self.model, mesh, prompts.length, episodes=prompts.episodes
    )

  @property
  def names(self) -> tuple[str, ...]:
    """Programs to compile: the methods of these names."""
    scores = [name for name in ("score", "teach") if self.runs_per_step(name)]
    values = ("values",) if self.critic else ()
    critic = ("update_critic",) if self.critic_state else ()
    convert = () if self.quantized else ("to_sampling_params",)
    return ("update", *scores, *critic, *values, *convert, "sample")

  def runs_per_step(self, part: str) -> int:
    """Returns how often a step runs a part: a program, or `prefill` or `decode` of `sample`."""
    counts = {
      "update": self.updates,
      "update_critic": self.updates,
      "score": self.has_kl + self.keeps_old + self.teaches_itself,
      # As often as the largest teacher would have to score: with several sizes an upper bound.
      "teach": 0 if self._in_the_loss[0] else len(self.teachers),
      "decode": self._decode_steps,
    }
    return counts.get(part, 1)

  @property
  def _decode_steps(self) -> int:
    """Number of decode steps if every completion is as long as it may be."""
    r = self.config.rollout
    if not r.cache_gib:
      return r.completion_length - 1
    return r.completion_length * -(-r.prompts_per_step * r.group_size // self.cache_rows)

  # --- arrays in memory ---------------------------------------------------------------------------

  def _params(self, tree: Params, **options: Any) -> Params:
    return put(tree, meshes.param_shardings(self.mesh, tree, **options))

  @cached_property
  def weights(self) -> Params:
    """All parameters of the model."""
    shapes = shapes_of(self.model.config)
    return self._params(with_value_head(shapes) if self.value_head else shapes)

  @property
  def value_head(self) -> ValueHead | None:
    """The critic, if it stands on the policy's trunk."""
    return self.critic if isinstance(self.critic, ValueHead) else None

  @cached_property
  def base_params(self) -> Params | None:
    """Parameters that adapters are added to; None without adapters."""
    if not self.new_adapters:
      return None
    return (
      self._params(quantized_shapes(self.weights, self.quantized, self.stored))
      if self.quantized
      else self.weights
    )

  @property
  def quantized(self) -> str:
    """Names the scheme of a quantized base; empty without one."""
    scheme = self.config.lora.quantize
    return "" if scheme == "none" else scheme

  @property
  def with_adapters(self) -> WithAdapters:
    """`(base_params, trained parameters) -> parameters of the model`."""
    return lora.with_adapters if self.new_adapters else only_trained

  @cached_property
  def state(self) -> TrainState:
    """Everything that training changes."""
    params, whole = self.weights, meshes.replicated(self.mesh)
    if self.new_adapters:
      params = self._params(jax.eval_shape(self.new_adapters, jax.random.key(0)))
    return TrainState(
      step=put(jax.ShapeDtypeStruct((), jnp.int32), whole),
      params=params,
      opt_state=self._params(jax.eval_shape(self.optimizer.init, params)),
      reference=params if self.config.reference.sync_every else None,
      history=put(jax.eval_shape(History.new), whole),
      entropy=put(jax.eval_shape(partial(EntropyControl.new, self.algorithm)), whole),
    )

  @cached_property
  def critic_state(self) -> TrainState | None:
    """Everything that training changes of the critic alone; None without one."""
    if self.critic is None or self.value_head:
      return None
    params, whole = self._params(shapes_of(self.critic.model.config)), meshes.replicated(self.mesh)
    return TrainState(
      step=put(jax.ShapeDtypeStruct((), jnp.int32), whole),
      params=params,
      opt_state=self._params(jax.eval_shape(self.critic.optimizer.init, params)),
      history=put(jax.eval_shape(History.new), whole),
    )

  @property
  def has_kl(self) -> bool:
    """True if the loss has a KL term."""
    return self.algorithm.beta > 0

  @property
  def reference(self) -> Params | None:
    """A fixed reference with its own copy of the weights; None without such a copy."""
    own = self.has_kl and not self.config.reference.sync_every and not self.new_adapters
    return self.weights if own else None

  @cached_property
  def taught_by(self) -> list[Teacher]:
    """The teachers with the shapes of their parameters."""
    return [
      Teacher(model, self._params(build.as_held(model, shapes_of(model.config))))
      for model in self.teachers
    ]

  @property
  def _in_the_loss(self) -> tuple[list[Model], Params]:
    return in_the_loss(self.algorithm, self.base_params, self.taught_by)

  @property
  def teaches_itself(self) -> bool:
    """True if the policy, shown a solution, is its own teacher."""
    return bool(configs.own_teacher(self.config))

  @property
  def keeps_old(self) -> bool:
    """True if the old log-probs are scored before the first update."""
    several = self.updates > 1 and self.algorithm.needs_old
    return several or self.teaches_itself or self.algorithm.penalizes == "token_rewards"

  @property
  def updates(self) -> int:
    """Number of updates per rollout."""
    return self.config.train.epochs * self.config.train.mini_batches

  @cached_property
  def sampling_params(self) -> Params:
    """Parameters of the sampler."""
    if self.quantized:
      shapes = lora.with_adapters(self.base_params, self.state.params)
    else:
      make = partial(build.to_sampling_params, self.model, self.mesh, int8=self.samples_in_int8)
      shapes = jax.eval_shape(make, self.base_params, self.state.params)
    return put(shapes, meshes.param_shardings(self.mesh_of("sample"), shapes, sampling=True))

  @property
  def samples_in_int8(self) -> bool:
    """True if rollouts are sampled with rounded matrices."""
    return self.config.rollout.weights == "int8"

  @property
  def copied_for_sampling(self) -> Params:
    """Returns what the sampler holds beside the arrays that are trained.

    A quantized base is not copied, unless it is split over `fsdp`.
    """
    if self.quantized and self.mesh.shape["fsdp"] == 1 and not self.has_rollout_devices:
      return None
    return self.sampling_params

  def _rows(self, *shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def batch(self, prompts: int, *, scored: bool = True) -> Batch:
    """Returns a batch of `prompts` prompts; `scored` adds the log-probs that `score` computes."""
    r = self.config.rollout
    rows = (prompts, r.group_size, r.completion_length)
    by_token = self.critic is not None or self.algorithm.entropy_share is not None
    by_token |= self.algorithm.of_token_rewards
    per_token = "steps" in self.algorithm.rewards or by_token
    of_critic = self._rows(*rows) if self.critic else None
    logp = self._rows(*rows) if scored else None
    return Batch(
      staleness=self._rows(prompts) if self.config.rollout.ahead else None,
      prompts=self._rows(prompts, self.prompts.length, dtype=jnp.int32),
      prompt_mask=self._rows(prompts, self.prompts.length, dtype=bool),
      completions=self._rows(*rows, dtype=jnp.int32),
      mask=self._rows(*rows, dtype=bool),
      advantages=self._rows(*(rows if per_token else rows[:2])),
      weights=self._rows(*rows),
      sampler_logp=self._rows(*rows),
      ref_logp=logp if self.has_kl else None,
      token_rewards=self._rows(*rows) if self.algorithm.of_token_rewards else None,
      values=of_critic if scored else None,
      returns=of_critic if scored else None,
      old_logp=logp if self.keeps_old else None,
      teacher_logp=logp if self.runs_per_step("teach") or self.teaches_itself else None,
      nll_weights=self._rows(*rows) if self.algorithm.nll_weight > 0 else None,
      **self._routes(rows),
    )

  def _routes(self, rows: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the routes of a batch, if the update uses those of the sampler."""
    c = self.model.config
    if not self.model.record_routes:
      return {}
    kind, size = route_dtype(c.experts), c.layers * c.experts_per_token
    return {
      "routes": self._rows(*rows, size, dtype=kind),
      "prompt_routes": self._rows(rows[0], self.prompts.length, size, dtype=kind),
    }

  @cached_property
  def cache(self) -> Cache:
    """Keys and values of prompts and completions, sharded by prompts and key-value heads."""
    c, r = self.model.config, self.config.rollout
    mesh = self.mesh_of("sample")
    heads = meshes.cache_axes(mesh, c.kv_heads)

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # [..., rows, K, _, _]
      leading = [None] * (leaf.ndim - 4)
      own = heads if leaf.shape[-3] == c.kv_heads else None  # routes have one axis for all heads
      spec = jax.sharding.PartitionSpec(*leading, *meshes.batch_sharding(mesh).spec, own)
      return put(leaf, NamedSharding(mesh, spec))

    rows, length = self.cache_rows, build.cache_slots(self.config, episodes=self.prompts.episodes)
    own = jax.eval_shape(lambda p: self.model.empty_cache(p, rows, 1, length), self.sampling_params)
    # With a budget, each row has a copy of its prompt.
    prompts = r.prompts_per_step + (rows if r.cache_gib else 0)
    shape = (c.layers, prompts, c.kv_heads, self.prompts.length, c.head_dim)
    prompt = jax.ShapeDtypeStruct(shape, self.model.dtype)
    return jax.tree.map(with_sharding, (own, (prompt, prompt)))

  # --- programs -----------------------------------------------------------------------------------

  def update(self) -> Program:
    """Returns the update of one mini-batch."""
    c, (models, frozen) = self.config, self._in_the_loss
    update = make_update(
      self.model,
      self.algorithm,
      self.optimizer,
      self.schedule,
      build.update_config(c),
      with_adapters=self.with_adapters,
      teachers=models,
      value_head=self.value_head,
    )
    batch = self.batch(c.rollout.prompts_per_step // c.train.mini_batches)
    return Program(update, (self.state, batch, frozen))

  def score(self) -> Program:
    """Returns the log-probs of a rollout under the reference or the old parameters."""
    c = self.config
    score = make_scoring(self.model, build.update_config(c), with_adapters=self.with_adapters)
    batch = self.batch(c.rollout.prompts_per_step, scored=False)
    return Program(score, (self.state.params, batch, self.base_params))

  def update_critic(self) -> Program:
    """Returns the update of the critic on one mini-batch."""
    c = self.config
    batch = self.batch(c.rollout.prompts_per_step // c.train.mini_batches)
    update = make_critic_update(self.critic, build.update_config(c))
    return Program(update, (self.critic_state, batch))

  def values(self) -> Program:
    """Returns the values of a rollout under the critic."""
    batch = self.batch(self.config.rollout.prompts_per_step, scored=False)
    model, state = self.model, self.state
    if self.critic_state:
      model, state = self.critic.model, self.critic_state
    values = make_valuation(model, build.update_config(self.config))
    return Program(values, (state.params, batch))

  def teach(self) -> Program:
    """Returns the log-probs of a rollout under the largest teacher."""
    c, teacher = self.config, self.taught_by[0]
    score = make_scoring(teacher.model, build.update_config(c))
    return Program(score, (teacher.params, self.batch(c.rollout.prompts_per_step, scored=False)))

  def to_sampling_params(self) -> Program:
    """Returns the conversion from trained to sampling parameters."""
    convert = build.make_to_sampling_params(
      self.model, self.mesh, self.weights, int8=self.samples_in_int8
    )
    return Program(convert, (self.base_params, self.state.params))

  def sample(self) -> Program:
    """Returns the sampler of a whole step."""
    r, vocab = self.config.rollout, self.model.config.vocab_size
    mesh = self.mesh_of("sample")
    layout = meshes.batch_sharding(mesh)
    sample = make_generate(
      self.sampler_model or self.model,
      length=r.completion_length,
      pad_id=0,
      prompt_sharding=layout,
      cache_rows=self._bounded_rows,
    )
    keys = self._rows(r.prompts_per_step, r.group_size, dtype=jax.random.key(0).dtype)
    table = jax.ShapeDtypeStruct((self.prompts.stop_states, vocab), jnp.int32)
    table = put(table, meshes.replicated(mesh))
    batch = self.batch(r.prompts_per_step)
    prompts = put((batch.prompts, batch.prompt_mask, keys), layout)
    arguments = (self.sampling_params, *prompts, table)
    return Program(sample, arguments, {"temperature": r.temperature})


def open_programs(
  config: ConfigDict, topology: Topology, *, prompts: Prompts | None = None
) -> Programs:
  """Opens the programs of a config.

  Args:
    config: the config of a run.
    topology: the devices to compile for.
    prompts: `read_prompts` of a config with the same task and rollout; None reads them.

  Raises:
    ConfigError: with every problem of the config.
  """
  c, count = config, len(topology.devices)
  problems = configs.check(c, count)
  if topology.slices > 1 and c.mesh.slices != topology.slices:
    problems.append(
      f"mesh.slices is {c.mesh.slices}, and {topology.name} has {topology.slices} slices: set "
      f"--config.mesh.slices={topology.slices}"
    )

  attempt = partial(configs.attempt, problems)
  algorithm = attempt(lambda: build.make_algorithm(c.algorithm))
  shape = attempt(lambda: config_of(c.model.source))
  c, _ = (shape and attempt(lambda: build.with_lora_source(c, shape))) or (c, None)
  weights = Weights(shape, shapes_of(shape), None) if shape else None
  if shape and c.lora.quantize == FROM_FILE:  # the types of its tensors count
    weights = attempt(lambda: open_weights(c.model.source))
  adapters = attempt(lambda: build.new_adapters_of(c.lora, weights)) if weights else None
  values = None
  if algorithm and "values" in algorithm.rewards and c.critic.trunk == "own":
    values = attempt(lambda: config_of(configs.critic_source(c)))
  teachers = [attempt(lambda source=s: config_of(source)) for s in configs.teacher_sources(c)]
  if algorithm:
    problems += misfits.teacher_misfits(c, algorithm) + misfits.sampler_misfits(c, algorithm)
  prompts = prompts or attempt(lambda: read_prompts(c))
  problems += misfits.expert_misfits(c, shape) if shape else []
  if prompts and shape and prompts.length + c.rollout.completion_length > shape.context:
    problems.append(
      f"rollout.completion_length is {c.rollout.completion_length}: with prompts of "
      f"{prompts.length} tokens that exceeds the context of {c.model.source}, {shape.context}"
    )
  if c.train.reduction != "fast":
    problems.append(
      f"train.reduction is {c.train.reduction!r}, which the plan does not support; use "
      "--config.train.reduction=fast"
    )
  if c.rollout.partial_tokens:
    problems.append(
      f"rollout.partial_tokens is {c.rollout.partial_tokens}, which the plan does not support; use "
      "--config.rollout.partial_tokens=0"
    )
  if problems:
    raise configs.ConfigError(problems)
  learners = topology.devices
  if c.mesh.rollout_devices:
    learners, _ = meshes.split_devices(c.mesh.rollout_devices, learners)
  mesh = attempt(
    lambda: meshes.make_mesh(configs.mesh_shape(c.mesh, count), learners, c.mesh.slices)
  )
  if problems:
    raise configs.ConfigError(problems)
  longest = prompts.length + c.rollout.completion_length
  model = attempt(lambda: build.make_model(c, shape, mesh, longest))
  rollout_mesh = mesh
  if c.mesh.rollout_devices:
    _, rollout_mesh = build.make_meshes(c, topology.devices)
  sampler_model = model and attempt(
    lambda: build.make_sampler_model(c, model, mesh, rollout_mesh, longest)
  )
  attempt(
    lambda: build.cache_rows(c, model, rollout_mesh, prompts.length, episodes=prompts.episodes)
  )
  teachers = [
    attempt(lambda shape=shape: build.make_model(c, shape, mesh, longest)) for shape in teachers
  ]
  if problems:
    raise configs.ConfigError(problems)
  schedule, optimizer = build.optimizer_of(c, c.optimizer.learning_rate)
  values = values and dataclasses.replace(values, labels=1)
  return Programs(
    config=c,
    topology=topology,
    mesh=mesh,
    model=model,
    algorithm=algorithm,
    schedule=schedule,
    optimizer=optimizer,
    new_adapters=adapters,
    stored=weights.stored,
    prompts=prompts,
    critic=build.critic_of(c, algorithm, values, mesh, longest),
    teachers=tuple(sorted(teachers, key=_size, reverse=True)),
    rollout_mesh=rollout_mesh,
    sampler_model=sampler_model,
  )


def _size(model: Decoder) -> int:
  """Returns the number of parameters of a model."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(model.config)))


def read_prompts(c: ConfigDict) -> Prompts:
  """Reads the prompt length and the stop strings of a config and its task.

  If the config sets the prompt length, a task that cannot be opened on this machine is left out,
  with a note.

  Raises:
    ValueError: the config leaves the prompt length to the task, and the task or the tokenizer
      cannot be opened; or a stop string is empty.
  """
  length, stop, notes = c.rollout.prompt_length, tuple(c.rollout.stop), ()
  episodes = False
  try:
    task = tasks.make_task(c.task.name, **c.task.settings.to_dict())
    stop = tuple(dict.fromkeys((*task.stop, *stop)))
    episodes = task.environment is not None
    if not length:
      tokenizer = build.tokenizer_of(c, config_of(c.model.source))
      splits = [rollout.with_system(split, c.chat.system) for split in task.splits.values()]
      length = max(rollout.longest_prompt(tokenizer, split) for split in splits)
  except (ValueError, OSError, ImportError) as error:
    if not length:
      raise ValueError(
        "rollout.prompt_length is 0, the longest prompt of the task, but the task or the tokenizer "
        f"cannot be opened ({error}); set it: --config.rollout.prompt_length=512"
      ) from error
    notes = (f"the stop strings of the task are left out, since it cannot be opened: {error}",)
  # Ids that end a completion do not change the number of states.
  states = len(stop_table([], stop, ids=[0], vocab_size=1))
  if episodes:
    notes = (
      "episodes are counted as completions of rollout.completion_length tokens; the time of "
      "environments is left out",
    )
  return Prompts(length, states, notes, episodes)
