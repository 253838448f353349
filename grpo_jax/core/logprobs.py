"""Log-probabilities of given tokens, from logits or straight from hidden states."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.types import Array, as_float, as_mask, as_tokens, check_positive

# Elements of the largest logits tile that `head_logprobs` forms (float32: 16 MiB).
TILE_ELEMENTS = 2**22


def token_logprobs(
  logits: Float[Array, "... T V"], tokens: Int[Array, "... T"], *, temperature: float = 1.0
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
  """`logp = z[token] - logsumexp(z)` and `entropy = -sum p log p`, with `z = logits / temperature`.

  Both in nats, computed in float32 or wider. `logits[..., t, :]` must be the distribution that
  `tokens[..., t]` was drawn from: align before calling. Gradient flows from both results to
  `logits`. A logit of -inf is a token of probability 0; a token outside [0, V) gives NaN.

  Errors: a shape or dtype that does not fit, a temperature that is not above 0.

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
  # What is out of range is read as NaN; negative ids would count from the end.
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
  blocks: int = 1,
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
  """`token_logprobs(hidden @ head, tokens)` without ever forming `[..., T, V]`.

  The vocabulary is walked in tiles: the forward pass keeps a running log-sum-exp and, for the
  entropy, a running `sum p (z - max z)`; the backward pass recomputes each tile. Products
  accumulate in float32 also for bfloat16 inputs. Gradient flows from `logp` and `entropy` to
  `hidden` and `head`. A token outside [0, V) gives NaN.

  Args:
    hidden: final hidden states, `hidden[..., t, :]` predicting `tokens[..., t]`.
    head: output projection. It is read as `head.T`: a matrix stored as `[V, D]`, such as a tied
      embedding, goes in as `embedding.T` and is not copied.
    temperature: divides the logits, after the soft cap.
    where: rows to compute; elsewhere both results and all gradients are 0 and `hidden` may hold
      NaN. None computes all.
    softcap: `logits = softcap * tanh(logits / softcap)`, as Gemma 2 does.
    blocks: a tile takes equal shares of its columns from so many blocks of the vocabulary; it has
      to divide V. With the number of devices that `head` is split over along V, each slices what
      it holds; otherwise the head is sent for every tile. The results are the same.

  Returns:
    (logp, entropy), both `[..., T]`, nats, float32 or wider.

  Errors: a shape or dtype that does not fit, a temperature or soft cap that is not above 0, blocks
  that do not divide the vocabulary.

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
  if blocks < 1 or head.shape[1] % blocks:
    raise ValueError(f"blocks must divide the vocabulary of {head.shape[1]}, got {blocks}")
  tokens = as_tokens("tokens", tokens, hidden.shape[:-1])
  flat = hidden.reshape(-1, hidden.shape[-1])
  if where is not None:
    rows = as_mask("where", where, hidden.shape[:-1]).reshape(-1)
    flat = jnp.where(rows[:, None], flat, 0.0)
  logp, entropy = _tiled(
    flat, head.T.reshape(blocks, -1, head.shape[0]), tokens.reshape(-1), float(temperature), softcap
  )
  if where is not None:
    logp, entropy = jnp.where(rows, logp, 0.0), jnp.where(rows, entropy, 0.0)
  return logp.reshape(tokens.shape), entropy.reshape(tokens.shape)


def _tiles(rows: int, blocks: int, size: int) -> tuple[int, int]:
  """(number of whole tiles, columns of each block in one); what is left over is less than one."""
  target = max(max(TILE_ELEMENTS // max(rows, 1), 512) // blocks, 1)
  count = -(-size // target)
  return count, size // count


def _over_tiles(body, carry, rows: int, head: jax.Array):
  """`carry = body(carry, start, width)` over all tiles of a head in blocks, the widths static."""
  blocks, size, _ = head.shape
  count, width = _tiles(rows, blocks, size)
  # What is left over comes first: after the loop, XLA would copy the gradient of the head for it.
  if rest := size - count * width:
    carry = body(carry, count * width, rest)
  return jax.lax.fori_loop(0, count, lambda i, c: body(c, i * width, width), carry)


def _columns(head: jax.Array, start: jax.Array, width: int) -> jax.Array:
  """The tokens of a tile's columns."""
  blocks, size, _ = head.shape
  return (jnp.arange(blocks)[:, None] * size + (start + jnp.arange(width))[None]).reshape(-1)


