"""One optimizer step: `(state, batch) -> (state, metrics)`.

The model is an argument with two functions, as `models.decoder.Decoder` has them:
`score(params, prompts, prompt_mask, completions) -> hidden [P, G, T, D]` and `head(params)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.core.losses import policy_loss


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "reference"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes.

  Attributes:
    step: number of finished updates.
    params: what is trained: all parameters, or the adapters alone.
    opt_state: of the optimizer.
    reference: what `params` is held close to, where that moves too (`move_reference`); else None.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  reference: Any = None


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


# (frozen parameters, trained parameters) -> all parameters of the model.
Join = Callable[[Any, Any], Any]


def only_trained(frozen: Any, params: Any) -> Any:
  """The `Join` of a model without frozen parameters."""
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
  )


class _Jitted:
  """`jax.jit` of a function whose results lie where `outputs(*arguments)` says.

  Left to itself the compiler names the layout of a result in its own words, `P("data")` for
  `P(("data", "fsdp"))` where `fsdp` is 1, say; fed back in, that is another layout to `jit`, and it
  compiles a second time.
  """

  def __init__(self, function: Callable, outputs: Callable[..., Any], **options: Any) -> None:
    self._function, self._outputs, self._options = function, outputs, options
    self._programs: dict[Any, Any] = {}

  def _program(self, *arguments: Any) -> Any:
    layout = self._outputs(*arguments)
    leaves, tree = jax.tree.flatten(layout, is_leaf=lambda leaf: leaf is None)
    key = (tree, *leaves)
    if key not in self._programs:
      self._programs[key] = jax.jit(self._function, out_shardings=layout, **self._options)
    return self._programs[key]

  def __call__(self, *arguments: Any) -> Any:
    return self._program(*arguments)(*arguments)

  def trace(self, *arguments: Any) -> Any:
    """`jax.jit`'s own, for arrays or for shapes with a sharding."""
    return self._program(*arguments).trace(*arguments)

  def lower(self, *arguments: Any) -> Any:
    """`jax.jit`'s own."""
    return self.trace(*arguments).lower()


def _layout(tree: Any) -> Any:
  """How the leaves of a tree lie on their mesh; None, which is up to the compiler, without one."""

  def one(leaf: Any) -> NamedSharding | None:
    found = getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None

  return jax.tree.map(one, tree)


def _cut(batch: Batch, count: int) -> Batch:
  """`count` parts on a new first axis.

  Every part takes a share of each device's prompts; blocks would leave devices idle in turn.
  """
  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)


def make_score(
  model: Any, *, temperature: float, micro_batches: int = 1, join: Join = only_trained
) -> Callable[..., Float[Array, "P G T"]]:
  """Jitted `(params, batch, frozen=None) -> logp`: for a reference, or before several updates.

  Args:
    micro_batches: equal parts of the prompts, one after another: less memory, the same result.
  """

  def score(params: Any, batch: Batch, frozen: Any = None):
    params = join(frozen, params)
    if micro_batches == 1:
      return score_batch(model, params, batch, temperature)[0]
    parts = _cut(batch, micro_batches)
    logp = jax.lax.map(lambda part: score_batch(model, params, part, temperature)[0], parts)
    return logp.swapaxes(0, 1).reshape(batch.mask.shape)

  return _Jitted(score, lambda params, batch, frozen=None: _layout(batch.mask))


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def move_reference(state: TrainState, share: float) -> TrainState:
  """The reference moves to `share * params + (1 - share) * reference`; 1 makes it a copy.

  Iterative GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1) copies; TRL mixes.
  """
  move = jax.tree.map(
    lambda new, old: share * new + (1 - share) * old, state.params, state.reference
  )
  return dataclasses.replace(state, reference=move)


def make_train_step(
  model: Any,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  temperature: float,
  micro_batches: int = 1,
  join: Join = only_trained,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Jitted step `(state, batch, frozen=None) -> (state, metrics)`; the state is donated.

  The new state lies as the old one did, so a batch size is compiled for once.

  The loss is a sum over tokens with weights made for the whole rollout, so cutting the prompts
  into `micro_batches` equal parts changes memory and nothing else. With one update per rollout the
  log-probs of this forward pass are the old ones too; else the batch brings them (`old_logp`).

  Args:
    temperature: the one used for sampling.
    join: makes the model's parameters of the frozen ones and the trained ones.
  """

  def loss_fn(params, part: Batch, frozen):
    logp, _ = score_batch(model, join(frozen, params), part, temperature)
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

  gradient = jax.value_and_grad(loss_fn, has_aux=True)

  def step(state: TrainState, batch: Batch, frozen: Any = None):
    total = jnp.maximum(batch.mask.sum(), 1)

    def one_part(grads, part):
      (loss, metrics), new = gradient(state.params, part, frozen)
      share = part.mask.sum() / total
      return jax.tree.map(jnp.add, grads, new), (loss, metrics, share)

    if micro_batches == 1:
      (loss, metrics), grads = gradient(state.params, batch, frozen)
    else:
      zeros = jax.tree.map(jnp.zeros_like, state.params)
      parts = _cut(batch, micro_batches)
      grads, (losses, metrics, shares) = jax.lax.scan(one_part, zeros, parts)
      loss, metrics = losses.sum(), combine(metrics, shares)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": jnp.asarray(schedule(state.step)),
    }
    changed = {"step": state.step + 1, "params": params, "opt_state": opt_state}
    return dataclasses.replace(state, **changed), metrics

  def outputs(state: TrainState, batch: Batch, frozen: Any = None) -> Any:
    return _layout(state), None

  return _Jitted(step, outputs, donate_argnums=0)


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
  """Metrics of several updates as one: means, but the extremes of `/max` and `/min`."""
  shares = jnp.full(len(measured), 1 / len(measured))
  return combine({name: jnp.stack([m[name] for m in measured]) for name in measured[0]}, shares)
