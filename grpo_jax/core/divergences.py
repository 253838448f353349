"""Computes divergences between the whole distributions of a policy and of a teacher."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array
from grpo_jax.core.tiles import (
  broadcastable,
  check_head,
  finite_top,
  fold_head,
  fold_rows,
  gradients_of_tiles,
  over_tiles,
  row_shards_of,
  tile_logits,
)


def head_divergence(
  hidden: Float[Array, "*B T D"],
  head: Float[Array, "D V"],
  teacher_hidden: Float[Array, "*B T E"],
  teacher_head: Float[Array, "E V"],
  *,
  beta: float = 1.0,
  temperature: float = 1.0,
  where: Bool[Array, "*B T"] | None = None,
  softcap: float | None = None,
  teacher_softcap: float | None = None,
  vocab_shards: int = 1,
  row_shards: int = 1,
) -> Float[Array, "*B T"]:
  """Returns the generalized Jensen-Shannon divergence of each token's distribution to a teacher's.

  With p of the policy, q of the teacher and `m = beta q + (1 - beta) p`:

  | `beta`  | divergence                                                                |
  |---------|---------------------------------------------------------------------------|
  | 0       | KL(q, p): the policy covers all that the teacher may write                |
  | between | `beta KL(q, m) + (1 - beta) KL(p, m)`; 0.5 is the Jensen-Shannon divergence |
  | 1       | KL(p, q): the policy keeps to what the teacher finds probable             |

  The two ends are not limits of the middle, which is about `beta KL(q, p)` for small `beta` and
  about `(1 - beta) KL(p, q)` near 1.

  As in `head_logprobs`, the vocabulary is processed in tiles, and `[..., T, V]` never exists for
  either model: one pass for both normalizers, one for the sums, and one backward. The gradient with
  respect to the logits of the policy is `w p (log p - log m - KL(p, m))`, `w = 1 - beta` (1 for
  `beta=1`, where m is q), and `p - q` for `beta=0`. It flows to `hidden` and `head` only.

  Args:
    hidden: final hidden states of the policy.
    head: its output projection, read as `head.T`.
    teacher_hidden: those of the teacher at the same tokens; the width E may be another.
    teacher_head: the teacher's output projection, for the same vocabulary.
    beta: weight of the teacher in the mixture, in [0, 1].
    temperature: divides the logits of both, after the soft caps.
    where: true on the rows to compute. The others have results and gradients of 0, and may hold
      NaN. None computes all rows.
    softcap: caps the policy's logits by `soft_cap`; None leaves them as they are.
    teacher_softcap: caps the teacher's.
    vocab_shards, row_shards: as in `head_logprobs`.

  Returns:
    The divergence in nats, `[..., T]`, float32 or wider. It is infinite where the teacher excludes
    a token of the policy by a logit of -inf and `beta` is 1, and the other way round for 0.

  References:
    GKD, arXiv 2306.13649, section 3.1, with the ends of the usual implementations.

  Raises:
    ValueError: a shape or dtype does not fit, a number is out of range, `vocab_shards` does not
      divide V, or `row_shards` does not divide the number of rows.

  Example:
    >>> import jax.numpy as jnp
    >>> hidden, teacher = jnp.ones((2, 1)), jnp.ones((2, 1))  # p = (1/2, 1/2), q = (1/4, 3/4)
    >>> q = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> divergence = head_divergence(hidden, jnp.zeros((1, 2)), teacher, q)  # log(4 / 3) / 2
    >>> print(divergence.round(2).tolist())
    [0.14..., 0.14...]
  """
  if not 0 <= beta <= 1:
    raise ValueError(f"beta must be between 0 and 1, got {beta}")
  hidden, head = check_head(hidden, head, temperature, softcap, vocab_shards)
  try:
    teacher_hidden, teacher_head = check_head(
      teacher_hidden, teacher_head, temperature, teacher_softcap, vocab_shards
    )
  except ValueError as error:
    raise ValueError(f"of the teacher: {error}") from error
  if hidden.shape[:-1] != teacher_hidden.shape[:-1] or head.shape[1] != teacher_head.shape[1]:
    raise ValueError(
      f"hidden {hidden.shape} with head {head.shape}, and teacher_hidden {teacher_hidden.shape} "
      f"with teacher_head {teacher_head.shape}: the tokens and the vocabulary must be the same"
    )
  rows, row_axes = row_shards_of(hidden, where, row_shards)
  divergence = _tiled(
    fold_rows(hidden, rows, row_axes),
    fold_head(head, vocab_shards),
    fold_rows(teacher_hidden, rows, row_axes),
    fold_head(teacher_head, vocab_shards),
    float(beta),
    float(temperature),
    (softcap, teacher_softcap),
  ).reshape(-1)
  if rows is not None:
    divergence = jnp.where(rows, divergence, 0.0)
  return divergence.reshape(hidden.shape[:-1])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _tiled(hidden, head, teacher_hidden, teacher_head, beta, temperature, softcaps):
  """Returns the divergence [S, R] of hidden [S, R, D] and head [B, V / B, D] to the teacher's."""
  return _forward(hidden, head, teacher_hidden, teacher_head, beta, temperature, softcaps)[0]


