"""Computes mixtures of experts: each token passes through the MLPs of its k experts of E.

No token is dropped, and all shapes are static. A form of the grouped products is a function that
returns a `Grouping` for a set of choices; `grouping_of` chooses one per backend. Axes: n tokens, D
hidden size, E experts, k experts of a token, F hidden size of an expert.

References:
  Shazeer et al. 2017, arXiv 1701.06538. Fedus et al. 2021, Switch Transformers, arXiv 2101.03961.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from grpo_jax.core.checks import Array


class Routing(NamedTuple):
  """Holds the choice of experts for each token.

  Attributes:
    experts: [n, k], indices, the most probable first.
    weights: [n, k], factors on their outputs, float32.
    probs: [n, E], probabilities of all experts, float32.
  """

  experts: Int[Array, "n k"]
  weights: Float[Array, "n k"]
  probs: Float[Array, "n E"]


class Grouping(NamedTuple):
  """Holds the functions of one form of grouped products, for one choice of experts.

  Attributes:
    spread: maps tokens [n, D] to rows, an array [..., D] whose other axes are the form's own.
    product: maps rows [..., I] and matrices [E, I, O] to rows [..., O], each by its expert's.
    biases: maps [E, O] to what is added to rows [..., O], each its expert's.
    combine: maps rows [..., D] to tokens [n, D], the weighted sums of their k experts.
  """

  spread: Callable[[Array], Array]
  product: Callable[[Array, Array], Array]
  biases: Callable[[Array], Array]
  combine: Callable[[Array], Array]


Form = Callable[[Routing, int], Grouping]


def route(
  logits: Float[Array, "n E"],
  count: int,
  normalized: bool,
  chosen: Int[Array, "n k"] | None = None,
) -> Routing:
  """Returns the `count` most probable experts of each token, or the ones that were chosen before.

  The gradient reaches the logits through the weights; the choice has none.

  Args:
    logits: of the router.
    count: number of experts of a token, k.
    normalized: divide the weights of a token by their sum.
    chosen: experts to use instead of the most probable ones.

  Example:
    >>> routing = route(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2, normalized=True)
    >>> routing.experts.tolist(), (3 * routing.weights).round().tolist()
    ([[1, 2]], [[2.0, 1.0]])
    >>> route(jnp.zeros((1, 3)), 2, False, chosen=jnp.array([[2, 0]])).experts.tolist()
    [[2, 0]]
  """
  probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
  if chosen is None:
    chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), count)[1]
  chosen = chosen.astype(jnp.int32)
  weights = jnp.take_along_axis(probs, chosen, axis=-1)
  if normalized:
    weights = weights / weights.sum(-1, keepdims=True)
  return Routing(chosen, weights, probs)


def blocked(routing: Routing, count: int) -> Grouping:
  """Sorts the rows by expert into blocks of one expert each, and multiplies block by block.

  Rows are [blocks, size, ...]. An expert with c rows takes ceil(c / size) blocks; the bound on
  their number, and so every shape, is static. With blocks of the mean number of rows there are at
  most twice as many as experts: at most twice the products that are needed, and one copy of the
  matrices of each block.
  """
  tokens, k = routing.experts.shape
  size = max(tokens * k // count, 1)
  used = min(count, tokens * k)
  blocks = used + (tokens * k - used) // size
  flat = routing.experts.reshape(-1)
  _, rank, counts = _sorted(flat, count)
  per_expert = -(-counts // size)
  ends = jnp.cumsum(per_expert)
  # Blocks past the last belong to the last expert, and hold zeros that nobody reads.
  expert = jnp.minimum(
    jnp.searchsorted(ends, jnp.arange(blocks), side="right", method="compare_all"), count - 1
  )
  place = (ends - per_expert)[flat] * size + rank  # of each row, in the order of the tokens
  source = jnp.full(blocks * size, tokens, jnp.int32).at[place].set(jnp.arange(tokens * k) // k)

  def spread(h: Array) -> Array:
    padded = jnp.concatenate([h, jnp.zeros_like(h[:1])])
    return padded[source].reshape(blocks, size, -1)

  def product(rows: Array, matrices: Array) -> Array:
    return jnp.einsum("bmi,bio->bmo", rows, matrices.astype(rows.dtype)[expert])

  def combine(rows: Array) -> Array:
    rows = rows.reshape(blocks * size, -1)[place].reshape(tokens, k, -1)
    return jnp.einsum("nkd,nk->nd", rows, routing.weights.astype(rows.dtype))

  return Grouping(spread, product, lambda biases: biases[expert][:, None], combine)


def ragged(routing: Routing, count: int) -> Grouping:
  """Sorts the rows by expert, and multiplies them with `jax.lax.ragged_dot`. Rows are [n k, ...].

  For accelerators. XLA:CPU: it is computed as a dense product of E / k times the size.
  """
  tokens, k = routing.experts.shape
  flat = routing.experts.reshape(-1)
  order, rank, counts = _sorted(flat, count)
  place = (jnp.cumsum(counts) - counts)[flat] + rank

  def combine(rows: Array) -> Array:
    rows = rows[place].reshape(tokens, k, -1)
    return jnp.einsum("nkd,nk->nd", rows, routing.weights.astype(rows.dtype))

  return Grouping(
    spread=lambda h: h[order // k],
    product=lambda rows, matrices: jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), counts),
    biases=lambda biases: biases[flat[order]],
    combine=combine,
  )


def _sorted(
  experts: Int[Array, "m"], count: int
) -> tuple[Int[Array, "m"], Int[Array, "m"], Int[Array, "E"]]:
  """Returns the order of rows by expert, the rank of each among its expert's, and their numbers.

  Example:
    >>> order, rank, counts = _sorted(jnp.array([1, 0, 1]), 2)
    >>> order.tolist(), rank.tolist(), counts.tolist()
    ([1, 0, 2], [0, 0, 1], [1, 2])
  """
  order = jnp.argsort(experts, stable=True)
  counts = jnp.zeros(count, jnp.int32).at[experts].add(1)
  numbers = jnp.zeros(len(experts), jnp.int32).at[order].set(jnp.arange(len(experts)))
  return order, numbers - (jnp.cumsum(counts) - counts)[experts], counts


def grouping_of(platform: str) -> Form:
  """Returns the fastest form for a backend: "cpu", "gpu" or "tpu".

  Example:
    >>> grouping_of("cpu").__name__, grouping_of("tpu").__name__
    ('blocked', 'ragged')
  """
  return blocked if platform == "cpu" else ragged
