"""Runs the optimizer updates of one rollout and reports the ones that are skipped."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.losses import lookup_algorithm
from grpo_jax.distributed.mesh import layout_of
from grpo_jax.learning import batch as batches
from grpo_jax.learning import deterministic, reduction
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.critic import Critic, assess, make_critic_step, make_values, named
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import (
  TrainState,
  ValueHead,
  WithAdapters,
  fill_of,
  make_loss,
  make_score,
  make_train_step,
  move_reference,
  only_trained,
)
from grpo_jax.models.protocol import Model, Params


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """Settings of the updates of one rollout.

  Attributes:
    temperature: the sampling temperature; None takes `Batch.temperature`. If both are known and
      differ, the first update raises a ValueError.
    epochs: number of passes over the rollout.
    mini_batches: number of updates per epoch.
    micro_batches: number of gradient accumulation steps per update, at least.
    micro_batch_tokens: tokens per device in one accumulation step; more micro-batches are used
      where they are needed. 0 is no limit.
    sort_by_length: puts completions of similar lengths together; see `reduction.make_gradient`.
    spike: also skip an update whose gradient norm exceeds `spike` times its running mean; 0
      disables.
    max_skipped: number of updates skipped in a row after which `Learner.trouble` is set.
    sync_every: move the reference every this many rollouts; 0 keeps it fixed.
    sync_share: share of the parameters in the moved reference; see `move_reference`.
    own_teacher: "policy" or "reference", whose log-probs after `Batch.teacher_prompts` are those of
      the teacher: the parameters before the updates, or `TrainState.reference`, which may follow
      them slowly. Empty: neither.
    balance: coefficient of the load-balance loss of a mixture of experts; 0 is none.
    seed: seed of the order of prompts in mini-batches.
  """

  temperature: float | None = None
  epochs: int = 1
  mini_batches: int = 1
  micro_batches: int = 1
  micro_batch_tokens: int = 0
  sort_by_length: bool = False
  spike: float = 0.0
  max_skipped: int = 5
  sync_every: int = 0
  sync_share: float = 1.0
  own_teacher: str = ""
  balance: float = 0.0
  seed: int = 0


def make_update(
  model: Model,
  algorithm: Algorithm | str,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None,
  config: UpdateConfig,
  *,
  with_adapters: WithAdapters = only_trained,
  teachers: Sequence[Model] = (),
  value_head: ValueHead | None = None,
  chunks: Chunks | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update `(state, batch, base_params=None) -> (state, metrics)`.

  It is `make_train_step` with as many micro-batches as the batch needs.
  """

  def make(micro_batches: int) -> Callable:
    return make_train_step(
      model,
      algorithm,
      optimizer,
      schedule,
      temperature=config.temperature,
      micro_batches=micro_batches,
      sort_by_length=config.sort_by_length,
      spike=config.spike,
      with_adapters=with_adapters,
      teachers=teachers,
      value_head=value_head,
      balance=config.balance,
      chunks=chunks,
    )

  return make(1) if chunks else _within_budget(model, config, make)


def make_gradients(
  model: Model,
  algorithm: Algorithm | str,
  config: UpdateConfig,
  *,
  with_adapters: WithAdapters = only_trained,
  teachers: Sequence[Model] = (),
  value_head: ValueHead | None = None,
  chunks: Chunks | None = None,
) -> Callable[..., tuple]:
  """Returns the jitted gradient of an update, `(params, batch, base_params) -> (gradient, ...)`."""
  options = {"with_adapters": with_adapters, "teachers": teachers, "value_head": value_head}
  options |= {"temperature": config.temperature, "balance": config.balance}
  loss, fill = make_loss(model, algorithm, **options), fill_of(model, config.balance)
  if chunks:
    gradient = deterministic.make_gradient(loss, chunks)
  else:
    make = partial(reduction.make_gradient, loss, sort_by_length=config.sort_by_length)
    gradient = _within_budget(model, config, lambda count: jax.jit(make(count)))
  return lambda params, batch, *rest: gradient(params, fill(batch), *rest)


