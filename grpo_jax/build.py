"""From a config to the objects of a run, with everything that is wrong reported at once.

Nothing here compiles or trains, so a mistake costs seconds.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import rollout, tasks, tokens
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.losses import lookup_algorithm
from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import deterministic
from grpo_jax.learning import optimizer as optimizers
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import TrainState, WithAdapters, only_trained
from grpo_jax.learning.updates import UpdateConfig
from grpo_jax.models import lora
from grpo_jax.models.attention import tiled_attention
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.io.weights import Weights
from grpo_jax.models.kernels import KERNELS, each_layer, where_long
from grpo_jax.models.load import open_weights
from grpo_jax.reward_model import RewardModel
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks.base import StepRewards, Task
from grpo_jax.tasks.rewards.workers import RewardWorkers, Scorer, score_in_process

# Batch sizes that the update is compiled for: quarters of the prompts of a step.
BUCKETS = 4
LEARNED = "reward_model"  # what the learned reward is called


@dataclasses.dataclass(frozen=True)
class Run:
  """What a config describes, before any step.

  Attributes:
    weights: of the model as it was before training; read when they are asked for.
    task: prompts over the budget are already out of it, the learned reward is in it.
    new_adapters: key -> LoRA adapters, trained instead of the weights; None = the weights.
    pad_prompts_to_multiple: the update takes a multiple of this many prompts (see `rollout.collect`).
    seed: of the adapters' first values.
    chunks: what sums are made in, in one order on any mesh; None = as the compiler likes.
  """

  mesh: Mesh
  model: Decoder
  weights: Weights
  task: Task
  sampler: Sampler
  algorithm: Algorithm
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  new_adapters: Callable[[jax.Array], Any] | None
  pad_prompts_to_multiple: int
  seed: int
  chunks: Chunks | None = None

  def loaded_params(self) -> Any:
    """The parameters of the model as it was before training, read straight into their layout."""
    return self.weights.read(meshes.param_shardings(self.mesh, self.weights.shapes))

  def loaded_base_params(self) -> Any:
    """What is not trained: everything beside adapters; None where there are none."""
    return self.loaded_params() if self.new_adapters else None

  def loaded_reference(self) -> Any:
    """The parameters of a fixed reference for the KL term; None without one.

    Without its adapters, a model with adapters is its own reference.
    """
    if self.algorithm.beta == 0:
      return None
    return {} if self.new_adapters else self.loaded_params()

  def initial_state(self, *, moving_reference: bool = False) -> TrainState:
    """Trained parameters and a fresh optimizer state, laid out by the sharding table."""
    params = self._adapters() if self.new_adapters else self.loaded_params()
    reference = params if moving_reference else None
    return TrainState.create(params, self.optimizer, reference=reference, copy=False)

  def _adapters(self) -> Any:
    key = jax.random.key(self.seed)
    layout = meshes.param_shardings(self.mesh, jax.eval_shape(self.new_adapters, key))
    return jax.jit(self.new_adapters, out_shardings=layout)(key)

  @property
  def with_adapters(self) -> WithAdapters:
    """`(base_params, trained) -> parameters of the model`."""
    return lora.with_adapters if self.new_adapters else only_trained

  def for_sampling(self, base_params: Any) -> Callable[[Any], Any]:
    """`trained parameters -> the sampler's` (`to_sampling_params`), whole over `fsdp`."""
    make = partial(to_sampling_params, self.model, self.mesh)
    shapes = jax.eval_shape(partial(make, None), self.weights.shapes)
    layout = meshes.param_shardings(self.mesh, shapes, sampling=True)
    if self.chunks:
      make = deterministic.replicated(make, self.mesh)
    return partial(jax.jit(make, out_shardings=layout), base_params)

  @property
  def step_rewards(self) -> StepRewards | None:
    """The task's rewards for steps, where the algorithm asks for them."""
    return self.task.step_rewards if self.algorithm.advantage == "process_advantages" else None

  @property
  def reward_weights(self) -> tuple[float, ...]:
    """Weight of each reward function."""
    return tuple(weight for _, weight in self.task.rewards.values())


