"""Computes log-probabilities of tokens, from logits or directly from hidden states."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array, as_float, as_mask, as_tokens, check_positive

# Number of logits in the largest tile that `head_logprobs` forms (float32: 16 MiB), counted for one
# row shard and one vocabulary shard, which is the part of one device.
TILE_ELEMENTS = 2**22
# Least number of columns of a tile, however many rows it has.
LEAST_COLUMNS = 512


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
  return _soft_cap_and_slope(x, cap)[0]


def _soft_cap_and_slope(x: jax.Array, cap: float | None) -> tuple[jax.Array, jax.Array | float]:
  """Returns `soft_cap(x, cap)` and its derivative in `x`."""
  if cap is None:
    return x, 1.0
  squashed = jnp.tanh(x / cap)
  return cap * squashed, 1.0 - squashed**2


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
  hidden, head = jnp.asarray(hidden), jnp.asarray(head)
  for name, value in (("hidden", hidden), ("head", head)):
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point, got dtype {value.dtype}")
  if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
    raise ValueError(
      f"hidden has shape {hidden.shape} and head {head.shape}, expected [..., T, D] and [D, V]"
    )
  check_positive("temperature", temperature)
  if softcap is not None:
    check_positive("softcap", softcap)
  if vocab_shards < 1 or head.shape[1] % vocab_shards:
    raise ValueError(
      f"vocab_shards must divide the vocabulary of {head.shape[1]}, got {vocab_shards}"
    )
  tokens = as_tokens("tokens", tokens, hidden.shape[:-1])
  if row_shards < 1 or tokens.size % row_shards:
    raise ValueError(f"row_shards must divide the {tokens.size} rows, got {row_shards}")
  flat = hidden.reshape(-1, hidden.shape[-1])
  if where is not None:
    rows = as_mask("where", where, hidden.shape[:-1]).reshape(-1)
    flat = jnp.where(rows[:, None], flat, 0.0)
  # XLA:CPU: a single shard gets no axis, because products of more than two axes copy operands.
  row_axes = (*(row_shards,) * (row_shards > 1), tokens.size // row_shards)
  vocab_axes = (*(vocab_shards,) * (vocab_shards > 1), head.shape[1] // vocab_shards)
  logp, entropy = _tiled(
    flat.reshape(*row_axes, head.shape[0]),
    head.T.reshape(*vocab_axes, head.shape[0]),
    tokens.reshape(row_axes),
    float(temperature),
    softcap,
  )
  logp, entropy = logp.reshape(-1), entropy.reshape(-1)
  if where is not None:
    logp, entropy = jnp.where(rows, logp, 0.0), jnp.where(rows, entropy, 0.0)
  return logp.reshape(tokens.shape), entropy.reshape(tokens.shape)


def _tiles(rows: int, size: int) -> tuple[int, int]:
  """Returns (number of full tiles of a vocabulary shard, columns of each); the rest is smaller."""
  target = max(TILE_ELEMENTS // max(rows, 1), LEAST_COLUMNS)
  count = -(-size // target)
  return count, size // count


def _over_tiles(body: Callable, carry: tuple, hidden: jax.Array, head: jax.Array) -> tuple:
  """Runs `carry = body(carry, start, width)` over all tiles; the widths are static."""
  size = head.shape[-2]
  count, width = _tiles(hidden.shape[-2], size)
  # The rest comes first: after the loop, XLA would copy the gradient of the head for it.
  if rest := size - count * width:
    carry = body(carry, count * width, rest)
  return jax.lax.fori_loop(0, count, lambda i, c: body(c, i * width, width), carry)


def _axes(hidden: jax.Array, head: jax.Array) -> tuple[str, str]:
  """Returns the einsum letters of the shard axes: "s" for rows, "b" for the vocabulary, or ""."""
  return "s" * (hidden.ndim - 2), "b" * (head.ndim - 2)


def _broadcastable(per_row: jax.Array, head: jax.Array) -> jax.Array:
  """Returns numbers of rows [S, R] as [S, R, 1, 1], to be combined with logits [S, R, B, w]."""
  return per_row.reshape(per_row.shape + (1,) * (head.ndim - 1))


def _is_token(tokens: jax.Array, head: jax.Array, start: jax.Array, width: int) -> jax.Array:
  """Returns a mask [S, R, B, w] that is true in the column of each row's token."""
  first = jnp.arange(math.prod(head.shape[:-2])).reshape(*head.shape[:-2], 1) * head.shape[-2]
  columns = first + (start + jnp.arange(width)).reshape((1,) * (head.ndim - 2) + (-1,))
  return _broadcastable(tokens, head) == columns.reshape((1,) * tokens.ndim + columns.shape)


