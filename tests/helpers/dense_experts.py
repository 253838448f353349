"""Computes a mixture of experts in the plainest form: the reference for the others."""

import jax.numpy as jnp

from grpo_jax.models.experts import Grouping


def dense(routing, count):
  """Passes all tokens through all experts: E / k times the products. Rows are [E, n, ...]."""
  shares = jnp.zeros(routing.probs.shape, routing.weights.dtype)
  shares = shares.at[jnp.arange(len(shares))[:, None], routing.experts].add(routing.weights)
  return Grouping(
    spread=lambda h: jnp.broadcast_to(h, (count, *h.shape)),
    product=lambda rows, matrices: jnp.einsum("eni,eio->eno", rows, matrices.astype(rows.dtype)),
    biases=lambda biases: biases[:, None],
    combine=lambda rows: jnp.einsum("end,ne->nd", rows, shares.astype(rows.dtype)),
  )