def build(config: ConfigDict) -> Run:
  """Opens and checks everything that `config` names. Raises ConfigError with all the problems."""
  c = config
  problems = configs.check(c, jax.device_count())

  attempt = partial(configs.attempt, problems)
  algorithm = attempt(lambda: make_algorithm(c.algorithm))
  task = attempt(lambda: tasks.make_task(c.task.name, **c.task.settings.to_dict()))
  weights = attempt(lambda: open_weights(c.model.source, seed=c.seed))
  tokenizer = attempt(lambda: tokens.load_tokenizer(c.model.source)) if weights else None
  if c.reward_model.source:
    learned = attempt(lambda: RewardModel.load(c.reward_model.source))
    if task and learned:
      rewards = {**task.rewards, LEARNED: (learned, c.reward_model.weight)}
      task = dataclasses.replace(task, rewards=rewards)
  adapters = attempt(lambda: new_adapters_of(c.lora, weights)) if weights else None
  if problems and (task is None or tokenizer is None):
    raise configs.ConfigError(problems)

  task, prompt_length = attempt(lambda: _fit_task(c.rollout, task, tokenizer)) or (task, 1)
  problems += _misfits(c, weights.config, task, tokenizer, algorithm, prompt_length)
  if problems:
    raise configs.ConfigError(problems)

  mesh = meshes.make_mesh(configs.mesh_shape(c.mesh, jax.device_count()))
  attempt(lambda: hosts.check_mesh(mesh))
  chunks = Chunks(c.train.chunks, mesh) if c.train.reduction == "deterministic" else None
  model = attempt(lambda: make_model(c, weights.config, mesh))
  sampler = model and attempt(
    lambda: Sampler(
      model=model,
      tokenizer=tokenizer,
      prompt_length=prompt_length,
      completion_length=c.rollout.completion_length,
      stop=tuple(dict.fromkeys((*task.stop, *c.rollout.stop))),
      stop_ids=tuple(c.rollout.stop_ids),
      prompt_sharding=meshes.batch_sharding(mesh),
      chunks=chunks,
    )
  )
  if problems:
    raise configs.ConfigError(problems)
  schedule, optimizer = optimizer_of(c)
  parts = c.train.mini_batches * c.train.micro_batches
  smallest = (chunks.count if chunks else mesh.shape["data"] * mesh.shape["fsdp"]) * parts
  return Run(
    mesh=mesh,
    model=model,
    weights=weights,
    task=task,
    sampler=sampler,
    algorithm=algorithm,
    schedule=schedule,
    optimizer=optimizer,
    new_adapters=adapters,
    pad_prompts_to_multiple=smallest * -(-c.rollout.prompts_per_step // (BUCKETS * smallest)),
    seed=c.seed,
    chunks=chunks,
  )


def make_model(c: ConfigDict, shape: ModelConfig, mesh: Mesh) -> Decoder:
  """The functions of a model of this shape, as the config wants them."""
  # In chunks each device computes by itself: there is nothing to place.
  fast = c.train.reduction == "fast"
  batch = meshes.batch_sharding(mesh)
  return Decoder(
    shape,
    dtype={"float32": jnp.float32, "bfloat16": jnp.bfloat16}[c.model.dtype],
    remat=c.model.remat,
    lora_scale=lora.scale(c.lora.rank, c.lora.alpha) if c.lora.rank else 1.0,
    **({"place": meshes.placer(mesh)} if fast else {}),
    prompt_shards=meshes.prompt_shards(batch) if fast else 1,
    vocab_shards=meshes.vocab_shards(mesh, shape.vocab_size),
    attention=attention_of(c, shape, mesh),
  )


def attention_of(c: ConfigDict, shape: ModelConfig, mesh: Mesh) -> Callable[..., jax.Array]:
  """`Decoder.attention` for these devices. ValueError for a kernel that they or the model lack.

  `auto` takes what cannot fail for a reason given here, and only for rows that are long enough.
  """
  platform, wanted = mesh.devices.flat[0].platform, c.model.attention
  if wanted == "auto":
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if kernel is None or c.train.reduction == "deterministic" or _lacks(kernel, c, shape, platform):
      return tiled_attention
    return where_long(each_layer(meshes.over_mesh(mesh, KERNELS[kernel])))
  if wanted == "tiled":
    return tiled_attention
  if reason := _lacks(wanted, c, shape, platform):
    raise ValueError(f"model.attention is {wanted!r}, {reason}; set it to 'auto' or 'tiled'")
  return each_layer(meshes.over_mesh(mesh, KERNELS[wanted]))


def _lacks(kernel: str, c: ConfigDict, shape: ModelConfig, platform: str) -> str:
  """Why a kernel is not possible, "" if it is."""
  if (needed := {"splash": "tpu", "cudnn": "gpu"}[kernel]) != platform:
    return f"which runs on a {needed}, and the devices are of platform {platform!r}"
  if kernel == "cudnn" and c.model.dtype != "bfloat16":
    return f"which needs model.dtype 'bfloat16', and that is {c.model.dtype!r}"
  if kernel == "cudnn" and shape.attn_softcap is not None:
    return f"which cannot cap scores, and {c.model.source} caps them at {shape.attn_softcap:g}"
  if kernel == "cudnn" and (shape.head_dim % 8 or shape.head_dim > 128):
    return (
      "which needs heads whose width is a multiple of 8 up to 128, and those of "
      f"{c.model.source} have {shape.head_dim}"
    )
  return ""


def to_sampling_params(model: Decoder, mesh: Mesh, base_params: Any, params: Any) -> Any:
  """Trained parameters -> the sampler's: adapters merged, in the form that decodes fastest.

  On CPUs layers apart, as they are. Elsewhere stacked, and in the dtype of the activations, to
  which the model casts them anyway (but for the norms, which it reads in float32).
  """
  params = params if base_params is None else lora.merge(base_params, params, model.lora_scale)
  if mesh.devices.flat[0].platform == "cpu":
    return unstack(params)

  def cast(path: tuple, leaf: jax.Array) -> jax.Array:
    return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(model.dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def new_adapters_of(settings: ConfigDict, weights: Weights) -> Callable[[jax.Array], Any] | None:
  """`lora.init` for this model, or None; ValueError where the settings do not fit it."""
  if settings.rank == 0:
    return None
  make = partial(lora.init, shapes=weights.shapes, pattern=settings.targets, rank=settings.rank)
  jax.eval_shape(make, jax.random.key(0))
  return make


def _misfits(
  c: ConfigDict,
  model: ModelConfig,
  task: Task,
  tokenizer: tokens.AnyTokenizer,
  algorithm: Algorithm | None,
  prompt_length: int,
) -> list[str]:
  """What is right by itself and does not go together."""
  problems = []
  budget = prompt_length + c.rollout.completion_length
  if budget > model.context:
    problems.append(
      f"rollout.completion_length is {c.rollout.completion_length}: with prompts of "
      f"{prompt_length} tokens that makes {budget}, and {c.model.source} has a context of "
      f"{model.context}; lower it to {max(model.context - prompt_length, 0)} or less"
    )
  if tokenizer.vocab_size > model.vocab_size:
    problems.append(
      f"the tokenizer of {c.model.source} has {tokenizer.vocab_size} ids, its model only "
      f"{model.vocab_size}"
    )
  if model.labels:
    problems.append(
      f"model.source {c.model.source!r} is a classification model, which cannot write text: it can "
      "be a reward_model.source"
    )
  if algorithm and algorithm.advantage == "process_advantages" and task.step_rewards is None:
    problems.append(
      f"algorithm.advantage 'process_advantages' needs rewards for steps, and task {task.name!r} "
      "has no step_rewards; choose another advantage or give the task this function"
    )
  if algorithm and algorithm.beta == 0 and c.reference.sync_every:
    problems.append(
      f"reference.sync_every is {c.reference.sync_every}, but algorithm.beta is 0: without a KL "
      "term there is no reference; set sync_every to 0 or beta above 0"
    )
  return problems


def optimizer_of(c: ConfigDict) -> tuple[optax.Schedule, optax.GradientTransformation]:
  o = c.optimizer
  schedule = optimizers.learning_rate_schedule(
    learning_rate=o.learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup_steps,
    steps=c.steps * c.train.epochs * c.train.mini_batches,
    final_fraction=o.final_fraction,
  )
  optimizer = optimizers.make_optimizer(
    schedule,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
  )
  return schedule, optimizer


def update_config(c: ConfigDict) -> UpdateConfig:
  """The settings of the updates of a rollout."""
  return UpdateConfig(
    temperature=c.rollout.temperature,
    epochs=c.train.epochs,
    mini_batches=c.train.mini_batches,
    micro_batches=c.train.micro_batches,
    micro_batch_tokens=c.train.micro_batch_tokens,
    spike=c.train.spike,
    max_skipped=c.train.max_skipped,
    sync_every=c.reference.sync_every,
    sync_share=c.reference.sync_share,
    seed=c.seed,
  )


def make_scorer(config: ConfigDict, run: Run) -> contextlib.AbstractContextManager[Scorer]:
  """The rewards of a run: its task's in worker processes, the learned one in this process."""
  if config.rewards.workers == 0:
    return contextlib.nullcontext(score_in_process(run.task))
  return RewardWorkers(
    partial(tasks.make_task, config.task.name, **config.task.settings.to_dict()),
    config.rewards.workers,
    config.rewards.timeout,
    here={name: run.task.rewards[name] for name in [LEARNED] if name in run.task.rewards},
  )


def make_algorithm(settings: ConfigDict) -> Algorithm:
  """Returns the row that a config names, with the fields that are not None in place of its own."""
  row = lookup_algorithm(settings.name)
  changes = {
    name: settings[name] for name in settings if name != "name" and settings[name] is not None
  }
  for name in configs.CHOICES:
    if isinstance(changes.get(name), str) and ".py:" in changes[name]:
      changes[name] = configs.load_function(changes[name])
  if changes.get("kl", row.kl) == "none" and "beta" not in changes:
    changes["beta"] = 0.0
  return dataclasses.replace(row, **changes)


def _fit_task(settings: ConfigDict, task: Task, tokenizer: tokens.AnyTokenizer):
  """The task with prompts within the budget, and the padded prompt length."""
  splits, longest = {}, 1
  for name, split in task.splits.items():
    splits[name], length = rollout.fitting(
      tokenizer, split, settings.prompt_length, settings.overlong
    )
    longest = max(longest, length)
  return dataclasses.replace(task, splits=splits), longest