def make_scoring(
  model: Model,
  config: UpdateConfig,
  *,
  with_adapters: WithAdapters = only_trained,
  chunks: Chunks | None = None,
) -> Callable[..., jax.Array]:
  """Returns the jitted log-probs of a rollout, `(params, batch, base_params=None) -> logp`.

  It computes as many prompts at a time as an update does, so it needs no more memory.
  """

  def make(micro_batches: int) -> Callable:
    return make_score(
      model,
      temperature=config.temperature,
      micro_batches=micro_batches,
      sort_by_length=config.sort_by_length,
      with_adapters=with_adapters,
      chunks=chunks,
    )

  return make(1) if chunks else _within_budget(model, config, make, config.mini_batches)


def make_critic_update(
  critic: Critic, config: UpdateConfig, *, chunks: Chunks | None = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update of a critic, with as many micro-batches as the batch needs."""

  def make(micro_batches: int) -> Callable:
    return make_critic_step(
      critic,
      micro_batches=micro_batches,
      sort_by_length=config.sort_by_length,
      spike=config.spike,
      chunks=chunks,
    )

  return make(1) if chunks else _within_budget(critic.model, config, make)


def make_valuation(
  model: Model, config: UpdateConfig, *, chunks: Chunks | None = None
) -> Callable[..., jax.Array]:
  """Returns the jitted values of a rollout, which take no more memory than an update."""

  def make(micro_batches: int) -> Callable:
    options = {"micro_batches": micro_batches, "sort_by_length": config.sort_by_length}
    return make_values(model, **options, chunks=chunks)

  return make(1) if chunks else _within_budget(model, config, make, config.mini_batches)


def _within_budget(
  model: Model, config: UpdateConfig, make: Callable[[int], Callable], times: int = 1
) -> reduction.WithinBudget:
  return reduction.WithinBudget(
    make,
    budget=config.micro_batch_tokens,
    prompt_shards=getattr(model, "prompt_shards", 1),
    token_shards=getattr(model, "token_shards", 1),
    least=config.micro_batches * times,
  )


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A model that the policy learns from; it never changes.

  Attributes:
    model: its functions. It has the tokenizer of the policy, and may have any size.
    params: its parameters.
  """

  model: Model
  params: Params


def in_the_loss(
  algorithm: Algorithm | str, base_params: Params, teachers: Sequence[Teacher]
) -> tuple[list[Model], Params]:
  """Returns the teachers whose distributions enter the loss, and the frozen parameters it takes.

  They are the `teachers` of `make_train_step`, and its third argument. Teachers of a row without a
  `teacher_divergence` only score the rollout.
  """
  if lookup_algorithm(algorithm).teacher_divergence is None:
    return [], base_params
  return [t.model for t in teachers], (base_params, [t.params for t in teachers])


class SkippedError(RuntimeError):
  """Reports that too many updates in a row were skipped."""


@dataclasses.dataclass(frozen=True)
class SkippedUpdate:
  """An update that was skipped, with everything it depends on.

  Attributes:
    step: number of the rollout.
    update: number of the update within the rollout.
    in_a_row: number of updates skipped in a row, this one included.
    state: the state that the update met and left unchanged, except for its history.
    batch: the mini-batch.
    metrics: metrics of the update.
  """

  step: int
  update: int
  in_a_row: int
  state: TrainState
  batch: Batch
  metrics: dict[str, float]


class Learner:
  """Runs the updates of one rollout: `(state, batch, step) -> (state, metrics)`.

  The log-probs under the reference, the teachers and the old parameters are computed before the
  first update, and only if the algorithm has a KL term or a teacher, or if there are several
  updates per rollout whose ratios do not compare with the sampler. They are scored as the policy
  is, at its temperature: what the sampler recorded has other rounding errors, which a log-ratio
  would take for a difference of policies. With one update per rollout, that update's own forward
  pass gives the policy's.
  After each update one number is read from the device: how many updates in a row were skipped.

  Args:
    model, algorithm, optimizer, schedule, with_adapters, chunks: as in `make_train_step`.
    config: settings of the updates.
    base_params: parameters that are not trained, for `with_adapters`.
    reference: parameters of a fixed reference, combined with `base_params` as the trained ones
      are. None uses `TrainState.reference`.
    critic: gives the advantages of an algorithm whose advantage takes values. A `Critic` learns
      beside the policy and needs `TrainState.critic`. A `ValueHead` learns in the policy's loss and
      needs `score` among the policy's parameters.
    teachers: models that a row with a `teacher_weight` learns from. Their log-probs of the rollout
      are averaged, or with a `teacher_divergence` their divergences, computed in each update.
    on_skip: called with each update that is skipped.

  Attributes:
    trouble: the reason why training should not continue; None until `config.max_skipped` updates
      in a row are skipped.

  Raises:
    ValueError: the algorithm has a teacher and there is none.
  """

  def __init__(
    self,
    model: Model,
    algorithm: Algorithm | str,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    config: UpdateConfig,
    *,
    with_adapters: WithAdapters = only_trained,
    base_params: Params = None,
    reference: Params = None,
    teachers: Sequence[Teacher] = (),
    chunks: Chunks | None = None,
    critic: Critic | ValueHead | None = None,
    on_skip: Callable[[SkippedUpdate], object] | None = None,
  ) -> None:
    options: dict[str, Any] = {"with_adapters": with_adapters, "chunks": chunks}
    self._config, self._base_params, self._on_skip = config, base_params, on_skip
    models, self._frozen = in_the_loss(algorithm, base_params, teachers)
    value_head = critic if isinstance(critic, ValueHead) else None
    self._update = make_update(
      model,
      algorithm,
      optimizer,
      schedule,
      config,
      teachers=models,
      value_head=value_head,
      **options,
    )
    self._score = make_scoring(model, config, **options)
    self._algorithm, self._reference, self._chunks = lookup_algorithm(algorithm), reference, chunks
    several = config.epochs * config.mini_batches > 1 and self._algorithm.needs_old
    self._needs_old = several or self._algorithm.penalizes == "token_rewards"
    self._critic, self._values = (critic if value_head is None else None), None
    if self._critic is not None:
      self._update_critic = make_critic_update(critic, config, chunks=chunks)
    if critic is not None:
      trunk = model if value_head else critic.model
      self._values = make_valuation(trunk, config, chunks=chunks)
    elif "values" in self._algorithm.rewards:
      raise ValueError(
        f"advantage {self._algorithm.advantage!r} is computed from values: give Learner a critic"
      )
    if self._algorithm.teacher_weight > 0 and not teachers and not config.own_teacher:
      raise ValueError("the algorithm has a teacher_weight: give Learner its teachers")
    # Nothing is scored for teachers in the loss, or without a weight.
    scored = [] if models or self._algorithm.teacher_weight == 0 else teachers
    self._teachers = [(make_scoring(t.model, config, chunks=chunks), t.params) for t in scored]
    self.trouble: str | None = None

  def __call__(
    self, state: TrainState, batch: Batch, step: int
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after the updates of rollout number `step`, and their mean metrics.

    Raises:
      ValueError: the state has no history, or the algorithm has a KL term and there is no
        reference.
    """
    config = self._config
    critic, counts = state.critic, state.counts
    state = dataclasses.replace(state, critic=None, counts=None)
    batch = self._scored(state, batch)
    batch, about_critic = self._assessed(state, critic, batch)
    seed = (config.seed, step)
    learns = self._critic is None or step >= self._critic.warmup_steps
    metrics, of_critic, in_a_row = [], [], 0
    for number, part in enumerate(
      batches.mini_batches(batch, config.mini_batches, config.epochs, seed)
    ):
      if self._critic is not None:
        critic, numbers = self._update_critic(critic, part)
        of_critic.append(numbers)
      if not learns:
        continue
      state, numbers = self._update(state, part, self._frozen)
      metrics.append(numbers)
      in_a_row = int(jax.device_get(state.history.skipped))
      if in_a_row and self._on_skip:
        values = {name: float(value) for name, value in jax.device_get(numbers).items()}
        self._on_skip(SkippedUpdate(step, number, in_a_row, state, part, values))
    if config.sync_every and (step + 1) % config.sync_every == 0:
      state = move_reference(state, config.sync_share)
    if critic is not None:
      in_a_row = max(in_a_row, int(jax.device_get(critic.history.skipped)))
      about_critic |= named(reduction.average(of_critic))
    if in_a_row >= config.max_skipped:
      self.trouble = (
        f"{in_a_row} updates in a row were skipped (max_skipped is {config.max_skipped}). The "
        "parameters are those of the last accepted update"
      )
    found = reduction.average(metrics) if metrics else {}
    return dataclasses.replace(state, critic=critic, counts=counts), found | about_critic

  def held(self, state: TrainState) -> dict[str, Params]:
    """Returns the arrays that stay on the devices between rollouts, by what they are."""
    return {
      "parameters": state.params,
      "optimizer": state.opt_state,
      "critic": state.critic and (state.critic.params, state.critic.opt_state),
      "reference": (state.reference, self._reference),
      "frozen": self._base_params,
      "teachers": [params for _, params in self._teachers] + [self._frozen],
    }

  def ratios(self, state: TrainState, batch: Batch) -> Float[np.ndarray, "P G T"]:
    """Returns how much more probable each token is under the state than when it was sampled.

    It costs a forward pass, and without a KL term or several updates a program of its own.

    Args:
      state: after the updates.
      batch: of the rollout.
    """
    logp = self._score(state.params, batch, self._base_params)
    ratios = jnp.exp(logp - batch.sampler_logp)
    return np.asarray(batches.everywhere(ratios, layout_of(batch.mask)))

  def _assessed(
    self, policy: TrainState, critic: TrainState | None, batch: Batch
  ) -> tuple[Batch, dict[str, Any]]:
    """Returns the batch with advantages from rewards of tokens, and metrics of the critic."""
    if not self._algorithm.of_token_rewards:
      return batch, {}
    mesh = None if self._chunks is None else self._chunks.mesh
    if self._values is None:
      return assess(batch, self._algorithm, mesh, layout_of(batch.mask))
    if self._critic is None:
      critic = policy
      if "score" not in policy.params:
        raise ValueError("Learner has a ValueHead, and the policy's parameters have no 'score'")
    if critic is None:
      raise ValueError("Learner has a critic, and the state has none: TrainState.create(critic=)")
    batch = dataclasses.replace(batch, values=self._values(critic.params, batch))
    return assess(batch, self._algorithm, mesh, layout_of(batch.mask))

  def _scored(self, state: TrainState, batch: Batch) -> Batch:
    """Returns the batch with the log-probs that the updates need."""
    if state.history is None:
      raise ValueError("the state has no history, which counts skipped updates: TrainState.history")
    if self._algorithm.beta > 0:
      reference = state.reference if self._reference is None else self._reference
      if reference is None:
        raise ValueError("the algorithm has a KL term: give Learner or TrainState a reference")
      logp = self._score(reference, without_routes(batch), self._base_params)
      batch = dataclasses.replace(batch, ref_logp=logp)
    if self._teachers:
      logps = [score(params, without_routes(batch)) for score, params in self._teachers]
      batch = dataclasses.replace(batch, teacher_logp=_mean(logps))
    if self._needs_old or self._config.own_teacher:
      logp = self._score(state.params, batch, self._base_params)
      batch = dataclasses.replace(batch, old_logp=logp)
    if self._config.own_teacher:
      batch = self._taught_by_itself(state, batch)
    return batch

  def _taught_by_itself(self, state: TrainState, batch: Batch) -> Batch:
    """Returns the batch with the log-probs of the policy that sees `teacher_prompts`.

    A token without a teacher gets the policy's own, so that its log-ratio is exactly 0.
    """
    params = state.params if self._config.own_teacher == "policy" else state.reference
    if params is None or batch.teacher_prompts is None:
      missing = "TrainState.reference" if params is None else "Batch.teacher_prompts"
      raise ValueError(f"own_teacher is {self._config.own_teacher!r}, but there is no {missing}")
    shown = dataclasses.replace(
      batch, prompts=batch.teacher_prompts, prompt_mask=batch.teacher_prompt_mask
    )
    logp = self._score(params, without_routes(shown), self._base_params)
    return dataclasses.replace(
      batch,
      teacher_logp=_choose(batch.taught, logp, batch.old_logp),
      teacher_prompts=None,
      teacher_prompt_mask=None,
      taught=None,
    )


def without_routes(batch: Batch) -> Batch:
  """Returns a batch whose experts are chosen again, by a model or from a prompt of its own."""
  return dataclasses.replace(batch, routes=None, prompt_routes=None)


@jax.jit
def _mean(arrays: Sequence[jax.Array]) -> jax.Array:
  return sum(arrays) / len(arrays)


@jax.jit
def _choose(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.where(mask, a, b)
