"""The programs of a run from shapes alone: what is compiled, and what lies in memory meanwhile.

No weights are read and no array is made, so the devices need not exist.
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


def put(tree: Any, layout: Any) -> Any:
  """Shapes with their layout: one for all leaves, or a tree of them."""
  if isinstance(layout, NamedSharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(
    lambda leaf, one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree, layout
  )


def bytes_of(tree: Any) -> int:
  """Bytes that a tree of laid-out shapes (or arrays) takes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class Programs:
  """A config on a topology, as shapes.

  Attributes:
    new_adapters: key -> adapters, as in `build.Run`; None where all weights are trained.
    prompt_length: tokens, padded.
  """

  config: ConfigDict
  topology: Topology
  mesh: Mesh
  model: Decoder
  algorithm: Algorithm
  optimizer: Any
  new_adapters: Callable[[jax.Array], Any] | None
  prompt_length: int

  # --- what lies in memory ------------------------------------------------------------------------

  def _params(self, tree: Any, **options: Any) -> Any:
    return put(tree, meshes.param_shardings(self.mesh, tree, **options))

  @cached_property
  def weights(self) -> Any:
    """All parameters of the model."""
    return self._params(shapes_of(self.model.config))

  @cached_property
  def base_params(self) -> Any:
    """Parameters beside adapters; None without adapters."""
    return self.weights if self.new_adapters else None

  @cached_property
  def state(self) -> TrainState:
    """What the update changes."""
    params = self.weights
    if self.new_adapters:
      params = self._params(jax.eval_shape(self.new_adapters, jax.random.key(0)))
    opt_state = self._params(jax.eval_shape(self.optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(self.mesh))
    moving = self.config.reference.sync_every > 0
    return TrainState(step, params, opt_state, params if moving else None)

  @property
  def has_kl(self) -> bool:
    return self.algorithm.beta > 0

  @property
  def reference(self) -> Any:
    """A reference that is fixed and has its own copy of the weights; None where it has not."""
    own = self.has_kl and not self.config.reference.sync_every and not self.new_adapters
    return self.weights if own else None

  @property
  def updates(self) -> int:
    """Updates of one rollout."""
    return self.config.train.epochs * self.config.train.mini_batches

  @cached_property
  def sampling_params(self) -> Any:
    """The sampler's weights."""
    make = partial(build.to_sampling_params, self.model, self.mesh)
    made = jax.eval_shape(make, self.base_params, self.state.params)
    return self._params(made, sampling=True)

  def _rows(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))

  def batch(self, prompts: int, *, finished: bool = True) -> Batch:
    """A batch of so many prompts; `finished` with the log-probs that `score` puts into it."""
    r = self.config.rollout
    rows = (prompts, r.group_size, r.completion_length)
    per_token = self.algorithm.advantage == "process_advantages"
    logp = self._rows(*rows) if finished else None
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
    """Keys and values of prompts and completions, split as prompts and key-value heads are."""
    c, r = self.model.config, self.config.rollout
    tensor = self.mesh.shape["tensor"]
    heads = "tensor" if c.kv_heads % tensor == 0 else None

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # [..., rows, K, _, _]
      before = [None] * (leaf.ndim - 4)
      spec = jax.sharding.PartitionSpec(*before, ("data", "fsdp"), heads)
      sharding = NamedSharding(self.mesh, spec)
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows, length = (r.prompts_per_step, r.group_size), max(r.completion_length - 1, 1)
    own = jax.eval_shape(lambda p: self.model.empty_cache(p, *rows, length), self.sampling_params)
    shape = (c.layers, r.prompts_per_step, c.kv_heads, self.prompt_length, c.head_dim)
    return jax.tree.map(placed, (own, (jax.ShapeDtypeStruct(shape, self.model.dtype),) * 2))

  # --- what is compiled ---------------------------------------------------------------------------

  def update(self) -> tuple[Any, tuple]:
    """(the jitted update, its arguments)."""
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
    """Of one of so many parts of a step's prompts, none of whose completions ends early."""
    r = self.config.rollout
    return reduction.count_micro_batches(
      r.prompts_per_step // parts,
      self.prompt_length + r.group_size * r.completion_length,
      budget=self.config.train.micro_batch_tokens,
      prompt_shards=self.mesh.shape["data"] * self.mesh.shape["fsdp"],
      least=least,
    )

  def score(self) -> tuple[Any, tuple]:
    """(the jitted log-probs under a reference or the old parameters, its arguments)."""
    with_adapters = lora.with_adapters if self.new_adapters else only_trained
    c = self.config
    score = make_score(
      self.model,
      temperature=c.rollout.temperature,
      micro_batches=self._micro_batches(1, c.train.micro_batches * c.train.mini_batches),
      with_adapters=with_adapters,
    )
    batch = self.batch(c.rollout.prompts_per_step, finished=False)
    return score, (self.state.params, batch, self.base_params)

  def to_sampling_params(self) -> tuple[Any, tuple]:
    """(the jitted way from the trained parameters to the sampler's, its arguments)."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, self.sampling_params)
    make = partial(build.to_sampling_params, self.model, self.mesh)
    return jax.jit(make, out_shardings=layout), (self.base_params, self.state.params)

  def sample(self) -> tuple[Any, tuple]:
    """(the jitted sampler, its arguments)."""
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
  """The programs of a config; ConfigError with everything that is wrong with it."""
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
      f"tokens that is more than the context of {c.model.source}, {shape.context}"
    )
  if c.train.reduction != "fast":
    problems.append(
      f"train.reduction is {c.train.reduction!r}, which is not planned for; give "
      "--config.train.reduction=fast for the rest"
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
  """The padded length of prompts; where the config leaves it to the task, the task is opened."""
  if c.rollout.prompt_length:
    return c.rollout.prompt_length
  try:
    task = tasks.make_task(c.task.name, **c.task.settings.to_dict())
    tokenizer = tokens.load_tokenizer(c.model.source)
    fit = (rollout.fitting(tokenizer, split, 0, "error") for split in task.splits.values())
    return max(length for _, length in fit)
  except (ValueError, FileNotFoundError, ImportError) as error:
    raise ValueError(
      "rollout.prompt_length is 0, the longest prompt of the task, and the task or the tokenizer "
      f"is not here to say how long that is ({error}); give it: --config.rollout.prompt_length=512"
    ) from error
