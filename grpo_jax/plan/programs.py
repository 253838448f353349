"""Opens the programs of a run from shapes alone, with the arrays that the run holds meanwhile.

Reads no weights and creates no array, so the devices need not be present.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from grpo_jax import build, rollout, tasks, tokens
from grpo_jax import config as configs
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import reduction
from grpo_jax.learning.step import Batch, TrainState, make_score, make_train_step, only_trained
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.presets import config_of
from grpo_jax.models.io.weights import Weights, shapes_of
from grpo_jax.plan.hardware import Topology
from grpo_jax.sampling import generate as generation


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
class Programs:
  """Holds the programs of a config on a topology.

  Attributes:
    config: the config of the run.
    topology: the devices to compile for.
    mesh, model, algorithm, optimizer: as in `build.Run`.
    new_adapters: key -> LoRA adapters, as in `build.Run`; None if all weights are trained.
    prompt_length: padded length of a prompt, in tokens.
  """

  config: ConfigDict
  topology: Topology
  mesh: Mesh
  model: Decoder
  algorithm: Algorithm
  optimizer: Any
  new_adapters: Callable[[jax.Array], Any] | None
  prompt_length: int

  @property
  def names(self) -> tuple[str, ...]:
    """Programs to compile: the methods of these names."""
    score = ("score",) if self.runs_per_step("score") else ()
    return ("update", *score, "to_sampling_params", "sample")

  def runs_per_step(self, part: str) -> int:
    """Returns how often a step runs a part: a program, or `prefill` or `decode` of `sample`."""
    counts = {
      "update": self.updates,
      "score": self.has_kl + (self.updates > 1),
      "decode": self.config.rollout.completion_length - 1,
    }
    return counts.get(part, 1)

  # --- arrays in memory ---------------------------------------------------------------------------

  def _params(self, tree: Any, **options: Any) -> Any:
    return put(tree, meshes.param_shardings(self.mesh, tree, **options))

  @cached_property
  def weights(self) -> Any:
    """All parameters of the model."""
    return self._params(shapes_of(self.model.config))

  @cached_property
  def base_params(self) -> Any:
    """Parameters that adapters are added to; None without adapters."""
    return self.weights if self.new_adapters else None

  @cached_property
  def state(self) -> TrainState:
    """Everything that training changes."""
    params = self.weights
    if self.new_adapters:
      params = self._params(jax.eval_shape(self.new_adapters, jax.random.key(0)))
    opt_state = self._params(jax.eval_shape(self.optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(self.mesh))
    moving = self.config.reference.sync_every > 0
    return TrainState(step, params, opt_state, params if moving else None)

  @property
  def has_kl(self) -> bool:
    """True if the loss has a KL term."""
    return self.algorithm.beta > 0

  @property
  def reference(self) -> Any:
    """A fixed reference with its own copy of the weights; None without such a copy."""
    own = self.has_kl and not self.config.reference.sync_every and not self.new_adapters
    return self.weights if own else None

  @property
  def updates(self) -> int:
    """Number of updates per rollout."""
    return self.config.train.epochs * self.config.train.mini_batches

  @cached_property
  def sampling_params(self) -> Any:
    """Parameters of the sampler."""
    make = partial(build.to_sampling_params, self.model, self.mesh)
    shapes = jax.eval_shape(make, self.base_params, self.state.params)
    return self._params(shapes, sampling=True)

  def _rows(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def batch(self, prompts: int, *, scored: bool = True) -> Batch:
    """Returns a batch of `prompts` prompts; `scored` adds the log-probs that `score` computes."""
    r = self.config.rollout
    rows = (prompts, r.group_size, r.completion_length)
    per_token = self.algorithm.advantage == "process_advantages"
    logp = self._rows(*rows) if scored else None
    return Batch(
      prompts=self._rows(prompts, self.prompt_length, dtype=jnp.int32),
      prompt_mask=self._rows(prompts, self.prompt_length, dtype=bool),
      completions=self._rows(*rows, dtype=jnp.int32),
      mask=self._rows(*rows, dtype=bool),
      advantages=self._rows(*(rows if per_token else rows[:2])),
      weights=self._rows(*rows),
      sampler_logp=self._rows(*rows),
      ref_logp=logp if self.has_kl else None,
      old_logp=logp if self.updates > 1 else None,
    )

  @cached_property
  def cache(self) -> Any:
    """Keys and values of prompts and completions, sharded by prompts and key-value heads."""
    c, r = self.model.config, self.config.rollout
    tensor = self.mesh.shape["tensor"]
    heads = "tensor" if c.kv_heads % tensor == 0 else None

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # [..., rows, K, _, _]
      before = [None] * (leaf.ndim - 4)
      spec = jax.sharding.PartitionSpec(*before, ("data", "fsdp"), heads)
      sharding = NamedSharding(self.mesh, spec)
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows, length = (r.prompts_per_step, r.group_size), max(r.completion_length - 1, 1)
    own = jax.eval_shape(lambda p: self.model.empty_cache(p, *rows, length), self.sampling_params)
    shape = (c.layers, r.prompts_per_step, c.kv_heads, self.prompt_length, c.head_dim)
    return jax.tree.map(with_sharding, (own, (jax.ShapeDtypeStruct(shape, self.model.dtype),) * 2))

  # --- programs -----------------------------------------------------------------------------------

  def update(self) -> tuple[Any, tuple]:
    """Returns the jitted update and its arguments."""
    c = self.config
    with_adapters = lora.with_adapters if self.new_adapters else only_trained
    step = make_train_step(
      self.model,
      self.algorithm,
      self.optimizer,
      lambda count: c.optimizer.learning_rate,
      temperature=c.rollout.temperature,
      micro_batches=self._micro_batches(c.train.mini_batches, c.train.micro_batches),
      with_adapters=with_adapters,
    )
    batch = self.batch(c.rollout.prompts_per_step // c.train.mini_batches)
    return step, (self.state, batch, self.base_params)

  def _micro_batches(self, parts: int, least: int) -> int:
    """Returns the number of micro-batches of one of `parts` parts of a step's prompts."""
    r = self.config.rollout
    return reduction.count_micro_batches(
      r.prompts_per_step // parts,
      self.prompt_length + r.group_size * r.completion_length,
      budget=self.config.train.micro_batch_tokens,
      prompt_shards=self.mesh.shape["data"] * self.mesh.shape["fsdp"],
      least=least,
    )

  def score(self) -> tuple[Any, tuple]:
    """Returns the jitted log-probs under the reference or the old parameters, and its arguments."""
    with_adapters = lora.with_adapters if self.new_adapters else only_trained
    c = self.config
    score = make_score(
      self.model,
      temperature=c.rollout.temperature,
      micro_batches=self._micro_batches(1, c.train.micro_batches * c.train.mini_batches),
      with_adapters=with_adapters,
    )
    batch = self.batch(c.rollout.prompts_per_step, scored=False)
    return score, (self.state.params, batch, self.base_params)

  def to_sampling_params(self) -> tuple[Any, tuple]:
    """Returns the jitted conversion from trained to sampling parameters, and its arguments."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.sampling_params)
    make = partial(build.to_sampling_params, self.model, self.mesh)
    return jax.jit(make, out_shardings=shardings), (self.base_params, self.state.params)

  def sample(self) -> tuple[Any, tuple]:
    """Returns the jitted sampler and its arguments."""
    r = self.config.rollout
    generate = partial(
      generation.generate,
      self.model,
      length=r.completion_length,
      temperature=r.temperature,
      pad_id=0,
      max_compactions=generation.compactions(r.completion_length),
      prompt_shards=self.mesh.shape["data"] * self.mesh.shape["fsdp"],
    )
    keys = self._rows(r.prompts_per_step, r.group_size, dtype=jax.random.key(0).dtype)
    states = 2 + sum(len(text.encode()) for text in r.stop)
    table = jax.ShapeDtypeStruct(
      (states, self.model.config.vocab_size), jnp.int32, sharding=meshes.replicated(self.mesh)
    )
    batch = self.batch(r.prompts_per_step)
    arguments = (self.sampling_params, batch.prompts, batch.prompt_mask, keys, table)
    return jax.jit(generate), arguments


def open_programs(config: ConfigDict, topology: Topology) -> Programs:
  """Opens the programs of a config.

  Raises:
    ConfigError: with every problem of the config.
  """
  c, count = config, len(topology.devices)
  problems = configs.check(c, count)

  attempt = partial(configs.attempt, problems)
  algorithm = attempt(lambda: build.make_algorithm(c.algorithm))
  shape = attempt(lambda: config_of(c.model.source))
  weights = Weights(shape, shapes_of(shape), None) if shape else None
  adapters = attempt(lambda: build.new_adapters_of(c.lora, weights)) if shape else None
  length = attempt(lambda: _prompt_length(c))
  if length and shape and length + c.rollout.completion_length > shape.context:
    problems.append(
      f"rollout.completion_length is {c.rollout.completion_length}: with prompts of {length} "
      f"tokens that exceeds the context of {c.model.source}, {shape.context} tokens"
    )
  if c.train.reduction != "fast":
    problems.append(
      f"train.reduction is {c.train.reduction!r}, which the plan does not support; use "
      "--config.train.reduction=fast"
    )
  if problems:
    raise configs.ConfigError(problems)
  mesh = meshes.make_mesh(configs.mesh_shape(c.mesh, count), topology.devices)
  model = attempt(lambda: build.make_model(c, shape, mesh))
  if problems:
    raise configs.ConfigError(problems)
  return Programs(
    config=c,
    topology=topology,
    mesh=mesh,
    model=model,
    algorithm=algorithm,
    optimizer=build.optimizer_of(c)[1],
    new_adapters=adapters,
    prompt_length=length,
  )


def _prompt_length(c: ConfigDict) -> int:
  """Returns the padded prompt length; opens the task if the config does not set it."""
  if c.rollout.prompt_length:
    return c.rollout.prompt_length
  try:
    task = tasks.make_task(c.task.name, **c.task.settings.to_dict())
    tokenizer = tokens.load_tokenizer(c.model.source)
    fit = (rollout.fitting(tokenizer, split, 0, "error") for split in task.splits.values())
    return max(length for _, length in fit)
  except (ValueError, FileNotFoundError, ImportError) as error:
    raise ValueError(
      "rollout.prompt_length is 0, the longest prompt of the task, but the task or the tokenizer "
      f"cannot be opened ({error}); set it: --config.rollout.prompt_length=512"
    ) from error
