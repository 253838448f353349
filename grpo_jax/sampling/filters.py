"""Restricts draws to probable tokens: top-k, top-p and min-p, for evaluation only.

Training rollouts are never filtered: the policy that is scored is the one that was sampled.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class TokenFilter:
  """Says which tokens may be drawn. The rules apply in this order, each to what the last one left.

  Attributes:
    top_k: only the k most probable tokens; of equal ones, those with the lowest ids. 0 is off.
    top_p: only the fewest most probable tokens that together have at least this probability, of
      what `top_k` leaves. 1 is off.
    min_p: only tokens with at least this share of the largest probability. 0 is off.

  Raises:
    ValueError: a number is out of range.

  References:
    Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751 (top-p);
    Nguyen et al. 2024, arXiv 2407.01082 (min-p).

  Example:
    >>> TokenFilter(top_p=0.9).is_off, TokenFilter().is_off
    (False, True)
  """

  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    if self.top_k < 0:
      raise ValueError(f"top_k is {self.top_k}, it must be 0 (off) or above")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}, it must be above 0 and at most 1 (off)")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p is {self.min_p}, it must be between 0 (off) and 1")

  @property
  def is_off(self) -> bool:
    """Tells whether every token may be drawn."""
    return self == TokenFilter()

  def apply(self, ranked: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Returns logits in descending order with -inf for tokens that must not be drawn.

    Args:
      ranked: logits in descending order, at the sampling temperature.

    Example:
      >>> ranked = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> [round(float(p), 2) for p in jnp.exp(TokenFilter(top_p=0.6).apply(ranked))]
      [0.5, 0.3, 0.0]
    """
    rank = jnp.arange(ranked.shape[-1])
    if self.top_k:
      ranked = jnp.where(rank < self.top_k, ranked, -jnp.inf)
    if self.top_p < 1:
      p = jax.nn.softmax(ranked, axis=-1)
      before = jnp.cumsum(p, axis=-1) - p
      # The first token stays, whatever the rounding of the sums.
      ranked = jnp.where((before < self.top_p) | (rank == 0), ranked, -jnp.inf)
    if self.min_p:
      ranked = jnp.where(ranked - ranked[..., :1] >= jnp.log(self.min_p), ranked, -jnp.inf)
    return ranked
