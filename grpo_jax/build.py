"""From a config to the objects of a run, with everything that is wrong reported at once.

Nothing here compiles or trains, so a mistake costs seconds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import optimizer as optimizers
from grpo_jax import rollout, sharding, tasks, tokens
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.losses import lookup_algorithm
from grpo_jax.models import checkpoints as weights
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.tasks.base import Task
from grpo_jax.train_step import TrainState

# Batch sizes that the update is compiled for: quarters of the prompts of a step.
BUCKETS = 4


@dataclasses.dataclass(frozen=True)
class Run:
  """What a config describes, before any step.

  Attributes:
    params: float32, on the host; `state` puts them on the mesh.
    task: prompts over the budget are already out of it.
    bucket: the update takes a multiple of this many prompts (see `rollout.collect`).
  """

  mesh: Mesh
  model: Decoder
  params: Any
  task: Task
  sampler: rollout.Sampler
  algorithm: Algorithm
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  bucket: int

  def initial_state(self) -> TrainState:
    """Parameters and a fresh optimizer state, laid out by the sharding table."""
    params = self.initial_params()
    shapes = jax.eval_shape(self.optimizer.init, params)
    init = jax.jit(self.optimizer.init, out_shardings=sharding.param_shardings(self.mesh, shapes))
    step = jax.device_put(jnp.int32(0), sharding.replicated(self.mesh))
    return TrainState(step=step, params=params, opt_state=init(params))

  def for_sampling(self) -> Callable[[Any], Any]:
    """Jitted `params -> params` in the sampler's layout: layers apart, whole over `fsdp`."""
    shapes = jax.eval_shape(unstack, self.params)
    layout = sharding.param_shardings(self.mesh, shapes, sampling=True)
    return jax.jit(unstack, out_shardings=layout)

  def initial_params(self) -> Any:
    """The parameters that the model was loaded with, on the mesh: the start, and the reference."""
    return jax.device_put(self.params, sharding.param_shardings(self.mesh, self.params))


def build(config: ConfigDict) -> Run:
  """Loads and checks everything that `config` names. Raises ConfigError with all the problems."""
  c = config
  problems = configs.check(c, jax.device_count())

  def attempt(make: Callable[[], Any]) -> Any:
    try:
      return make()
    except (ValueError, FileNotFoundError, ImportError) as error:
      problems.append(str(error))
      return None

  algorithm = attempt(lambda: make_algorithm(c.algorithm))
  task = attempt(lambda: tasks.make_task(c.task.name, **c.task.settings.to_dict()))
  loaded = attempt(lambda: weights.load(c.model.source, seed=c.seed))
  tokenizer = attempt(lambda: tokens.load_tokenizer(c.model.source)) if loaded else None
  if problems and (task is None or tokenizer is None):
    raise configs.ConfigError(problems)

  model_config, params = loaded
  task, prompt_length = attempt(lambda: _fit_task(c.rollout, task, tokenizer)) or (task, 1)
  budget = prompt_length + c.rollout.completion_length
  if budget > model_config.context:
    problems.append(
      f"rollout.completion_length is {c.rollout.completion_length}: with prompts of "
      f"{prompt_length} tokens that makes {budget}, and {c.model.source} has a context of "
      f"{model_config.context}; lower it to {max(model_config.context - prompt_length, 0)} or less"
    )
  if tokenizer.vocab_size > model_config.vocab_size:
    problems.append(
      f"the tokenizer of {c.model.source} has {tokenizer.vocab_size} ids, its model only "
      f"{model_config.vocab_size}"
    )
  if algorithm and algorithm.advantage == "multi_objective":
    problems.append("algorithm.advantage 'multi_objective' is for direct use of the pure functions")
  if problems:
    raise configs.ConfigError(problems)

  mesh = sharding.make_mesh(configs.mesh_shape(c.mesh, jax.device_count()))
  dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[c.model.dtype]
  model = Decoder(model_config, dtype=dtype, remat=c.model.remat)
  sampler = attempt(
    lambda: rollout.Sampler(
      model=model,
      tokenizer=tokenizer,
      prompt_length=prompt_length,
      completion_length=c.rollout.completion_length,
      stop=task.stop,
      prompt_sharding=sharding.batch_sharding(mesh),
    )
  )
  if problems:
    raise configs.ConfigError(problems)
  o = c.optimizer
  schedule = optimizers.learning_rate_schedule(
    learning_rate=o.learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup_steps,
    steps=c.steps,
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
  smallest = mesh.shape["data"] * mesh.shape["fsdp"] * c.train.micro_batches
  bucket = smallest * -(-c.rollout.prompts_per_step // (BUCKETS * smallest))
  return Run(mesh, model, params, task, sampler, algorithm, schedule, optimizer, bucket)


def make_algorithm(settings: ConfigDict) -> Algorithm:
  """The row named in a config with the fields that are not None put in place of its own."""
  row = lookup_algorithm(settings.name)
  changes = {
    name: settings[name] for name in settings if name != "name" and settings[name] is not None
  }
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
