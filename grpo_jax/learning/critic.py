"""Trains a critic: a model with a value head, which gives the advantages of PPO.

A critic is a decoder with one output per token instead of a vocabulary, the form of a sequence
classifier with one label: `params["score"]` is its value head. It sees what the policy sees. The
value of a token slot is read before the token of that slot.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grpo_jax.core.algorithms import Algorithm, advantages
from grpo_jax.core.log_ratios import penalized_rewards
from grpo_jax.core.masks import masked_mean
from grpo_jax.core.values import gae
from grpo_jax.distributed.mesh import Sharding
from grpo_jax.learning import deterministic
from grpo_jax.learning.batch import Batch, laid_out
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import (
  TrainState,
  clipped_value_loss,
  make_per_token,
  make_step,
  values_of,
)
from grpo_jax.models.protocol import Model, Params

PREFIX = "critic/"
# Of every run with values, and of those whose critic has updates of its own.
VALUE_METRICS = tuple(
  f"{PREFIX}{name}"
  for name in ("values_mean", "error", "clip_ratio", "explained_variance", "returns_mean")
)
CRITIC_METRICS = (
  *VALUE_METRICS,
  *(f"{PREFIX}{name}" for name in ("loss", "grad_norm", "skipped", "learning_rate")),
)


@dataclasses.dataclass(frozen=True)
class Critic:
  """Describes a critic and how it learns.

  Attributes:
    model: the functions of its trunk; `score` is used.
    optimizer, schedule: its own.
    clip: largest change of a value that counts in an update, in reward units; None disables it.
    warmup_steps: rollouts from which only the critic learns, at the beginning.
  """

  model: Model
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule | None = None
  clip: float | None = None
  warmup_steps: int = 0


def token_values(model: Model, params: Params, batch: Batch) -> Float[Array, "P G T"]:
  """Returns the value of each completion token, in reward units; 0 where `batch.mask` is false.

  Args:
    params: parameters of the trunk, and `score` [1, D], the value head.
  """
  hidden = model.score(params, batch.prompts, batch.prompt_mask, batch.completions)
  return values_of(params, hidden, batch)


def make_values(
  model: Model,
  *,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  chunks: Chunks | None = None,
) -> Callable[..., Float[Array, "P G T"]]:
  """Returns the jitted values `(params, batch, base_params=None) -> values` of a rollout.

  Args:
    model: the critic's, or the policy's if it has a value head.
    micro_batches, sort_by_length, chunks: as in `make_score`.
  """

  def values(params: Params, batch: Batch, base_params: Params):
    return token_values(model, params, batch)

  options = {"micro_batches": micro_batches, "sort_by_length": sort_by_length}
  return make_per_token(values, **options, chunks=chunks)


def make_critic_step(
  critic: Critic,
  *,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  spike: float = 0.0,
  chunks: Chunks | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update of a critic, `(state, batch, base_params=None) -> (state, metrics)`.

  Its tokens have the weights of the policy's loss. Its state is donated.

  Args:
    micro_batches, sort_by_length, spike, chunks: as in `make_train_step`.
  """

  def loss(params: Params, batch: Batch, base_params: Params = None):
    return clipped_value_loss(token_values(critic.model, params, batch), batch, critic.clip)

  return make_step(
    loss, critic.optimizer, critic.schedule,
    micro_batches=micro_batches, sort_by_length=sort_by_length, spike=spike, chunks=chunks,
  )  # fmt: skip


@partial(jax.jit, static_argnames=("algorithm", "mesh", "layout"))
def assess(
  batch: Batch, algorithm: Algorithm, mesh: Mesh | None = None, layout: Sharding = None
) -> tuple[Batch, dict[str, jax.Array]]:
  """Returns a batch with the advantages of its `token_rewards`, and metrics.

  Where its `values` are known, it gets their targets, the returns, as well. The metrics are then
  `critic/explained_variance`, 1 - var(R - V) / var(R) over the tokens of the rollout (0 says that
  the critic is no better than one number), and `critic/returns_mean`.

  Args:
    batch: with `token_rewards`, of a whole rollout. A row with a KL term in the reward needs
      `old_logp` and `ref_logp` as well.
    algorithm: its advantage is computed from rewards of tokens.
    mesh: computes the same bits on any number of its devices; None leaves the order to the
      compiler.
    layout: sharding of the batch.
  """

  def compute(rewards: jax.Array, values: Any, mask: jax.Array, *logps: jax.Array) -> Any:
    if logps:
      rewards = penalized_rewards(rewards, *logps, mask, beta=algorithm.beta, kl=algorithm.kl)
    found = advantages(algorithm, token_rewards=rewards, values=values, mask=mask)
    if values is None:
      return found, None, {}
    _, returns = gae(rewards, values, mask, **algorithm.settings("advantage"))
    return found, returns, _metrics(values, returns, mask)

  if mesh is not None:
    compute = deterministic.replicated(compute, mesh)
  penalized = algorithm.penalizes == "token_rewards"
  logps = (batch.old_logp, batch.ref_logp) if penalized else ()
  found, returns, metrics = compute(batch.token_rewards, batch.values, batch.mask, *logps)
  batch = dataclasses.replace(batch, advantages=found, returns=returns)
  return laid_out(batch, layout), laid_out(metrics, layout, P())


def _metrics(values: jax.Array, returns: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  def variance(x: jax.Array) -> jax.Array:
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

  spread = variance(returns)
  explained = 1 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
  return {
    f"{PREFIX}explained_variance": jnp.where(spread > 0, explained, 0.0),
    f"{PREFIX}returns_mean": masked_mean(returns, mask),
  }


def named(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the metrics of a critic's update under names of their own."""
  return {
    name if name.startswith(PREFIX) else f"{PREFIX}{name.removeprefix('update/')}": value
    for name, value in metrics.items()
  }
