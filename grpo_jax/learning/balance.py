"""Computes the load-balance loss of a mixture of experts, and metrics of its router.

With f_e the number of tokens that choose expert e over the number of tokens, and P_e the mean
probability of e, the loss of a layer is `E sum_e f_e P_e`, and that of the model the mean over its
layers. It is k where all experts get equal shares of all tokens, and E where the router is sure of
the same experts for every token. Gradient reaches the probabilities only.

Both means are over the tokens that the update reads: those of the prompts, each prompt once, and
those of the completions that are in the loss, without the last one of each. Padding does not count,
and neither do groups that are left out of the update. With recorded routes, f is known before the
gradient is computed, and number and order of micro-batches change nothing. Without them, f is that
of each micro-batch (of each chunk, with the deterministic reduction).

References:
  Fedus et al. 2021, Switch Transformers, arXiv 2101.03961, equations 4 to 6, for k = 1. For larger
  k: `load_balancing_loss_func` of transformers, which takes all layers for one; here each layer is
  balanced by itself.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.learning.batch import Batch

ROUTER_METRICS = ("router/balance", "router/entropy")


def with_balance(batch: Batch, layers: int, experts: int) -> Batch:
  """Returns the batch with its field `balance`, from the tokens of the whole batch.

  Args:
    layers, experts: numbers of layers and of experts of the model.
  """
  real = tokens_read(batch)
  scale = experts / (layers * jnp.maximum(real.sum(), 1))
  weights = jnp.full((1, 1), scale)
  if batch.routes is not None:
    read = batch.routes[:, :, :-1].reshape(len(real), -1, batch.routes.shape[-1])
    routes = jnp.concatenate([batch.prompt_routes, read], axis=1).astype(jnp.int32)
    routes = routes.reshape(*real.shape, layers, -1)  # [P, S, L, k]
    weights = scale * shares_of(jnp.moveaxis(routes, 2, 0), real, experts)
  return dataclasses.replace(batch, balance=jnp.broadcast_to(weights, (len(real), *weights.shape)))


class RouterSums(NamedTuple):
  """Holds sums over the real tokens of one layer; those of all layers have a leading axis.

  Attributes:
    probs: probabilities of each expert, summed over the tokens of each prompt.
    shares: share of the tokens that choose each expert.
    entropy: of the router's choices in nats, without a gradient.
  """

  probs: Float[Array, "*L P E"]
  shares: Float[Array, "*L E"]
  entropy: Float[Array, "*L"]


def router_sums(
  probs: Float[Array, "P S E"], chosen: Int[Array, "P S k"], real: Bool[Array, "P S"]
) -> RouterSums:
  """Returns the sums of a layer, so that no array of all tokens, layers and experts exists.

  Args:
    probs: probabilities of all experts for the tokens of `Decoder.score`, S = N + G (T - 1).
    chosen: experts of each token.
    real: those that count, of `tokens_read`.
  """
  probs = jnp.where(real[..., None], probs, 0.0)
  [shares], fixed = shares_of(chosen[None], real, probs.shape[-1]), jax.lax.stop_gradient(probs)
  return RouterSums(probs.sum(1), shares, -xlogy(fixed, fixed).sum())


def balance_loss(
  sums: RouterSums, batch: Batch
) -> tuple[Float[Array, ""] | None, dict[str, jax.Array]]:
  """Returns the load-balance loss of a micro-batch, None without `batch.balance`, and metrics.

  The losses of the micro-batches of a batch add up to its loss. The metrics are of this micro-batch
  alone: `router/balance` is its loss, with its own f, and `router/entropy` the mean entropy of the
  router in nats.

  Args:
    sums: of all layers.
  """
  count, experts = jnp.maximum(tokens_read(batch).sum(), 1), sums.probs.shape[-1]
  mean = jax.lax.stop_gradient(sums.probs).sum(1) / count
  metrics = {
    "router/balance": experts * (sums.shares * mean).sum(-1).mean(),
    "router/entropy": sums.entropy.mean() / count,
  }
  if batch.balance is None:
    return None, metrics
  weights = batch.balance if batch.routes is not None else batch.balance * sums.shares
  return jnp.einsum("lpe,ple->", sums.probs, weights), metrics


def shares_of(
  chosen: Int[Array, "L P S k"], real: Bool[Array, "P S"], experts: int
) -> Float[Array, "L E"]:
  """Returns the share of the real tokens that choose each expert; each layer's sum to k.

  Example:
    >>> chosen = jnp.array([[[[0, 2], [2, 1], [1, 1]]]])  # one layer, three tokens
    >>> shares_of(chosen, jnp.array([[True, True, False]]), 4).tolist()
    [[0.5, 0.5, 1.0, 0.0]]
  """
  layers = jnp.arange(len(chosen))[:, None, None, None]
  ones = jnp.broadcast_to(real[..., None], chosen.shape).astype(jnp.int32)
  counts = jnp.zeros((len(chosen), experts), jnp.int32).at[layers, chosen].add(ones)
  return counts / jnp.maximum(real.sum(), 1)


def tokens_read(batch: Batch) -> Bool[Array, "P S"]:
  """Returns which inputs of `Decoder.score` are real tokens of the update.

  Empty prompts are none, and neither is the last token of a completion, which predicts nothing.
  """
  prompts = batch.prompt_mask & batch.mask.any((1, 2))[:, None]
  return jnp.concatenate([prompts, batch.mask[..., 1:].reshape(len(prompts), -1)], axis=1)
