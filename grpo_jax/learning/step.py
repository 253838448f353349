"""One optimizer step: `(state, batch) -> (state, metrics)`.

The model is an argument with two functions, as `models.decoder.Decoder` has them:
`score(params, prompts, prompt_mask, completions) -> hidden [P, G, T, D]` and `head(params)`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.core.losses import policy_loss
from grpo_jax.distributed.mesh import Jitted, layout_of
from grpo_jax.learning import deterministic
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.skipping import SKIPPED, History, accept_update


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "reference", "history"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes.

  Attributes:
    step: number of finished updates, skipped ones left out.
    params: what is trained: all parameters, or the adapters alone.
    opt_state: of the optimizer.
    reference: what `params` is held close to, where that moves too (`move_reference`); else None.
    history: of the gradient norm and of skipped updates; None where nobody asks for it.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  reference: Any = None
  history: History | None = None


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
    "old_logp",
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
    old_logp: [P, G, T], nats, under the parameters before the first of several updates; None where
      there is one update per rollout, whose own forward pass gives them.
  """

  prompts: Int[Array, "P N"]
  prompt_mask: Bool[Array, "P N"]
  completions: Int[Array, "P G T"]
  mask: Bool[Array, "P G T"]
  advantages: Float[Array, "P G ..."]
  weights: Float[Array, "P G T"]
  sampler_logp: Float[Array, "P G T"]
  ref_logp: Float[Array, "P G T"] | None = None
  old_logp: Float[Array, "P G T"] | None = None


# (base_params parameters, trained parameters) -> all parameters of the model.
WithAdapters = Callable[[Any, Any], Any]


def only_trained(base_params: Any, params: Any) -> Any:
  """The `WithAdapters` of a model without base_params parameters."""
  return params


def score_batch(
  model: Any, params: Any, batch: Batch, temperature: float
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
  """(log-probability, entropy) of each completion token at the sampling temperature, nats."""
  hidden = model.score(params, batch.prompts, batch.prompt_mask, batch.completions)
  return head_logprobs(
    hidden,
    model.head(params),
    batch.completions,
    temperature=temperature,
    where=batch.mask,
    softcap=model.config.softcap,
    vocab_shards=model.vocab_shards,
    # A part of fewer prompts than devices, or of an odd number of them, lies as it likes.
    row_shards=math.gcd(model.prompt_shards, len(batch.prompts)),
  )


def _cut(batch: Batch, count: int) -> Batch:
  """`count` parts on a new first axis.

  Every part takes a share of each device's prompts; blocks would leave devices idle in turn.
  """
  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)


def make_score(
  model: Any,
  *,
  temperature: float,
  micro_batches: int = 1,
  with_adapters: WithAdapters = only_trained,
  chunks: Chunks | None = None,
) -> Callable[..., Float[Array, "P G T"]]:
  """Jitted `(params, batch, base_params=None) -> logp`: for a reference, or before several updates.

  Args:
    micro_batches: equal parts of the prompts, one after another: less memory, the same result.
    chunks: in these instead, with the same bits on any number of devices.
  """

  def whole(params: Any, batch: Batch, base_params: Any):
    return score_batch(model, with_adapters(base_params, params), batch, temperature)[0]

  if chunks:
    return deterministic.make_score(whole, chunks)

  def score(params: Any, batch: Batch, base_params: Any = None):
    if micro_batches == 1:
      return whole(params, batch, base_params)
    logp = jax.lax.map(lambda part: whole(params, part, base_params), _cut(batch, micro_batches))
    return logp.swapaxes(0, 1).reshape(batch.mask.shape)

  return Jitted(score, lambda params, batch, base_params=None: layout_of(batch.mask))


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def move_reference(state: TrainState, share: float) -> TrainState:
  """The reference moves to `share * params + (1 - share) * reference`; 1 makes it a copy.

  Iterative GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1) copies; TRL mixes.
  """
  move = jax.tree.map(
    lambda new, old: share * new + (1 - share) * old, state.params, state.reference
  )
  return dataclasses.replace(state, reference=move)


# (params, batch, base_params) -> (gradients, loss, metrics)
Gradient = Callable[[Any, Batch, Any], tuple[Any, jax.Array, dict[str, jax.Array]]]