def _forward(hidden, head, teacher_hidden, teacher_head, beta, temperature, softcaps):
  policy, teacher = (hidden, head), (teacher_hidden, teacher_head)
  dtype = jnp.promote_types(jnp.result_type(*policy, *teacher), jnp.float32)
  zeros = jnp.zeros((*hidden.shape[:-1], *head.shape[:-2]), dtype)

  def normalizers(carry, start, width):
    new = []
    for (top, total), model, softcap in zip(carry, (policy, teacher), softcaps):
      z, _, _ = tile_logits(*model, start, width, temperature, softcap, dtype)
      new_top = jnp.maximum(top, z.max(-1))
      base = finite_top(new_top)
      total = total * jnp.exp(jnp.where(total > 0, top - base, 0.0))
      new.append((new_top, total + jnp.exp(z - base[..., None]).sum(-1)))
    return tuple(new)

  empty = (jnp.full_like(zeros, -jnp.inf), zeros)
  normalizer = []
  for top, total in over_tiles(normalizers, (empty, empty), hidden, head):
    if head.ndim == 3:
      tops, top = top, top.max(-1)
      total = (total * jnp.exp(jnp.where(total > 0, tops - finite_top(top)[..., None], 0.0))).sum(
        -1
      )
    normalizer.append(broadcastable(finite_top(top) + jnp.log(total), head))

  def divergences(carry, start, width):
    logps = [
      tile_logits(*model, start, width, temperature, softcap, dtype)[0] - logsumexp
      for model, softcap, logsumexp in zip((policy, teacher), softcaps, normalizer)
    ]
    target, mixed = _targets(*logps, beta)
    to_policy, to_teacher = carry
    return to_policy + _kl(logps[0], mixed), to_teacher + _kl(logps[1], target)

  sums = over_tiles(divergences, (zeros, zeros), hidden, head)
  of_policy, of_teacher = (total.sum(-1) if head.ndim == 3 else total for total in sums)
  divergence = {0: of_teacher, 1: of_policy}.get(beta, beta * of_teacher + (1 - beta) * of_policy)
  return divergence, (hidden, head, teacher_hidden, teacher_head, normalizer, of_policy)


def _targets(logp, teacher_logp, beta):
  """Returns what the teacher and the policy are compared with: each other, or their mixture."""
  if beta in (0.0, 1.0):
    return logp, teacher_logp
  mixture = jnp.logaddexp(logp + math.log1p(-beta), teacher_logp + math.log(beta))
  return mixture, mixture


def _kl(logp, other):
  """Returns `sum p (log p - log other)` over the columns of a tile."""
  p = jnp.exp(logp)
  return jnp.where(p > 0, p * (logp - other), 0.0).sum(-1)


def _backward(beta, temperature, softcaps, saved, cotangent):
  hidden, head, teacher_hidden, teacher_head, normalizer, of_policy = saved
  dtype = of_policy.dtype
  of_policy, cotangent = broadcastable(of_policy, head), broadcastable(cotangent, head)

  def slopes(start, width):
    z, slope, tile = tile_logits(hidden, head, start, width, temperature, softcaps[0], dtype)
    teacher_z, _, _ = tile_logits(
      teacher_hidden, teacher_head, start, width, temperature, softcaps[1], dtype
    )
    logp, teacher_logp = z - normalizer[0], teacher_z - normalizer[1]
    p = jnp.exp(logp)
    if beta == 0:
      d_z = p - jnp.exp(teacher_logp)
    else:
      _, mixed = _targets(logp, teacher_logp, beta)
      weight = 1.0 if beta == 1 else 1.0 - beta
      d_z = weight * jnp.where(p > 0, p * (logp - mixed - of_policy), 0.0)
    return cotangent * d_z * slope, tile

  return *gradients_of_tiles(slopes, hidden, head, dtype), None, None


_tiled.defvjp(_forward, _backward)
