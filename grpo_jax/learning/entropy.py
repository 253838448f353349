"""Adapts the coefficient of an entropy bonus from update to update."""

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.core.algorithms import Algorithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntropyControl:
  """Holds the coefficient of an adaptive entropy bonus.

  After each accepted update, `level` rises by `entropy_delta` if the entropy of that update was at
  most `entropy_target`, and falls by as much otherwise, to 0 at the least. The next update has the
  coefficient `level` in the first case, and no bonus in the second.

  Attributes:
    level: the number that rises and falls, at least 0; `Algorithm.entropy_bonus` at the start.
    coef: coefficient of the next update: `level`, or 0 while the entropy is above the target, as
      before the first update, whose entropy is unknown.

  References:
    Skywork-OR1, arXiv 2505.22312, section 3.2.2: target 0.2 nats, steps of 0.005. There the
    entropy that decides is that of the same step's rollout; here it is that of the update before,
    which its gradient has computed anyway, as in TRL.
  """

  level: jax.Array
  coef: jax.Array

  @classmethod
  def new(cls, algorithm: Algorithm) -> "EntropyControl | None":
    """Returns the control before the first update; None for a row whose bonus does not adapt."""
    if algorithm.entropy_target is None:
      return None
    return cls(jnp.float32(algorithm.entropy_bonus), jnp.float32(0))

  def after(
    self, algorithm: Algorithm, entropy: jax.Array, accepted: jax.Array
  ) -> "EntropyControl":
    """Returns the control after an update; a skipped one leaves it as it is.

    Args:
      entropy: mean entropy of the tokens of the update, in nats.

    Example:
      >>> from grpo_jax import Algorithm
      >>> row = Algorithm(entropy_bonus=0.01, entropy_target=0.25, entropy_delta=0.005)
      >>> control = EntropyControl.new(row).after(row, jnp.float32(0.2), jnp.bool_(True))
      >>> print(control.level, control.coef)
      0.015 0.015
      >>> control = control.after(row, jnp.float32(0.3), jnp.bool_(True))
      >>> print(control.level, control.coef)
      0.01 0.0
    """
    low = entropy <= algorithm.entropy_target
    step = jnp.where(low, algorithm.entropy_delta, -algorithm.entropy_delta)
    level = jnp.maximum(self.level + step, 0.0).astype(self.level.dtype)
    new = EntropyControl(level, jnp.where(low, level, 0.0))
    return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, self)
