"""Builds the objects of a run from a config, and reports everything that is wrong at once.

Nothing here compiles or trains, so a mistake costs seconds.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import curriculum as curricula
from grpo_jax import data, misfits, rollout, tasks, tokens
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.losses import lookup_algorithm
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.environments.base import EnvironmentRunner
from grpo_jax.environments.tools import check_chat_template
from grpo_jax.environments.workers import EnvironmentWorkers, run_in_process
from grpo_jax.episodes import EpisodeSampler
from grpo_jax.learning import deterministic
from grpo_jax.learning import optimizer as optimizers
from grpo_jax.learning.critic import Critic
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import TrainState, ValueHead, WithAdapters, only_trained
from grpo_jax.learning.updates import Learner, SkippedUpdate, Teacher, UpdateConfig
from grpo_jax.metric_names import check_condition, metric_names
from grpo_jax.models import lora
from grpo_jax.models.attention import tiled_attention
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.experts import grouping_of
from grpo_jax.models.int8 import Int8Matrix, with_int8_matrices
from grpo_jax.models.io.weights import Weights
from grpo_jax.models.kernels import KERNELS, by_layer, for_long_rows
from grpo_jax.models.load import open_weights
from grpo_jax.models.protocol import Params
from grpo_jax.models.quantized import quantized_shapes, quantized_weights
from grpo_jax.reward_model import RewardModel
from grpo_jax.rollout import Rollout, RolloutConfig
from grpo_jax.run import trackers
from grpo_jax.sampling.episode_state import slots_of
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.sampling.turns import Budget
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.loading import load_function
from grpo_jax.tasks.rewards.workers import RewardWorkers, Scorer, score_in_process
from grpo_jax.teachers import TeacherWeights, open_teacher

# Number of batch sizes the update is compiled for: quarters of the prompts of a step.
BATCH_SIZES = 4
LEARNED = "reward_model"  # the name of the learned reward


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds everything a config describes, before any step.

  Attributes:
    config: the config itself, for messages and records; `steps` follows from `epochs`, if set.
    weights: the model before training; read when asked for.
    rollout_mesh: the devices that sample; `mesh` itself unless some devices do nothing else.
    task: without the prompts that exceed the budget, and with the learned reward.
    rollout: settings of a rollout.
    updates: settings of the updates of a rollout.
    new_adapters: random key -> LoRA adapters, trained instead of the weights; None trains the
      weights.
    loaded_adapters: the adapters of `lora.source`, which take the place of new ones.
    critic: gives the advantages of an algorithm that needs values; None for all others.
    critic_weights: the critic before training, read when asked for; None for a value head on the
      policy's trunk, which is part of `weights`.
    teachers: models that the policy learns from; read when the learner is made.
    chunks: parts of a batch for the deterministic reduction; None leaves the order to the compiler.
    curriculum: weighs the training problems by their counts; None draws them in passes.
  """

  config: ConfigDict
  mesh: Mesh
  model: Decoder
  weights: Weights
  task: Task
  sampler: Sampler | EpisodeSampler
  algorithm: Algorithm
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  rollout: RolloutConfig
  updates: UpdateConfig
  new_adapters: Callable[[jax.Array], Params] | None = None
  loaded_adapters: Params | None = None
  critic: Critic | ValueHead | None = None
  critic_weights: Weights | None = None
  teachers: tuple[TeacherWeights, ...] = ()
  chunks: Chunks | None = None
  curriculum: curricula.Curriculum | None = None
  rollout_mesh: Mesh | None = None

  # --- parameters ---------------------------------------------------------------------------------

  def loaded_params(self) -> Params:
    """Reads the model's parameters from before training, straight into their layout.

    Raises:
      ConfigError: the files hold NaN or infinity.
    """
    return self._read(self.weights, self._source)

  @property
  def _source(self) -> str:
    return f"model.source {self.config.model.source!r}"

  def _read(self, weights: Weights, what: str) -> Params:
    try:
      return weights.read(meshes.param_shardings(self.mesh, weights.shapes))
    except ValueError as error:
      raise configs.ConfigError([f"{what}: {error}"]) from error

  def loaded_teachers(self) -> list[Teacher]:
    """Reads the teachers, each laid out by the sharding table, in the dtype they compute in.

    Raises:
      ConfigError: the files hold NaN or infinity.
    """
    teachers = []
    for source, weights in ((t.source, t.weights) for t in self.teachers):
      longest = self.sampler.prompt_length + self.sampler.completion_length
      model = make_model(self.config, weights.config, self.mesh, longest)
      params = self._read(weights, f"teacher.source {source!r}")
      teachers.append(Teacher(model, as_held(model, params)))
    return teachers

  @functools.cached_property
  def base_params(self) -> Params | None:
    """Parameters that are not trained: everything but adapters; None without adapters."""
    return self._read(self.base, self._source) if self.new_adapters else None

  @functools.cached_property
  def base(self) -> Weights:
    """The model as it is held; `lora.quantize` quantizes matrices as they are read."""
    scheme = self.config.lora.quantize
    return self.weights if scheme == "none" else quantized_weights(self.weights, scheme)

  def initial_state(self) -> TrainState:
    """Returns the trained parameters and a new optimizer state, laid out by the sharding table."""
    params = self._adapters() if self.new_adapters else self.loaded_params()
    reference, critic = params if self.updates.sync_every else None, None
    if self.critic_weights is not None:
      source = configs.critic_source(self.config)
      values = self._read(self.critic_weights, f"critic.source {source!r}")
      critic = TrainState.create(values, self.critic.optimizer, copy=False)
    state = TrainState.create(
      params,
      self.optimizer,
      algorithm=self.algorithm,
      reference=reference,
      critic=critic,
      copy=False,
    )
    if self.curriculum is None:
      return state
    return dataclasses.replace(state, counts=curricula.new_counts(len(self.task.splits["train"])))

  def _adapters(self) -> Params:
    key = jax.random.key(self.config.seed)
    layout = meshes.param_shardings(self.mesh, jax.eval_shape(self.new_adapters, key))
    if self.loaded_adapters is not None:
      return jax.tree.map(
        lambda value, sharding: jax.make_array_from_callback(
          value.shape, sharding, value.__getitem__
        ),
        self.loaded_adapters,
        layout,
      )
    return jax.jit(self.new_adapters, out_shardings=layout)(key)

  @property
  def with_adapters(self) -> WithAdapters:
    """The function `(base_params, trained) -> parameters of the model`."""
    return lora.with_adapters if self.new_adapters else only_trained

  def to_sampling_params(self, params: Params) -> Params:
    """Returns the trained parameters in the sampler's layout, whole over `fsdp`."""
    return self._to_sampling_params(self.base_params, params)

  def to_rollout_params(self, params: Params) -> Params:
    """Returns the same for rollouts, whose matrices `rollout.weights` may round."""
    return self._to_rollout_params(self.base_params, params)

  @functools.cached_property
  def _to_rollout_params(self) -> Callable[[Params | None, Params], Params]:
    if self.config.rollout.weights == "trained":
      return self._to_sampling_params
    return make_to_sampling_params(
      self.model, self.mesh, self.weights.shapes, self.chunks, self.rollout_mesh, int8=True
    )

  @functools.cached_property
  def _to_sampling_params(self) -> Callable[[Params | None, Params], Params]:
    if self.base is self.weights:
      return make_to_sampling_params(
        self.model, self.mesh, self.weights.shapes, self.chunks, self.rollout_mesh
      )
    return beside_quantized(self.mesh, self.rollout_mesh or self.mesh, self.base_params)

  def matmul_precision(self) -> contextlib.AbstractContextManager[object]:
    """Sets the precision of matmuls for everything that is traced inside; see the config."""
    return matmul_precision(self.config)

  # --- the parts of the loop ----------------------------------------------------------------------

  @property
  def has_rollout_devices(self) -> bool:
    """True if some devices only sample, and the others only learn."""
    return self.rollout_mesh not in (None, self.mesh)

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return self.config.steps

  def key(self, step: int) -> jax.Array:
    """Returns the random key of a step's completions."""
    return jax.random.fold_in(jax.random.key(self.config.seed), step)

  def examples(
    self, step: int, counts: Float[np.ndarray, "n 2"] | None = None
  ) -> Callable[[int], Sequence[Example]]:
    """Returns the function from the number of a draw to this host's examples of a step.

    Args:
      step: number of the step.
      counts: of each training problem before the step; needed with a curriculum. The draws of a
        step then hold distinct problems, as far as there are enough of them.
    """
    split, c = self.task.splits["train"], self.config
    shard, count = hosts.own_shard(), c.rollout.prompts_per_step
    if self.curriculum is not None:
      weighted = curricula.weighted_order(curricula.weigh(self.curriculum, counts), step)
      return lambda number: data.examples(split, number, count, c.seed, *shard, order=weighted)
    seeding = configs.AUTO["data.seeding"] if c.data.seeding == "auto" else c.data.seeding
    order = seeding if c.data.shuffle else "file"
    return lambda number: data.examples(
      split, step, count, c.seed, *shard, stream=number, order=order
    )

  def counted(
    self, state: TrainState, step: int, rollout: Rollout
  ) -> tuple[TrainState, dict[str, float]]:
    """Returns the state with the completions of a step counted, and the curriculum's metrics.

    Args:
      state: with the counts before the step; without a curriculum it is returned as it is.
      step: number of the step.
      rollout: its completions.
    """
    if self.curriculum is None:
      return state, {}
    accuracy = rollout.accuracy
    drawn_from = state.counts if rollout.drawn_from is None else rollout.drawn_from
    weights = curricula.weigh(self.curriculum, drawn_from)
    order = curricula.weighted_order(weights, step)
    problems = data.examples(range(len(weights)), 0, len(accuracy), self.config.seed, order=order)
    counts = curricula.add(state.counts, problems, accuracy, self.config.data.memory)
    return dataclasses.replace(state, counts=counts), curricula.metrics(counts, weights)

  def evaluates_at(self, step: int) -> bool:
    """Returns whether the model is evaluated before this step."""
    every = self.config.eval.every
    return step == 0 or bool(every and step % every == 0)

  def evaluation_sampling(self) -> dict[str, Any]:
    """Returns how the completions for pass@k are sampled: the arguments of `evaluate`."""
    c, own = self.config.eval, self.config.rollout.temperature
    return {
      "temperature": own if c.temperature is None else c.temperature,
      "token_filter": TokenFilter(c.top_k, c.top_p, c.min_p),
    }

  def saves_at(self, steps: int) -> bool:
    """Returns whether the state after so many steps is saved, whatever the time."""
    every = self.config.checkpoint.every
    return (every > 0 and steps % every == 0) or steps == self.steps

  def rollout_at(self, step: int) -> RolloutConfig:
    """Returns the settings of the rollout of a step: some hold tokens in their samples."""
    every = self.config.log.tokens_every
    return dataclasses.replace(self.rollout, tokens=every > 0 and step % every == 0)

  @contextlib.contextmanager
  def scorer(self) -> Iterator[Scorer]:
    """Starts the rewards: the task's in worker processes, the learned one in this process.

    At the end, the environments of episodes end too.
    """
    with self._scorer() as scorer:
      try:
        yield scorer
      finally:
        if isinstance(self.sampler, EpisodeSampler):
          self.sampler.close()

  def _scorer(self) -> contextlib.AbstractContextManager[Scorer]:
    c = self.config
    if c.rewards.workers == 0:
      return contextlib.nullcontext(score_in_process(self.task, c.rewards.on_error))
    return RewardWorkers(
      task_maker(c),
      c.rewards.workers,
      c.rewards.timeout,
      here={name: self.task.rewards[name] for name in [LEARNED] if name in self.task.rewards},
      isolate=c.rewards.isolate,
      on_error=c.rewards.on_error,
    )

  def learner(self, on_skip: Callable[[SkippedUpdate], object] | None = None) -> Learner:
    """Returns the updates of a rollout; a fixed reference and the teachers are read here."""
    reference = None
    if self.algorithm.beta > 0 and not self.updates.sync_every:
      # A model with new adapters is its own reference: itself without them.
      if self.loaded_adapters is not None:
        reference = self._adapters()
      else:
        reference = {} if self.new_adapters else self.loaded_params()
    return Learner(
      self.model,
      self.algorithm,
      self.optimizer,
      self.schedule,
      self.updates,
      with_adapters=self.with_adapters,
      base_params=self.base_params,
      reference=reference,
      teachers=self.loaded_teachers(),
      chunks=self.chunks,
      critic=self.critic,
      on_skip=on_skip,
    )