def _bits(x: jax.Array) -> jax.Array:
  """16-bit floats as integers: XLA's CPU backend widens a whole bfloat16 array to slice it."""
  return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def _tile_logits(hidden, head, start, width, temperature, softcap, dtype):
  """Scaled logits of one tile, `d logits / d (hidden @ head)`, and the tile of the head."""
  tile = jax.lax.dynamic_slice_in_dim(_bits(head), start, width, axis=1).view(head.dtype)
  tile = tile.reshape(-1, head.shape[-1])
  raw = jnp.matmul(hidden, tile.T, preferred_element_type=dtype)
  if softcap is None:
    return raw / temperature, 1.0 / temperature, tile
  squashed = jnp.tanh(raw / softcap)
  return softcap * squashed / temperature, (1.0 - squashed**2) / temperature, tile


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _tiled(hidden, head, tokens, temperature, softcap):
  return _tiled_forward(hidden, head, tokens, temperature, softcap)[0]


def _tiled_forward(hidden, head, tokens, temperature, softcap):
  rows, vocab = hidden.shape[0], head.shape[0] * head.shape[1]
  dtype = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)

  def body(carry, start, width):
    top, total, weighted, chosen = carry
    z, _, _ = _tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    new_top = jnp.maximum(top, z.max(-1))
    # A row whose logits so far are all -inf keeps its sums at 0 instead of inf - inf.
    base = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
    shift = jnp.where(total > 0, top - base, 0.0)
    shrink, below = jnp.exp(shift), z - base[:, None]
    p = jnp.exp(below)
    weighted = (weighted + shift * total) * shrink + jnp.where(p > 0, p * below, 0.0).sum(-1)
    total = total * shrink + p.sum(-1)
    chosen += jnp.where(tokens[:, None] == _columns(head, start, width)[None], z, 0.0).sum(-1)
    return new_top, total, weighted, chosen

  zeros = jnp.zeros((rows,), dtype)
  carry = (jnp.full((rows,), -jnp.inf, dtype), zeros, zeros, zeros)
  top, total, weighted, chosen = _over_tiles(body, carry, rows, head)
  chosen = jnp.where((tokens >= 0) & (tokens < vocab), chosen, jnp.nan)
  logsumexp = top + jnp.log(total)
  entropy = jnp.log(total) - weighted / total
  return (chosen - logsumexp, entropy), (hidden, head, tokens, logsumexp, entropy)


def _tiled_backward(temperature, softcap, saved, cotangents):
  hidden, head, tokens, logsumexp, entropy = saved
  dtype = logsumexp.dtype
  d_logp, d_entropy = cotangents

  def body(carry, start, width):
    d_hidden, d_head = carry
    z, slope, tile = _tile_logits(hidden, head, start, width, temperature, softcap, dtype)
    logps = z - logsumexp[:, None]
    p = jnp.exp(logps)
    is_token = tokens[:, None] == _columns(head, start, width)[None]
    surprise = jnp.where(p > 0, p * (logps + entropy[:, None]), 0.0)
    d_z = d_logp[:, None] * (is_token - p) - d_entropy[:, None] * surprise
    d_raw = (d_z * slope).astype(hidden.dtype)
    d_hidden += jnp.matmul(d_raw, tile, preferred_element_type=dtype)
    d_tile = jnp.matmul(d_raw.T, hidden, preferred_element_type=dtype).astype(head.dtype)
    d_tile = _bits(d_tile).reshape(head.shape[0], width, -1)
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_tile, start, axis=1)

  carry = (jnp.zeros(hidden.shape, dtype), _bits(jnp.empty_like(head)))
  d_hidden, d_head = _over_tiles(body, carry, hidden.shape[0], head)
  return d_hidden.astype(hidden.dtype), d_head.view(head.dtype), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
