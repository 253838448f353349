"""One optimizer step: `(state, batch) -> (state, metrics)`.

The model is an argument with two functions, as `models.decoder.Decoder` has them:
`score(params, prompts, prompt_mask, completions) -> hidden [P, G, T, D]` and `head(params)`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.core.losses import policy_loss


@partial(
  jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes: the number of finished steps, parameters, optimizer state."""

  step: jax.Array
  params: Any
  opt_state: Any


@partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "prompts",
    "prompt_mask",
    "completions",
    "mask",
    "advantages",
    "weights",
    "sampler_logp",
    "ref_logp",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """One rollout, ready to learn from.

  Attributes:
    prompts, prompt_mask: [P, N], left-padded.
    completions, mask: [P, G, T]; the mask ends with the first stop token.
    advantages: [P, G], or [P, G, T] where an estimator gives one per token.
    weights: [P, G, T], from `token_weights` on the mask of the whole rollout, of which the batch
      may hold fewer prompts, and empty ones (masked, weight 0) to fill it up.
    sampler_logp: [P, G, T], nats, as recorded while sampling.
    ref_logp: [P, G, T], nats, under the reference; None without a KL term.
  """

  prompts: Int[Array, "P N"]
  prompt_mask: Bool[Array, "P N"]
  completions: Int[Array, "P G T"]
  mask: Bool[Array, "P G T"]
  advantages: Float[Array, "P G ..."]
  weights: Float[Array, "P G T"]
  sampler_logp: Float[Array, "P G T"]
  ref_logp: Float[Array, "P G T"] | None = None


def score_batch(
  model: Any, params: Any, batch: Batch, temperature: float
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
  """(log-probability, entropy) of each completion token at the sampling temperature, nats."""
  hidden = model.score(params, batch.prompts, batch.prompt_mask, batch.completions)
  return head_logprobs(
    hidden, model.head(params), batch.completions, temperature=temperature, where=batch.mask
  )


def make_score(model: Any, *, temperature: float) -> Callable[[Any, Batch], jax.Array]:
  """Jitted `(params, batch) -> logp [P, G, T]`, for a reference model."""
  return jax.jit(lambda params, batch: score_batch(model, params, batch, temperature)[0])


def make_train_step(
  model: Any,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  temperature: float,
  micro_batches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Jitted step; the state is donated.

  The loss is a sum over tokens with weights made for the whole rollout, so cutting the prompts
  into `micro_batches` equal parts changes memory and nothing else. The log-probs of this forward
  pass are the old ones too (one update per rollout), so no ratio is ever stale.

  Args:
    temperature: the one used for sampling.
  """

  def loss_fn(params, part: Batch):
    logp, _ = score_batch(model, params, part, temperature)
    return policy_loss(
      algorithm,
      logp,
      part.advantages,
      part.mask,
      ref_logp=part.ref_logp,
      sampler_logp=part.sampler_logp,
      weights=part.weights,
    )

  def step(state: TrainState, batch: Batch):
    total = jnp.maximum(batch.mask.sum(), 1)

    def one_part(grads, part):
      (loss, metrics), new = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)
      share = part.mask.sum() / total
      return jax.tree.map(jnp.add, grads, new), (loss, metrics, share)

    if micro_batches == 1:
      (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    else:
      parts = jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), batch)
      zeros = jax.tree.map(jnp.zeros_like, state.params)
      grads, (losses, metrics, shares) = jax.lax.scan(one_part, zeros, parts)
      loss, metrics = losses.sum(), combine(metrics, shares)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": jnp.asarray(schedule(state.step)),
    }
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return jax.jit(step, donate_argnums=0)


def combine(
  metrics: dict[str, Float[Array, "M"]], shares: Float[Array, "M"]
) -> dict[str, Float[Array, ""]]:
  """Metrics of the whole batch from those of its parts; `shares` are their shares of the tokens."""

  def one(name: str, values: jax.Array) -> jax.Array:
    if name.endswith("/max"):
      return values.max()
    if name.endswith("/min"):
      return values.min()
    return jnp.sum(values * shares)

  return {name: one(name, values) for name, values in metrics.items()}