def _bits(x: jax.Array) -> jax.Array:
  """Returns 16-bit floats as integers, other arrays as they are."""
  # XLA:CPU: slicing a bfloat16 array would widen the whole array first.
  return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def _tile_logits(hidden, head, start, width, temperature, softcap, dtype):
  """Returns scaled logits of a tile, `d logits / d (hidden @ head)`, and the tile of the head."""
  s, b = _axes(hidden, head)
  tile = jax.lax.dynamic_slice_in_dim(_bits(head), start, width, axis=-2).view(head.dtype)
  # Narrow hidden states meet a head of their own dtype, as they do in the sampler. With a wider
  # head, the same tokens would have other log-probs.
  tile = tile.astype(hidden.dtype)
  raw = jnp.einsum(f"{s}rd,{b}wd->{s}r{b}w", hidden, tile, preferred_element_type=dtype)
  capped, slope = _soft_cap_and_slope(raw, softcap)
  return capped / temperature, slope / temperature, tile


def _rebase(top, total, weighted, base):
  """Returns `sum e^(z - top)` and `sum e^(z - top) (z - top)` with `base` in place of `top`."""
  # A row whose logits have all been -inf keeps sums of 0, instead of inf - inf.
  shift = jnp.where(total > 0, top - base, 0.0)
  shrink = jnp.exp(shift)
  return total * shrink, (weighted + shift * total) * shrink


def _finite(top: jax.Array) -> jax.Array:
  """Returns the largest logits, `top`, with 0 for -inf, so that they can be subtracted."""
  return jnp.where(jnp.isneginf(top), 0.0, top)


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
    z, _, _ = _tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    new_top = jnp.maximum(top, z.max(-1))
    base = _finite(new_top)
    total, weighted = _rebase(top, total, weighted, base)
    shifted = z - base[..., None]
    p = jnp.exp(shifted)
    weighted += jnp.where(p > 0, p * shifted, 0.0).sum(-1)
    chosen += jnp.where(_is_token(tokens, head, start, width), z, 0.0).sum(-1)
    return new_top, total + p.sum(-1), weighted, chosen

  zeros = jnp.zeros((*tokens.shape, *head.shape[:-2]), dtype)
  carry = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
  top, total, weighted, chosen = _over_tiles(body, carry, hidden, head)
  if head.ndim == 3:
    tops, top = top, top.max(-1)
    total, weighted = _rebase(tops, total, weighted, _finite(top)[..., None])
    total, weighted, chosen = total.sum(-1), weighted.sum(-1), chosen.sum(-1)
  vocab = math.prod(head.shape[:-1])
  chosen = jnp.where((tokens >= 0) & (tokens < vocab), chosen, jnp.nan)
  logsumexp = top + jnp.log(total)
  entropy = jnp.log(total) - weighted / total
  return (chosen - logsumexp, entropy), (hidden, head, tokens, logsumexp, entropy)


def _tiled_backward(temperature, softcap, saved, cotangents):
  hidden, head, tokens, logsumexp, entropy = saved
  s, b = _axes(hidden, head)
  dtype = logsumexp.dtype
  per_row = (logsumexp, entropy, *cotangents)
  logsumexp, entropy, d_logp, d_entropy = (_broadcastable(each, head) for each in per_row)

  def body(carry, start, width):
    d_hidden, d_head = carry
    z, slope, tile = _tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    logps = z - logsumexp
    p = jnp.exp(logps)
    surprise = jnp.where(p > 0, p * (logps + entropy), 0.0)
    d_z = d_logp * (_is_token(tokens, head, start, width) - p) - d_entropy * surprise
    d_raw = (d_z * slope).astype(hidden.dtype)
    d_hidden += jnp.einsum(f"{s}r{b}w,{b}wd->{b}{s}rd", d_raw, tile, preferred_element_type=dtype)
    d_tile = jnp.einsum(f"{s}r{b}w,{s}rd->{s}{b}wd", d_raw, hidden, preferred_element_type=dtype)
    d_tile = _bits(d_tile.astype(head.dtype))
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_tile, start, axis=-2)

  carry = (
    jnp.zeros((*head.shape[:-2], *hidden.shape), dtype),
    _bits(jnp.empty((*hidden.shape[:-2], *head.shape), head.dtype)),
  )
  d_hidden, d_head = _over_tiles(body, carry, hidden, head)
  d_head = d_head.view(head.dtype)
  d_hidden, d_head = d_hidden.sum(0) if b else d_hidden, d_head.sum(0) if s else d_head
  return d_hidden.astype(hidden.dtype), d_head, None


_tiled.defvjp(_tiled_forward, _tiled_backward)
