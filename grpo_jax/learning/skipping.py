"""Skips updates with a non-finite loss or gradient, or a gradient-norm spike."""

import dataclasses

import jax
import jax.numpy as jnp

SKIPPED = "update/skipped"  # metric: 1 for an update that was skipped, else 0
WARM_UP = 10  # accepted updates before gradient norms are compared with their running mean
MEMORY = 100  # updates in the running mean of the gradient norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """Statistics of past updates that decide whether the next one is accepted.

  Attributes:
    log_norm: running mean of the log gradient norm over about the last `MEMORY` accepted updates;
      updates with a gradient of 0 do not enter it.
    counted: number of updates in that mean, at most `MEMORY`.
    skipped: number of updates skipped in a row so far.
  """

  log_norm: jax.Array
  counted: jax.Array
  skipped: jax.Array

  @classmethod
  def new(cls) -> "History":
    """Returns the history before the first update."""
    return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))


def accept_update(
  history: History | None, loss: jax.Array, norm: jax.Array, spike: float
) -> tuple[jax.Array, History | None]:
  """Decides whether an update is accepted, and returns the decision and the new history.

  Args:
    history: None decides by the loss and the norm alone.
    loss, norm: loss and global gradient norm of the update; both must be finite.
    spike: largest accepted ratio of the norm to its running mean, `exp(history.log_norm)`, after
      `WARM_UP` accepted updates. 0 disables.

  Raises:
    ValueError: `spike` is given without a history.

  Example:
    >>> accept, history = accept_update(History.new(), jnp.float32(1), jnp.float32("nan"), 0.0)
    >>> bool(accept), int(history.skipped)
    (False, 1)
  """
  accept = jnp.isfinite(loss) & jnp.isfinite(norm)
  if history is None:
    if spike:
      raise ValueError(f"spike is {spike}, which needs a history: TrainState.create makes one")
    return accept, None
  if spike:
    is_spike = norm > spike * jnp.exp(history.log_norm)
    accept &= ~is_spike | (history.counted < WARM_UP)
  enters_mean = accept & (norm > 0)
  counted = jnp.minimum(history.counted + 1, MEMORY)
  log_norm = history.log_norm + (jnp.log(norm) - history.log_norm) / counted
  return accept, History(
    log_norm=jnp.where(enters_mean, log_norm, history.log_norm),
    counted=jnp.where(enters_mean, counted, history.counted),
    skipped=jnp.where(accept, 0, history.skipped + 1),
  )
