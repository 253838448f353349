"""Masks of completion tokens, and their weights in the loss."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array, as_float, as_mask, as_tokens, check_positive, lookup


def completion_mask(
  tokens: Int[Array, "... T"], eos_ids: int | Sequence[int] | Array
) -> Bool[Array, "... T"]:
  """Returns a mask that is true up to and including the first EOS, and everywhere without one.

  The mask depends on the position of the first EOS and never on a pad id, so a pad token with the
  id of EOS is handled: the EOS itself is trained on, and the tokens after it are not.

  Args:
    tokens: token ids of completions, without the prompt.
    eos_ids: every id that ends a completion. Empty means that completions never end.

  Raises:
    ValueError: `tokens` or `eos_ids` does not hold integers, or `tokens` has no axis.

  Example:
    >>> import jax.numpy as jnp
    >>> completion_mask(jnp.array([[5, 2, 2, 2], [2, 7, 7, 7], [5, 6, 7, 8]]), 2).astype(int)
    Array([[1, 1, 0, 0],
           [1, 0, 0, 0],
           [1, 1, 1, 1]], dtype=int32)
  """
  tokens = as_tokens("tokens", tokens)
  if tokens.ndim == 0:
    raise ValueError("tokens has shape (), expected at least one axis [..., T]")
  # NumPy gives an empty list a float dtype.
  eos = as_tokens("eos_ids", eos_ids if np.size(eos_ids) else np.array([], np.int32))
  is_eos = jnp.isin(tokens, eos).astype(jnp.int32)
  ended_before = jnp.cumsum(is_eos, axis=-1) - is_eos
  return ended_before == 0


def _sequence(mask: jax.Array, max_length: int | None) -> jax.Array:
  """Returns 1 / (number of sequences · own length)."""
  return 1.0 / (_lengths(mask)[..., None] * _sequences(mask))


def _token(mask: jax.Array, max_length: int | None) -> jax.Array:
  """Returns 1 / (tokens in the batch)."""
  return jnp.broadcast_to(1.0 / count_tokens(mask), mask.shape)


def _constant(mask: jax.Array, max_length: int | None) -> jax.Array:
  """Returns 1 / (number of sequences · max_length)."""
  if max_length is None:
    raise ValueError(
      "average='constant' needs max_length, the completion budget in tokens: "
      "the padded width of this batch would make the loss depend on padding"
    )
  check_positive("max_length", max_length)
  return jnp.broadcast_to(1.0 / (_sequences(mask) * max_length), mask.shape)


def _prompt(mask: jax.Array, max_length: int | None) -> jax.Array:
  """Returns 1 / (number of prompts · tokens of the prompt's group)."""
  if mask.ndim < 2:
    raise ValueError(
      f"average='prompt' needs a mask [..., G, T], whose groups it averages over; mask has shape "
      f"{mask.shape}"
    )
  prompts = max(math.prod(mask.shape[:-2]), 1)
  tokens = _lengths(mask).sum(-1)[..., None, None]
  return jnp.broadcast_to(1.0 / (tokens * prompts), mask.shape)


def _sequences(mask: jax.Array) -> int:
  return max(math.prod(mask.shape[:-1]), 1)


AVERAGES: dict[str, Callable] = {
  "sequence": _sequence,
  "token": _token,
  "constant": _constant,
  "prompt": _prompt,
}


def token_weights(
  mask: Bool[Array, "... T"], average: str | Callable, *, max_length: int | None = None
) -> Float[Array, "... T"]:
  """Returns the weight of each token, so that the loss is `sum(weights * per_token)`.

  | `average`  | weight of a completion token              | used by                             |
  |------------|-------------------------------------------|-------------------------------------|
  | `sequence` | 1 / (number of sequences · own length)    | GRPO (arXiv 2402.03300, eq. 3)      |
  | `token`    | 1 / (tokens in the batch)                 | DAPO (arXiv 2503.14476, eq. 8)      |
  | `constant` | 1 / (number of sequences · `max_length`)  | Dr. GRPO (arXiv 2503.20783, sec. 3) |
  | `prompt`   | 1 / (number of prompts · tokens of group) | ScaleRL (arXiv 2510.13786, sec. 3)  |

  Masked tokens weigh 0. Compute the weights once, from the mask of the whole global batch, and
  slice them: a sum needs no denominator, so micro-batches, devices and packing cannot change the
  loss. A sequence without tokens still counts as a sequence, and a group without tokens as a
  prompt.

  Args:
    mask: true on completion tokens. Any leading axes, usually [P, G, T].
    average: a key of the table, or a function `(mask, max_length) -> weights`.
    max_length: completion budget in tokens. `constant` requires it; the others ignore it.

  Raises:
    ValueError: the name is unknown, `max_length` is missing or not above 0, or `mask` is not a
      mask or has no axis.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[[True, True], [True, False]]])
    >>> token_weights(mask, "sequence").tolist()
    [[[0.25, 0.25], [0.5, 0.0]]]
  """
  mask = as_mask("mask", mask)
  if mask.ndim == 0:
    raise ValueError("mask has shape (), expected at least one axis [..., T]")
  weights = lookup("average", AVERAGES, average)(mask, max_length)
  return jnp.where(mask, weights, 0.0).astype(jnp.result_type(float))


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
  """Returns the mean of `values` where `mask` is true, 0 if it is nowhere. The rest may be NaN."""
  total = jnp.where(mask, values, 0.0).sum()
  return total / jnp.maximum(count_tokens(mask), 1)


def count_tokens(mask: Bool[Array, "..."]) -> Float[Array, ""]:
  """Returns the number of entries that are true, as a float.

  A batch may hold more than 2^31 tokens, where a sum of integers would wrap. Rows are counted in
  integers, so the result is exact below 2^24.

  Example:
    >>> import jax.numpy as jnp
    >>> float(count_tokens(jnp.array([[True, True], [True, False]])))
    3.0
  """
  return _lengths(mask).sum()


def high_entropy(
  entropy: Float[Array, "... T"], mask: Bool[Array, "... T"], share: float
) -> Bool[Array, "... T"]:
  """Returns a mask of the `share` of the tokens that have the highest entropy.

  The threshold is the (1 - share) quantile of the entropies of all tokens of the batch, with linear
  interpolation; a token on it counts.

  Args:
    entropy: of the distribution that each token was drawn from, in nats.
    mask: true on completion tokens; the others are false in the result.
    share: share of the tokens, above 0 and at most 1.

  References:
    Wang et al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939, section 4 (share 0.2).

  Raises:
    ValueError: a shape or dtype does not fit, or `share` is not above 0 and at most 1.

  Example:
    >>> import jax.numpy as jnp
    >>> entropy = jnp.array([[0.1, 2.0, 0.3], [0.9, 9.0, 9.0]])
    >>> mask = jnp.array([[True, True, True], [True, False, False]])
    >>> high_entropy(entropy, mask, 0.5).tolist()
    [[False, True, False], [True, False, False]]
  """
  entropy = as_float("entropy", entropy)
  mask = as_mask("mask", mask, entropy.shape)
  if not 0 < share <= 1:
    raise ValueError(f"share must be above 0 and at most 1, got {share}")
  if entropy.size == 0:
    return mask
  count = mask.sum()
  ranked = jnp.sort(jnp.where(mask, entropy, jnp.inf), axis=None)
  ranked = jnp.where(jnp.arange(ranked.size) < count, ranked, 0.0)
  place = (1.0 - share) * jnp.maximum(count - 1, 0)
  below = jnp.floor(place).astype(int)
  low, high = ranked[below], ranked[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
  return mask & (entropy >= low + (place - below) * (high - low))


def _lengths(mask: jax.Array) -> jax.Array:
  """Returns the number of entries of each row that are true, as floats."""
  counts = mask.sum(-1, dtype=jnp.int32) if mask.ndim else mask
  return counts.astype(jnp.result_type(float))