def make_loss(
  model: Any,
  algorithm: Algorithm,
  *,
  temperature: float,
  with_adapters: WithAdapters = only_trained,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """`(params, batch, base_params) -> (loss, metrics)`; the losses of parts of a batch add up."""

  def loss(params: Any, part: Batch, base_params: Any):
    logp, _ = score_batch(model, with_adapters(base_params, params), part, temperature)
    return policy_loss(
      algorithm,
      logp,
      part.advantages,
      part.mask,
      old_logp=part.old_logp,
      ref_logp=part.ref_logp,
      sampler_logp=part.sampler_logp,
      weights=part.weights,
    )

  return loss


def make_gradient(loss: Callable, micro_batches: int = 1) -> Gradient:
  """The gradient of `make_loss` over a batch, in so many parts one after another."""
  gradient = jax.value_and_grad(loss, has_aux=True)

  def whole(params: Any, batch: Batch, base_params: Any):
    (value, metrics), grads = gradient(params, batch, base_params)
    return grads, value, metrics

  def in_parts(params: Any, batch: Batch, base_params: Any):
    total = jnp.maximum(batch.mask.sum(), 1)

    def one_part(grads, part):
      new, value, metrics = whole(params, part, base_params)
      return jax.tree.map(jnp.add, grads, new), (value, metrics, part.mask.sum() / total)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (losses, metrics, shares) = jax.lax.scan(one_part, zeros, _cut(batch, micro_batches))
    return grads, losses.sum(), combine(metrics, shares)

  return whole if micro_batches == 1 else in_parts


def make_train_step(
  model: Any,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  temperature: float,
  micro_batches: int = 1,
  spike: float = 0.0,
  with_adapters: WithAdapters = only_trained,
  chunks: Chunks | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Jitted step `(state, batch, base_params=None) -> (state, metrics)`; the state is donated.

  The new state lies as the old one did, so a batch size is compiled for once.

  The loss is a sum over tokens with weights made for the whole rollout, so cutting the prompts
  into `micro_batches` equal parts changes memory and nothing else. With one update per rollout the
  log-probs of this forward pass are the old ones too; else the batch brings them (`old_logp`).

  An update whose loss or gradient norm is NaN or infinite is skipped: step, parameters and
  optimizer state stay as they are, bit for bit, and the metric `update/skipped` is 1.

  Args:
    temperature: the one used for sampling.
    spike: skips updates also whose gradient norm is more than this many times the typical one of
      `state.history`, once that knows `WARM_UP` updates; 0 = off.
    with_adapters: makes the model's parameters of the base_params ones and the trained ones.
    chunks: computes the gradient in these instead of in micro-batches, so that the new state has
      the same bits on any number of devices; see `deterministic`.
  """
  loss = make_loss(model, algorithm, temperature=temperature, with_adapters=with_adapters)
  apply = make_apply(optimizer, schedule, spike)
  if chunks:
    return _in_chunks(deterministic.make_gradient(loss, chunks), apply)
  gradient = make_gradient(loss, micro_batches)

  def step(state: TrainState, batch: Batch, base_params: Any = None):
    return apply(state, *gradient(state.params, batch, base_params))

  def outputs(state: TrainState, batch: Batch, base_params: Any = None) -> Any:
    return layout_of(state), None

  return Jitted(step, outputs, donate_argnums=0)


def _in_chunks(gradient: Callable, apply: Callable) -> Callable:
  """A step of two programs: in one, the optimizer would be fused into what comes before it."""

  def finish(state: TrainState, grads: Any, losses: Any, metrics: dict, tokens: Any):
    shares = tokens / jnp.maximum(tokens.sum(), 1)
    return apply(state, grads, losses.sum(), combine(metrics, shares))

  finish = Jitted(finish, lambda state, *_: (layout_of(state), None), donate_argnums=0)

  def step(state: TrainState, batch: Batch, base_params: Any = None):
    return finish(state, *gradient(state.params, batch, base_params))

  return step


def make_apply(
  optimizer: optax.GradientTransformation, schedule: optax.Schedule, spike: float
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """`(state, gradients, loss, metrics) -> (state, metrics)`: the optimizer's part of a step."""

  def apply(state: TrainState, grads: Any, loss: jax.Array, metrics: dict[str, jax.Array]):
    norm = optax.tree.norm(grads)
    ok, history = accept_update(state.history, loss, norm, spike)

    def update(step: Any, params: Any, opt_state: Any):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return step + 1, optax.apply_updates(params, updates), opt_state

    # A branch, not a choice between two results: the new state is written over the old one.
    old = (state.step, state.params, state.opt_state)
    step, params, opt_state = jax.lax.cond(ok, update, lambda *old: old, *old)
    metrics |= {
      "loss": loss,
      "grad_norm": norm,
      "learning_rate": jnp.asarray(schedule(state.step)),
      SKIPPED: 1.0 - ok,
    }
    return TrainState(step, params, opt_state, state.reference, history), metrics

  return apply


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


@jax.jit
def average(measured: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Metrics of several updates as one: means, but the extremes of `/max` and `/min`.

  Skipped updates are counted.
  """
  shares = jnp.full(len(measured), 1 / len(measured))
  stacked = {name: jnp.stack([m[name] for m in measured]) for name in measured[0]}
  counts = {name: stacked[name].sum() for name in (SKIPPED,) if name in stacked}
  return combine(stacked, shares) | counts