def build(config: ConfigDict) -> Run:
  """Opens and checks everything a config names.

  Raises:
    ConfigError: lists all problems.
  """
  c = config
  problems = configs.check(c, jax.device_count())

  attempt = partial(configs.attempt, problems)
  algorithm = attempt(lambda: make_algorithm(c.algorithm), "algorithm")
  attempt(lambda: rollout.check_group_size(algorithm, c.rollout.group_size))
  task = attempt(lambda: task_maker(c)(), f"task {c.task.name!r}")
  weights = attempt(lambda: open_weights(c.model.source, seed=c.seed), f"model {c.model.source!r}")
  tokenizer = weights and attempt(
    lambda: tokenizer_of(c, weights.config), f"the tokenizer of {c.model.source!r}"
  )
  if c.reward_model.source:
    learned = attempt(
      lambda: RewardModel.load(c.reward_model.source, date=c.chat.date or None),
      f"reward model {c.reward_model.source!r}",
    )
    if task and learned:
      rewards = {**task.rewards, LEARNED: (learned, c.reward_model.weight)}
      task = dataclasses.replace(task, rewards=rewards)
  attempt(lambda: trackers.check(c.log.trackers))
  weigh = attempt(lambda: curricula.lookup_curriculum(c.data.curriculum), "data.curriculum")
  c, loaded = (weights and attempt(lambda: with_lora_source(c, weights.config))) or (c, None)
  adapters = attempt(lambda: new_adapters_of(c.lora, weights)) if weights else None
  critic_weights = None
  if weights and algorithm and "values" in algorithm.rewards:
    if c.critic.trunk == "policy":
      weights = weights.with_value_head()
    else:
      critic_weights = attempt(lambda: open_critic(c, weights.config), "the critic")
  if problems and (task is None or tokenizer is None):
    raise configs.ConfigError(problems)

  if task.tools:
    attempt(lambda: check_chat_template(tokenizer, task.tools))
    tokenizer = tokenizer.with_tools(task.tools)
  if task.environment is not None:
    attempt(lambda: misfits.check_observations(task, tokenizer))
  task, prompt_length = attempt(
    lambda: _fit_task(c, task, tokenizer), "the prompts of the task"
  ) or (task, 1)
  problems += misfits.run_misfits(c, weights.config, task, algorithm, prompt_length)
  problems += misfits.critic_misfits(c, critic_weights, algorithm, prompt_length)
  teachers = [
    attempt(
      lambda source=source: open_teacher(
        source,
        tokenizer,
        weights.config.vocab_size,
        prompt_length + c.rollout.completion_length,
        [example.prompt for example in task.splits["train"][:8] if isinstance(example.prompt, str)],
        seed=c.seed + 1,  # a random teacher is not the policy
      ),
      f"teacher.source {source!r}",
    )
    for source in configs.teacher_sources(c)
  ]
  demonstrations = attempt(lambda: demonstrations_of(c, tokenizer, prompt_length))
  if demonstrations:
    problems += misfits.demonstration_misfits(c, demonstrations, weights.config, task, algorithm)
  if algorithm and all(teachers):
    problems += misfits.vocabulary_misfits(algorithm, weights.config, teachers)
  if c.reward_model.source and learned and (prompts := task.splits["train"] or task.splits["eval"]):
    attempt(lambda: learned.tokenizer.encode_exchange(prompts[0].prompt, ""))
  if c.stop.when and algorithm:
    routes = misfits.replays_routes(c, weights.config)
    experts = bool(weights.config.experts)
    names = metric_names(c, task, algorithm, experts=experts, routes=routes)
    attempt(lambda: check_condition(c.stop.when, names))
  if c.epochs:
    size = len(task.splits["train"])
    c = configs.with_steps(c, data.steps_of(c.epochs, size, c.rollout.prompts_per_step))
  if problems:
    raise configs.ConfigError(problems)

  mesh, rollout_mesh = make_meshes(c)
  attempt(lambda: hosts.check_mesh(mesh))
  attempt(lambda: hosts.check_mesh(rollout_mesh))
  deterministic_reduction = c.train.reduction == "deterministic"
  chunks = Chunks(c.train.chunks, mesh) if deterministic_reduction else None
  longest = prompt_length + c.rollout.completion_length
  model = attempt(lambda: make_model(c, weights.config, mesh, longest))
  sampler = model and attempt(
    lambda: with_episodes(
      c,
      task,
      Sampler(
        model=make_sampler_model(c, model, mesh, rollout_mesh, longest),
        tokenizer=tokenizer,
        prompt_length=prompt_length,
        completion_length=c.rollout.completion_length,
        temperature=c.rollout.temperature,
        stop=tuple(dict.fromkeys((*task.stop, *c.rollout.stop))),
        stop_ids=tuple(c.rollout.stop_ids),
        prompt_sharding=meshes.batch_sharding(rollout_mesh),
        chunks=Chunks(c.train.chunks, rollout_mesh) if deterministic_reduction else None,
        cache_rows=cache_rows(
          c, model, rollout_mesh, prompt_length, episodes=task.environment is not None
        ),
      ),
    )
  )
  if problems:
    raise configs.ConfigError(problems)
  schedule, optimizer = optimizer_of(c, c.optimizer.learning_rate)
  return Run(
    config=c,
    mesh=mesh,
    model=model,
    weights=weights,
    task=task,
    sampler=sampler,
    algorithm=algorithm,
    schedule=schedule,
    optimizer=optimizer,
    rollout=rollout_config(c, task, algorithm, mesh, demonstrations, weights.config),
    updates=update_config(c),
    new_adapters=adapters,
    loaded_adapters=loaded,
    critic=critic_of(c, algorithm, critic_weights and critic_weights.config, mesh, longest),
    critic_weights=critic_weights,
    teachers=tuple(teachers),
    chunks=chunks,
    curriculum=weigh,
    rollout_mesh=rollout_mesh,
  )


