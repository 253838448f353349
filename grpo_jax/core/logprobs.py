"""Computes log-probabilities of tokens, from logits or directly from hidden states."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array, as_float, as_tokens, check_positive
from grpo_jax.core.tiles import (
  broadcastable,
  check_head,
  finite_top,
  fold_head,
  fold_rows,
  gradients_of_tiles,
  over_tiles,
  row_shards_of,
  soft_cap_and_slope,
  tile_logits,
)


def soft_cap(x: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
  """Returns `cap * tanh(x / cap)`, which keeps logits or attention scores within (-cap, cap).

  Gradient flows to `x`.

  Args:
    cap: bound of the result, above 0. None returns `x` unchanged.

  References:
    Gemma 2, arXiv 2408.00118, section 2.

  Example:
    >>> import jax.numpy as jnp
    >>> print(soft_cap(jnp.array([0.0, 1.0, 100.0]), 2.0).round(3))
    [0.    0.924 2.   ]
    >>> soft_cap(jnp.array([100.0]), None).tolist()
    [100.0]
  """
  return soft_cap_and_slope(x, cap)[0]


def token_logprobs(
  logits: Float[Array, "... T V"], tokens: Int[Array, "... T"], *, temperature: float = 1.0
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
  """Returns `logp = z[token] - logsumexp(z)` and `entropy = -sum p log p`.

  Here `z = logits / temperature` and `p = softmax(z)`.
  `logits[..., t, :]` must be the distribution that `tokens[..., t]` was drawn from: align them
  before the call. Gradient flows from both results to `logits`. A logit of -inf is a token of
  probability 0. A token outside [0, V) gives NaN.

  Args:
    logits: unnormalized log-probabilities of all tokens.
    tokens: token ids.
    temperature: divides the logits.

  Returns:
    (logp, entropy), both `[..., T]`, in nats, float32 or wider.

  Raises:
    ValueError: a shape or dtype does not fit, or the temperature is not a finite number above 0.

  Example:
    >>> import jax.numpy as jnp
    >>> logp, entropy = token_logprobs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1]))
    >>> print(jnp.exp(logp), entropy)  # 0.25 log 4 + 0.75 log (4 / 3)
    [0.75] [0.562335...]
  """
  logits = as_float("logits", logits)
  check_positive("temperature", temperature)
  if logits.ndim < 2:
    raise ValueError(f"logits has shape {logits.shape}, expected at least two axes [..., T, V]")
  tokens = as_tokens("tokens", tokens, logits.shape[:-1])
  logps = jax.nn.log_softmax(logits / temperature)
  # `take_along_axis` reads NaN beyond the last column, but counts negative ids from the end.
  column = jnp.where(tokens < 0, logits.shape[-1], tokens)
  logp = jnp.take_along_axis(logps, column[..., None], -1).squeeze(-1)
  entropy = -jnp.sum(jnp.exp(logps) * jnp.where(jnp.isneginf(logps), 0.0, logps), axis=-1)
  return logp, entropy


def head_logprobs(
  hidden: Float[Array, "... T D"],
  head: Float[Array, "D V"],
  tokens: Int[Array, "... T"],
  *,
  temperature: float = 1.0,
  where: Bool[Array, "... T"] | None = None,
  softcap: float | None = None,
  vocab_shards: int = 1,
  row_shards: int = 1,
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
  """Returns `token_logprobs(hidden @ head, tokens)` without ever forming `[..., T, V]`.

  The vocabulary is processed in tiles. The forward pass keeps a running log-sum-exp and, for the
  entropy, a running `sum p (z - max z)`; the backward pass recomputes each tile. Products
  accumulate in float32, also for bfloat16 inputs. Gradient flows from `logp` and `entropy` to
  `hidden` and `head`. A token outside [0, V) gives NaN.

  Args:
    hidden: final hidden states; `hidden[..., t, :]` predicts `tokens[..., t]`.
    head: output projection. It is read as `head.T`: a matrix stored as `[V, D]`, such as a tied
      embedding, is passed as `embedding.T` and is not copied.
    tokens: token ids.
    temperature: divides the logits, after the soft cap.
    where: true on the rows to compute. The other rows have results and gradients of 0, and
      `hidden` may hold NaN there. None computes all rows.
    softcap: caps the logits by `soft_cap`. None leaves them as they are.
    vocab_shards: number of equal shards of the vocabulary, processed side by side and combined at
      the end. Set it to the number of devices that `head` is split over along V, so that each
      device processes its own shard; otherwise the head is communicated for every tile. The
      results do not depend on it.
    row_shards: number of equal shards of the rows, in order, processed side by side; their
      gradients of the head are added at the end. Set it to the number of devices that `hidden` is
      split over, so that each device adds up its own gradients; otherwise they are reduced for
      every tile. The results do not depend on it.

  Returns:
    (logp, entropy), both `[..., T]`, in nats, float32 or wider.

  Raises:
    ValueError: a shape or dtype does not fit, the temperature or the soft cap is not a finite
      number above 0, `vocab_shards` does not divide V, or `row_shards` does not divide the number
      of rows.

  Example:
    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((1, 3, 4)), jnp.zeros((4, 8))
    >>> logp, entropy = head_logprobs(hidden, head, jnp.zeros((1, 3), int))
    >>> logp.round(4).tolist()  # uniform over 8 tokens: -log 8
    [[-2.0794..., -2.0794..., -2.0794...]]
  """
  hidden, head = check_head(hidden, head, temperature, softcap, vocab_shards)
  tokens = as_tokens("tokens", tokens, hidden.shape[:-1])
  rows, row_axes = row_shards_of(hidden, where, row_shards)
  logp, entropy = _tiled(
    fold_rows(hidden, rows, row_axes),
    fold_head(head, vocab_shards),
    tokens.reshape(row_axes),
    float(temperature),
    softcap,
  )
  logp, entropy = logp.reshape(-1), entropy.reshape(-1)
  if where is not None:
    logp, entropy = jnp.where(rows, logp, 0.0), jnp.where(rows, entropy, 0.0)
  return logp.reshape(tokens.shape), entropy.reshape(tokens.shape)


def _is_token(tokens: jax.Array, head: jax.Array, start: jax.Array, width: int) -> jax.Array:
  """Returns a mask [S, R, B, w] that is true in the column of each row's token."""
  first = jnp.arange(math.prod(head.shape[:-2])).reshape(*head.shape[:-2], 1) * head.shape[-2]
  columns = first + (start + jnp.arange(width)).reshape((1,) * (head.ndim - 2) + (-1,))
  return broadcastable(tokens, head) == columns.reshape((1,) * tokens.ndim + columns.shape)


