"""Updates that have gone wrong: which are skipped, and what is remembered to tell."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

SKIPPED = "update/skipped"  # metric: 1 for an update that was not made
WARM_UP = 10  # accepted updates before a gradient norm is compared with its history
MEMORY = 100  # updates that the history of the gradient norm reaches back


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["log_norm", "counted", "skipped"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class History:
  """What is remembered of past updates, to know an update that has gone wrong.

  Attributes:
    log_norm: mean log gradient norm of the accepted updates, the last `MEMORY` or so; those
      without any gradient are left out.
    counted: how many it is the mean of.
    skipped: updates skipped in a row, up to now.
  """

  log_norm: jax.Array
  counted: jax.Array
  skipped: jax.Array

  @classmethod
  def new(cls) -> "History":
    """Of no updates."""
    return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))


def accept_update(
  history: History | None, loss: jax.Array, norm: jax.Array, spike: float
) -> tuple[jax.Array, History | None]:
  """Whether an update is to be made, and the history with it."""
  ok = jnp.isfinite(loss) & jnp.isfinite(norm)
  if history is None:
    if spike:
      raise ValueError(f"spike is {spike}, which needs a history: TrainState.history=History.new()")
    return ok, None
  if spike:
    far = norm > spike * jnp.exp(history.log_norm)
    ok &= ~far | (history.counted < WARM_UP)
  counts = ok & (norm > 0)
  counted = jnp.minimum(history.counted + 1, MEMORY)
  moved = history.log_norm + (jnp.log(norm) - history.log_norm) / counted
  return ok, History(
    log_norm=jnp.where(counts, moved, history.log_norm),
    counted=jnp.where(counts, counted, history.counted),
    skipped=jnp.where(ok, 0, history.skipped + 1),
  )