def make_meshes(c: ConfigDict, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
  """Returns the mesh of the devices that learn and that of those that sample, often the same.

  Args:
    devices: default: all devices of all hosts.

  Raises:
    ConfigError: the devices that only sample cannot be shared out between the hosts, or the devices
      are of other slices than the config says.
  """
  slices = c.mesh.slices
  try:
    learners, samplers = meshes.split_devices(c.mesh.rollout_devices, devices)
    count = len(learners) + len(samplers)
    mesh = meshes.make_mesh(configs.mesh_shape(c.mesh, count), learners, slices)
    if not samplers:
      return mesh, mesh
    return mesh, meshes.make_mesh(configs.rollout_mesh_shape(c.mesh), samplers, slices)
  except ValueError as error:
    raise configs.ConfigError([str(error)]) from error


def cache_slots(c: ConfigDict, *, episodes: bool) -> int:
  """Returns the tokens that the sampler's cache has room for, of a completion or an episode."""
  length = c.rollout.completion_length
  return slots_of(length) if episodes else max(length - 1, 1)


def cache_rows(
  c: ConfigDict, model: Decoder, mesh: Mesh, prompt_length: int, *, episodes: bool = False
) -> int:
  """Returns the completions whose keys and values `rollout.cache_gib` of a device holds; 0: all.

  A completion takes room for `rollout.completion_length` tokens, and a copy of its prompt.

  Args:
    episodes: whether completions are episodes of several turns.

  Raises:
    ValueError: the budget holds less than the completions of one prompt.
  """
  if not c.rollout.cache_gib:
    return 0
  layers = () if mesh.devices.flat[0].platform == "cpu" else {}
  length, shape = cache_slots(c, episodes=episodes), model.config
  own = jax.eval_shape(lambda: model.empty_cache({"layers": layers}, 1, 1, length))
  token = 2 * shape.layers * shape.kv_heads * shape.head_dim * jnp.dtype(model.dtype).itemsize
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own))
  size += token * prompt_length
  split = meshes.cache_shards(mesh, shape.kv_heads)
  rows, group = int(c.rollout.cache_gib * 2**30 * split // size), c.rollout.group_size
  if rows < group:
    least = 1.005 * size * group / split / 2**30  # it is shown with three digits
    raise ValueError(
      f"rollout.cache_gib is {c.rollout.cache_gib:g}, which holds {rows} of the {group} "
      f"completions of a prompt: it must be at least {least:.3g}, or lower "
      f"rollout.completion_length ({c.rollout.completion_length})"
    )
  return rows


def task_maker(c: ConfigDict) -> Callable[[], Task]:
  """Returns the function that builds the task of a config, also in a worker process."""
  return partial(tasks.make_task, c.task.name, **c.task.settings.to_dict())


def with_episodes(c: ConfigDict, task: Task, sampler: Sampler) -> Sampler | EpisodeSampler:
  """Returns the sampler of a task: of episodes where the task has an environment."""
  if task.environment is None:
    return sampler
  length = c.rollout.completion_length
  budget = Budget(
    turns=c.episode.turns,
    turn_length=c.episode.turn_length or length,
    observation_length=c.episode.observation_length or length,
  )

  def make_runner() -> EnvironmentRunner:
    if c.rewards.workers == 0:
      return run_in_process(task)
    return EnvironmentWorkers(
      task_maker(c), c.rewards.workers, c.rewards.timeout, isolate=c.rewards.isolate
    )

  return EpisodeSampler(sampler, budget, make_runner, c.episode.in_step)


def matmul_precision(c: ConfigDict) -> contextlib.AbstractContextManager[object]:
  """Returns a context in which programs are traced with the precision that a config asks for.

  By default, a float32 matmul is a single bfloat16 pass on a TPU and TF32 on a GPU.
  """
  choice = c.model.matmul_precision
  if choice == "auto":
    choice = "highest" if c.model.dtype == "float32" else "default"
  return jax.default_matmul_precision(choice)


def make_model(
  c: ConfigDict, shape: ModelConfig, mesh: Mesh, length: int = 0, *, sampling: bool = False
) -> Decoder:
  """Returns the functions of a model of this shape with the config's options.

  Args:
    length: longest prompt with its completion, in tokens, by which some models scale their angles.
    sampling: lays values out as the sampler's weights are.
  """
  # With the deterministic reduction each device computes alone: there is nothing to place.
  fast = c.train.reduction == "fast"
  batch = meshes.batch_sharding(mesh)
  return Decoder(
    shape,
    dtype={"float32": jnp.float32, "bfloat16": jnp.bfloat16}[c.model.dtype],
    remat=c.model.remat,
    lora_scale=lora.scale(c.lora.rank, c.lora.alpha) if c.lora.rank else 1.0,
    **({"place": meshes.placer(mesh, sampling=sampling)} if fast else {}),
    prompt_shards=meshes.prompt_shards(batch) if fast else 1,
    token_shards=1 if sampling else meshes.token_shards(mesh),
    vocab_shards=meshes.vocab_shards(mesh, shape.vocab_size, sampling=sampling),
    attention=attention_of(c, shape, mesh, sampling=sampling),
    form=grouping_of(mesh.devices.flat[0].platform),
    record_routes=misfits.replays_routes(c, shape),
    length=length if shape.rope_scaling and shape.rope_scaling.kind == "longrope" else 0,
  )


def make_sampler_model(
  c: ConfigDict, model: Decoder, mesh: Mesh, rollout_mesh: Mesh, length: int = 0
) -> Decoder:
  """Returns the model that samples: the one that learns, if it lies on the same devices alike.

  Args:
    model: the one that learns, on `mesh`.
    rollout_mesh, length: as in `Run` and `make_model`.
  """
  if rollout_mesh is mesh and meshes.token_shards(mesh) == 1:
    return model
  return make_model(c, model.config, rollout_mesh, length, sampling=True)


def open_critic(c: ConfigDict, policy: ModelConfig) -> Weights:
  """Opens the model of the critic, with a value head; nothing is read.

  Raises:
    ValueError: it reads other tokens than the policy, or has several labels.
    FileNotFoundError: there is no such model.
  """
  source = configs.critic_source(c)
  weights = open_weights(source, seed=c.seed).with_score()
  if weights.config.vocab_size != policy.vocab_size:
    raise ValueError(
      f"critic.source {source!r} has {weights.config.vocab_size} tokens, and model.source "
      f"{c.model.source!r} has {policy.vocab_size}: the critic reads the tokens of the policy; "
      "choose a model with the same tokenizer, or leave critic.source empty for a copy of the "
      "policy"
    )
  return weights


def critic_of(
  c: ConfigDict, algorithm: Algorithm, shape: ModelConfig | None, mesh: Mesh, length: int = 0
) -> Critic | ValueHead | None:
  """Returns the critic of a config, None if its algorithm needs none.

  Args:
    shape: of the critic's own model, if it has one.
    length: longest prompt with its completion, in tokens.
  """
  if "values" not in algorithm.rewards:
    return None
  if c.critic.trunk == "policy":
    return ValueHead(weight=c.critic.weight, clip=c.critic.clip)
  schedule, optimizer = optimizer_of(c, c.critic.learning_rate)
  return Critic(
    model=dataclasses.replace(make_model(c, shape, mesh, length), lora_scale=1.0),
    optimizer=optimizer,
    schedule=schedule,
    clip=c.critic.clip,
    warmup_steps=c.critic.warmup_steps,
  )


def attention_of(
  c: ConfigDict, shape: ModelConfig, mesh: Mesh, *, sampling: bool = False
) -> Callable[..., jax.Array]:
  """Returns `Decoder.attention` for these devices.

  `auto` takes a kernel only where it is possible, and only for rows that are long enough. Kernels
  compute whole rows: where `context` splits them, attention is tiled.

  Raises:
    ValueError: the config names a kernel that the devices or the model do not support.
  """
  platform, choice = mesh.devices.flat[0].platform, c.model.attention
  over_mesh = partial(meshes.over_mesh, mesh, sampling=sampling)
  if meshes.token_shards(mesh) > 1 and not sampling:
    if shape.sinks:
      raise ValueError(
        f"mesh.context is {meshes.token_shards(mesh)}, and {c.model.source} has attention sinks, "
        "which are not computed for parts of rows: set mesh.context to 1"
      )
    return meshes.over_context(mesh, tiled_attention)
  if choice == "auto":
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if kernel is None or c.train.reduction == "deterministic" or _lacks(kernel, c, shape, platform):
      return tiled_attention
    return for_long_rows(by_layer(over_mesh(KERNELS[kernel])))
  if choice == "tiled":
    return tiled_attention
  if reason := _lacks(choice, c, shape, platform):
    raise ValueError(f"model.attention is {choice!r}, {reason}; set it to 'auto' or 'tiled'")
  return by_layer(over_mesh(KERNELS[choice]))


def _lacks(kernel: str, c: ConfigDict, shape: ModelConfig, platform: str) -> str:
  """Returns the reason why a kernel is impossible, "" if it is possible."""
  if (needed := {"splash": "tpu", "cudnn": "gpu"}[kernel]) != platform:
    return f"which runs on a {needed}, and the devices are of platform {platform!r}"
  if shape.sinks:
    return f"which has no attention sinks, and {c.model.source} has them"
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


def make_to_sampling_params(
  model: Decoder,
  mesh: Mesh,
  shapes: Params,
  chunks: Chunks | None = None,
  rollout_mesh: Mesh | None = None,
  *,
  int8: bool = False,
) -> Callable[[Params | None, Params], Params]:
  """Returns the jitted `to_sampling_params`, `(base_params, params) -> params`.

  Args:
    model, mesh, chunks: as in `Run`.
    shapes: shapes of all parameters of the model.
    rollout_mesh: where the result lies, if not on `mesh`: it is copied there, after the program.
    int8: as in `to_sampling_params`.
  """
  convert = partial(to_sampling_params, model, mesh, int8=int8)
  converted = jax.eval_shape(partial(convert, None), shapes)
  layout = meshes.param_shardings(mesh, converted, sampling=True)
  if chunks:
    convert = deterministic.replicated(convert, mesh)
  convert = jax.jit(convert, out_shardings=layout)
  if rollout_mesh in (None, mesh):
    return convert
  there = meshes.param_shardings(rollout_mesh, converted, sampling=True)
  return lambda base_params, params: meshes.moved(convert(base_params, params), there)


def to_sampling_params(
  model: Decoder, mesh: Mesh, base_params: Params | None, params: Params, *, int8: bool = False
) -> Params:
  """Returns the trained parameters in the sampler's form: adapters merged, fastest to decode.

  On CPUs the layers are unstacked. Elsewhere they stay stacked, in the dtype of the activations, to
  which the model casts them anyway; norms stay in float32, as the model reads them.

  Args:
    int8: rounds the matrices of the layers, see `models.int8`.
  """
  params = params if base_params is None else lora.merge(base_params, params, model.lora_scale)
  params = with_int8_matrices(params) if int8 else params
  if mesh.devices.flat[0].platform == "cpu":
    return unstack(params)

  return as_held(model, params)


def beside_quantized(
  mesh: Mesh, rollout_mesh: Mesh, base: Params
) -> Callable[[Params, Params], Params]:
  """Returns `to_sampling_params` for a quantized base: the base as it is, and adapters beside it.

  Merged, the matrices would be wide. Arrays that lie as the sampler needs them are not copied. To
  devices that only sample, the base moves once, since it never changes.

  Args:
    mesh, rollout_mesh: as in `Run`.
    base: the quantized base, on `mesh`.
  """

  def placed(tree: Params) -> Params:
    tree = jax.device_put(tree, meshes.param_shardings(mesh, tree, sampling=True))
    if rollout_mesh == mesh:
      return tree
    return meshes.moved(tree, meshes.param_shardings(rollout_mesh, tree, sampling=True))

  if rollout_mesh == mesh:
    return lambda _, adapters: placed(lora.with_adapters(base, adapters))
  there = placed(base)
  return lambda _, adapters: lora.with_adapters(there, placed(adapters))


def as_held(model: Decoder, params: Params) -> Params:
  """Returns parameters, or their shapes, that are never trained in the dtype they are used in."""
  convert = partial(
    jax.tree_util.tree_map_with_path,
    partial(_in_dtype_of, model),
    is_leaf=lambda leaf: isinstance(leaf, Int8Matrix),
  )
  leaf = jax.tree.leaves(params)[0]
  return convert(params) if isinstance(leaf, jax.Array) else jax.eval_shape(convert, params)


def _in_dtype_of(model: Decoder, path: tuple, leaf: jax.Array | Int8Matrix) -> Any:
  """Returns a parameter in the dtype of the activations, to which the model casts it anyway."""
  stays = isinstance(leaf, Int8Matrix) or "norm" in jax.tree_util.keystr(path)
  return leaf if stays else leaf.astype(model.dtype)


def tokenizer_of(c: ConfigDict, model: ModelConfig) -> tokens.AnyTokenizer:
  """Returns the tokenizer of `model.source` with the chat settings of a config.

  Raises:
    ValueError: it cannot be read, or its chat template does not read one of the arguments.
  """
  arguments = c.chat.arguments.to_dict()
  tokenizer = tokens.load_tokenizer(c.model.source, date=c.chat.date or None, arguments=arguments)
  if arguments:
    names = tokenizer.chat_variables() - tokens.CHAT_VARIABLES
    if unknown := sorted(set(arguments) - names):
      raise ValueError(
        f"chat.arguments holds {', '.join(unknown)}, which the chat template of {c.model.source} "
        f"does not read; it reads: {', '.join(sorted(names)) or 'none'}"
      )
  return tokens.fit_to_model(tokenizer, model.vocab_size)


def with_lora_source(c: ConfigDict, model: ModelConfig) -> tuple[ConfigDict, Params | None]:
  """Returns the config with the rank, alpha and matrices of `lora.source`, and its adapters.

  Raises:
    ValueError, FileNotFoundError: the folder does not hold adapters of this model.
  """
  if not c.lora.source:
    return c, None
  adapters, rank, alpha = lora.load_peft(c.lora.source, model)
  c = c.copy_and_resolve_references()
  c.lora.rank, c.lora.alpha, c.lora.targets = rank, alpha, "|".join(lora.matrices(adapters))
  return c, adapters


def new_adapters_of(settings: ConfigDict, weights: Weights) -> Callable[[jax.Array], Params] | None:
  """Returns `lora.init` for this model, None without adapters; ValueError for a misfit."""
  if settings.rank == 0:
    if settings.quantize != "none":
      raise ValueError(
        f"lora.quantize is {settings.quantize!r}, but lora.rank is 0: quantized matrices are not "
        "trained; set lora.rank, or lora.quantize to 'none'"
      )
    return None
  if settings.quantize != "none":
    try:
      quantized_shapes(weights.shapes, settings.quantize, weights.stored)
    except ValueError as error:
      raise ValueError(f"lora.quantize is {settings.quantize!r}: {error}") from error
  make = partial(lora.init, shapes=weights.shapes, pattern=settings.targets, rank=settings.rank)
  jax.eval_shape(make, jax.random.key(0))
  return make


def schedule_steps(c: ConfigDict) -> int:
  """Returns the steps after which the learning-rate schedule is at its end."""
  return c.optimizer.schedule_steps or c.steps


def optimizer_of(
  c: ConfigDict, learning_rate: float
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns the schedule with this peak, and the optimizer."""
  o = c.optimizer
  schedule = optimizers.learning_rate_schedule(
    learning_rate=learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup_steps,
    steps=schedule_steps(c) * c.train.epochs * c.train.mini_batches,
    final_fraction=o.final_fraction,
  )
  optimizer = optimizers.make_optimizer(
    schedule,
    name=o.name,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
  )
  if c.train.freeze_router:
    optimizer = optimizers.frozen(optimizer, "layers/router")
  return schedule, optimizer


def update_config(c: ConfigDict) -> UpdateConfig:
  """Returns the settings of the updates of a rollout."""
  return UpdateConfig(
    temperature=c.rollout.temperature,
    epochs=c.train.epochs,
    mini_batches=c.train.mini_batches,
    micro_batches=c.train.micro_batches,
    micro_batch_tokens=c.train.micro_batch_tokens,
    sort_by_length=c.train.sort_by_length,
    spike=c.train.spike,
    max_skipped=c.train.max_skipped,
    sync_every=c.reference.sync_every,
    sync_share=c.reference.sync_share,
    own_teacher=configs.own_teacher(c),
    balance=c.train.balance,
    seed=c.seed,
  )


def demonstrations_of(
  c: ConfigDict, tokenizer: tokens.AnyTokenizer, prompt_length: int
) -> Demonstrations | None:
  """Returns how a policy is shown solutions as its own teacher; None if it is not."""
  if not configs.own_teacher(c):
    return None
  t, longest = c.teacher, prompt_length + c.rollout.completion_length
  added = len(tokenizer.encode_plain(t.template))
  return Demonstrations(t.template, t.prompt_length or longest + added, t.shows, t.solved_from)


def rollout_config(
  c: ConfigDict,
  task: Task,
  algorithm: Algorithm,
  mesh: Mesh,
  demonstrations: Demonstrations | None = None,
  model: ModelConfig | None = None,
) -> RolloutConfig:
  """Returns the settings of a rollout.

  Args:
    model: shape of the policy; None takes one without experts.
  """
  parts = c.train.mini_batches * c.train.micro_batches
  deterministic_reduction = c.train.reduction == "deterministic"
  shards = meshes.prompt_shards(meshes.batch_sharding(mesh))
  units = c.train.chunks if deterministic_reduction else shards
  smallest = units * parts
  of_environment = () if task.environment is None else (1.0,)
  return RolloutConfig(
    group_size=c.rollout.group_size,
    algorithm=algorithm,
    reward_weights=tuple(weight for _, weight in task.rewards.values()) + of_environment,
    step_rewards=task.step_rewards if "steps" in algorithm.rewards else None,
    max_resamples=c.rollout.max_resamples,
    given=c.rollout.given,
    mask_truncated=c.rollout.mask_truncated,
    demonstrations=demonstrations,
    batch_sharding=meshes.batch_sharding(mesh),
    replay_routes=model is not None and misfits.replays_routes(c, model),
    pad_prompts_to_multiple=smallest * -(-c.rollout.prompts_per_step // (BATCH_SIZES * smallest)),
  )


def make_algorithm(settings: ConfigDict) -> Algorithm:
  """Returns the row that a config names, with the fields that are not None in place of its own."""
  row = lookup_algorithm(settings.name)
  changes = {
    name: settings[name] for name in settings if name != "name" and settings[name] is not None
  }
  for name in configs.CHOICES:
    if isinstance(changes.get(name), str) and ".py:" in changes[name]:
      changes[name] = load_function(changes[name])
  if changes.get("kl", row.kl) == "none" and "beta" not in changes:
    changes["beta"] = 0.0
  return dataclasses.replace(row, **changes)


def _fit_task(c: ConfigDict, task: Task, tokenizer: tokens.AnyTokenizer) -> tuple[Task, int]:
  """Returns the task with prompts within the budget, and the padded prompt length in tokens."""
  limit = c.rollout.prompt_length
  splits = {name: rollout.with_system(s, c.chat.system) for name, s in task.splits.items()}
  if limit == 0:
    longest = max(1, *(rollout.longest_prompt(tokenizer, split) for split in splits.values()))
    return dataclasses.replace(task, splits=splits), longest
  splits = {
    name: rollout.fit_prompts(tokenizer, split, limit, c.rollout.overlong)
    for name, split in splits.items()
  }
  return dataclasses.replace(task, splits=splits), limit
