"""Holds one rollout as arrays, and cuts, pads and reorders it on the device.

The sharding of a batch stays as it was.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer

from grpo_jax.distributed import hosts
from grpo_jax.distributed.mesh import Sharding

# Arrays of a batch with several axes, but none of completions.
PER_PROMPT = frozenset((
  "prompts", "prompt_mask", "teacher_prompts", "teacher_prompt_mask", "prompt_routes", "balance",
))  # fmt: skip
SHORTEST = 16  # tokens; `trim` does not make an axis shorter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One rollout, ready to learn from.

  Attributes:
    prompts, prompt_mask: [P, N], left-padded.
    completions, mask: [P, G, T]; the mask ends with the first stop token.
    advantages: [P, G], or [P, G, T] from an estimator that gives one per token.
    weights: [P, G, T], from `token_weights` on the mask of the whole rollout. The batch may hold
      fewer prompts than the rollout, and empty ones (masked, weight 0) as padding.
    sampler_logp: [P, G, T], nats, as recorded while sampling.
    ref_logp: [P, G, T], nats, under the reference; None without a KL term.
    old_logp: [P, G, T], nats, under the parameters before the first of several updates; None with
      one update per rollout, whose own forward pass gives them.
    token_rewards: [P, G, T], the reward of each token, for advantages that the learner computes
      from them, with a critic or without; the `advantages` are NaN until it has. None otherwise.
    values, returns: [P, G, T], values under the critic before the updates, and their targets.
    teacher_logp: [P, G, T], nats, under the teacher, or the mean over several; None without one.
    teacher_prompts, teacher_prompt_mask: [P, M], left-padded: what the policy sees as its own
      teacher, in place of the prompts; None without one, and after scoring.
    taught: [P, G, T], true on tokens that have such a teacher.
    nll_weights: [P, G, T], weights of right answers (`core.algorithms.nll_weights`); None without
      such a term.
    entropy_coef: [P], the coefficient of an adaptive entropy bonus, the same for all prompts, which
      the step fills in; None without one.
    staleness: [P], or [P, G, T] where completions were sampled in parts: steps between the
      parameters that sampled and those before the updates, for metrics; None where they are the
      same.
    routes, prompt_routes: [P, G, T, C] and [P, N, C], the experts that were chosen while sampling,
      which the update then uses; None chooses them again.
    balance: [P, L, E], or [P, 1, 1] without routes: weights of the router's probabilities in the
      load-balance loss, the same for all prompts, which the step fills in; None without that loss.
    temperature: the sampling temperature, at which log-probs are scored; None if it is unknown.
      It is static: a step compiles once for each value.
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
  token_rewards: Float[Array, "P G T"] | None = None
  values: Float[Array, "P G T"] | None = None
  returns: Float[Array, "P G T"] | None = None
  teacher_logp: Float[Array, "P G T"] | None = None
  teacher_prompts: Int[Array, "P M"] | None = None
  teacher_prompt_mask: Bool[Array, "P M"] | None = None
  taught: Bool[Array, "P G T"] | None = None
  nll_weights: Float[Array, "P G T"] | None = None
  entropy_coef: Float[Array, "P"] | None = None
  staleness: Float[Array, "P ..."] | None = None
  routes: Integer[Array, "P G T C"] | None = None
  prompt_routes: Integer[Array, "P N C"] | None = None
  balance: Float[Array, "P ..."] | None = None
  temperature: float | None = dataclasses.field(default=None, metadata={"static": True})

  def arrays(self) -> dict[str, jax.Array]:
    """Returns the arrays by name, without those that are None."""
    arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del arrays["temperature"]
    return {name: array for name, array in arrays.items() if array is not None}


def select(batch: Batch, rows: Int[np.ndarray, "R"], pad_prompts_to_multiple: int) -> Batch:
  """Returns these prompts of a batch, padded with empty ones.

  The number of prompts is the next multiple of `pad_prompts_to_multiple`, at least one of them. An
  empty prompt is a copy of the first with all of its completions masked.

  Args:
    rows: indices of the prompts.
  """
  size = pad_prompts_to_multiple * max(-(-len(rows) // pad_prompts_to_multiple), 1)
  padded = np.concatenate([rows, np.zeros(size - len(rows), np.int64)])
  return _select(batch, padded, np.arange(size) < len(rows), batch.mask.sharding)


@partial(jax.jit, static_argnames="layout")
def _select(batch: Batch, rows: jax.Array, real: jax.Array, layout: Sharding) -> Batch:
  batch, real = rows_of(batch, rows, layout), real[:, None, None]
  batch = _weighted(batch, lambda weights: jnp.where(real, weights, 0.0))
  return dataclasses.replace(batch, mask=batch.mask & real)


def _weighted(batch: Batch, change: Callable[[jax.Array], jax.Array]) -> Batch:
  """Returns the batch with a change of its weights, those of right answers among them."""
  nll = None if batch.nll_weights is None else change(batch.nll_weights)
  return dataclasses.replace(batch, weights=change(batch.weights), nll_weights=nll)


def trim(
  batch: Batch, prompt_tokens: Int[np.ndarray, "P"], lengths: Int[np.ndarray, "P G"]
) -> tuple[Batch, float]:
  """Cuts off the padding that all prompts or all completions share.

  Prompts lose tokens at their beginning, completions at their end, down to one of `sizes`.

  Args:
    prompt_tokens, lengths: tokens of the prompts and completions of the batch, without the empty
      prompts.

  Returns:
    The batch, and the share of its tokens that is still padding.
  """
  group, longest = batch.mask.shape[1], (batch.prompts.shape[1], batch.mask.shape[2])
  used = (prompt_tokens.max(initial=0), lengths.max(initial=0))
  n, t = (min(size for size in sizes(full) if size >= least) for full, least in zip(longest, used))
  padding = 1 - (prompt_tokens.sum() + lengths.sum()) / (len(batch.mask) * (n + group * t))
  if (n, t) != longest:
    batch = _trim(batch, n, t, batch.mask.sharding)
  return batch, float(padding)


def sizes(full: int) -> list[int]:
  """Returns the lengths that updates are compiled for: `full`, and up to three halvings of it.

  Example:
    >>> sizes(512), sizes(36), sizes(5)
    ([512, 256, 128, 64], [36, 18], [5])
  """
  return [full] + [n for i in (1, 2, 3) if (n := -(-full // 2**i)) >= SHORTEST]


@partial(jax.jit, static_argnums=(1, 2, 3))
def _trim(batch: Batch, n: int, t: int, layout: Sharding) -> Batch:
  trimmed = {"prompts": batch.prompts[:, -n:], "prompt_mask": batch.prompt_mask[:, -n:]}
  if batch.routes is not None:
    trimmed["prompt_routes"] = batch.prompt_routes[:, -n:]
  return laid_out(dataclasses.replace(shorten(batch, t), **trimmed), layout)


def shorten(batch: Batch, t: int) -> Batch:
  """Returns the batch with the first `t` tokens of each completion; inside a jitted function."""
  arrays = {k: v for k, v in batch.arrays().items() if v.ndim >= 3 and k not in PER_PROMPT}
  return dataclasses.replace(batch, **{name: array[:, :, :t] for name, array in arrays.items()})


def mini_batches(batch: Batch, count: int, epochs: int, seed: Sequence[int]) -> Iterator[Batch]:
  """Yields `count` mini-batches per epoch, with the prompts in a new order in each epoch.

  Token weights are multiplied by `count`: the loss of a mini-batch is an estimate of the loss of
  the batch, and the mean over the mini-batches of an epoch equals it. One mini-batch in one epoch
  is the batch as it is.

  The order and the cuts depend on the number of real prompts only. The number of empty ones, which
  `select` adds, depends on the mesh.

  Args:
    count: number of equal mini-batches; divides the number of prompts.
    seed: integers that determine the order, such as (seed of the run, step).
  """
  if count == epochs == 1:
    yield batch
    return
  size, layout = batch.mask.shape[0] // count, batch.mask.sharding
  real = int(jax.device_get(_count_real(batch.mask, layout)))
  for epoch in range(epochs):
    # NumPy refuses negative seeds.
    order = np.random.default_rng([n % 2**64 for n in (*seed, epoch)]).permutation(real)
    for rows in np.array_split(order, count):
      # Empty prompts come last: the first of them is number `real`.
      rows = np.pad(rows, (0, size - len(rows)), constant_values=real)
      yield _mini_batch(batch, hosts.to_all(rows, layout), count, layout)


@partial(jax.jit, static_argnums=1)
def _count_real(mask: jax.Array, layout: Sharding) -> jax.Array:
  """Returns the number of prompts up to the last one with an unmasked token."""
  numbers = jnp.arange(1, mask.shape[0] + 1)
  count = jnp.max(jnp.where(mask.any((1, 2)), numbers, 0))
  return laid_out(count, layout, P()) if isinstance(layout, NamedSharding) else count


@partial(jax.jit, static_argnums=(2, 3))
def _mini_batch(batch: Batch, rows: jax.Array, count: int, layout: Sharding) -> Batch:
  return _weighted(rows_of(batch, rows, layout), lambda weights: weights * count)


def rows_of(tree: Any, rows: jax.Array, layout: Sharding) -> Any:
  """Returns these rows of all arrays; inside a jitted function."""
  return jax.tree.map(lambda a: laid_out(a[rows], layout), tree)


@partial(jax.jit, static_argnames="layout")
def everywhere(values: jax.Array, layout: Sharding) -> jax.Array:
  """Returns an array on every device, for the hosts; as it is without a mesh."""
  return laid_out(values, layout, P())


def laid_out(tree: Any, layout: Sharding, spec: P | None = None) -> Any:
  """Constrains the sharding of all arrays, inside a jitted function; None leaves it open.

  Args:
    spec: partition spec to use on the mesh of `layout` instead of its own.
  """
  if layout is None:
    return tree
  layout = layout if spec is None else NamedSharding(layout.mesh, spec)
  return jax.lax.with_sharding_constraint(tree, layout)