def _rebase(top, total, weighted, base):
  """Returns `sum e^(z - top)` and `sum e^(z - top) (z - top)` with `base` in place of `top`."""
  # A row whose logits have all been -inf keeps sums of 0, instead of inf - inf.
  shift = jnp.where(total > 0, top - base, 0.0)
  shrink = jnp.exp(shift)
  return total * shrink, (weighted + shift * total) * shrink


# Axes: S row shards of R rows each, B vocabulary shards of V / B tokens each, w columns of a shard
# in a tile. Nothing is summed over S or B before the last tile, so that devices with one shard each
# do not communicate until then. Axes stand in the order in which products return them.
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _tiled(hidden, head, tokens, temperature, softcap):
  """Returns (logp, entropy) [S, R] of hidden [S, R, D], head [B, V / B, D] and tokens [S, R].

  The arrays have no axis S with one row shard, and no axis B with one vocabulary shard.
  """
  return _tiled_forward(hidden, head, tokens, temperature, softcap)[0]


def _tiled_forward(hidden, head, tokens, temperature, softcap):
  dtype = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)

  def body(carry, start, width):
    top, total, weighted, chosen = carry
    z, _, _ = tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    new_top = jnp.maximum(top, z.max(-1))
    base = finite_top(new_top)
    total, weighted = _rebase(top, total, weighted, base)
    shifted = z - base[..., None]
    p = jnp.exp(shifted)
    weighted += jnp.where(p > 0, p * shifted, 0.0).sum(-1)
    chosen += jnp.where(_is_token(tokens, head, start, width), z, 0.0).sum(-1)
    return new_top, total + p.sum(-1), weighted, chosen

  zeros = jnp.zeros((*tokens.shape, *head.shape[:-2]), dtype)
  carry = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
  top, total, weighted, chosen = over_tiles(body, carry, hidden, head)
  if head.ndim == 3:
    tops, top = top, top.max(-1)
    total, weighted = _rebase(tops, total, weighted, finite_top(top)[..., None])
    total, weighted, chosen = total.sum(-1), weighted.sum(-1), chosen.sum(-1)
  vocab = math.prod(head.shape[:-1])
  chosen = jnp.where((tokens >= 0) & (tokens < vocab), chosen, jnp.nan)
  logsumexp = top + jnp.log(total)
  entropy = jnp.log(total) - weighted / total
  return (chosen - logsumexp, entropy), (hidden, head, tokens, logsumexp, entropy)


def _tiled_backward(temperature, softcap, saved, cotangents):
  hidden, head, tokens, logsumexp, entropy = saved
  dtype = logsumexp.dtype
  per_row = (logsumexp, entropy, *cotangents)
  logsumexp, entropy, d_logp, d_entropy = (broadcastable(each, head) for each in per_row)

  def slopes(start, width):
    z, slope, tile = tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    logps = z - logsumexp
    p = jnp.exp(logps)
    surprise = jnp.where(p > 0, p * (logps + entropy), 0.0)
    d_z = d_logp * (_is_token(tokens, head, start, width) - p) - d_entropy * surprise
    return d_z * slope, tile

  return *gradients_of_tiles(slopes, hidden, head, dtype), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
