"""Trains a reward model on preference pairs.

A reward model is a decoder with one output instead of a vocabulary (`params["score"]`), read at the
last token of a text. The two texts of a pair are a group: what they begin with is computed once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.core.preferences import preference_loss
from grpo_jax.distributed.mesh import Jitted, Sharding
from grpo_jax.learning.step import TrainState, make_step
from grpo_jax.models.protocol import Model, Params, score_of

CHOSEN, REJECTED = 0, 1  # of the axis of the two texts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """A batch of preference pairs.

  Attributes:
    prompts, prompt_mask: [P, N], what both texts of a pair begin with, left-padded; may be empty.
    completions: [P, 2, T], the rest of the chosen and of the rejected text, right-padded by at
      least one token.
    lengths: [P, 2], their numbers of tokens, 0 to T - 1.
    margins: [P], difference that the rewards should have, in reward units.
    weights: [P], 1 / (pairs of the whole batch), and 0 for pairs that are padding.
  """

  prompts: Int[Array, "P N"]
  prompt_mask: Bool[Array, "P N"]
  completions: Int[Array, "P 2 T"]
  lengths: Int[Array, "P 2"]
  margins: Float[Array, "P"]
  weights: Float[Array, "P"]

  @property
  def mask(self) -> Bool[Array, "P"]:
    """True for real pairs; metrics of micro-batches are averaged by their numbers."""
    return self.weights != 0


def pair_rewards(model: Model, params: Params, pairs: Pairs) -> Float[Array, "P 2"]:
  """Returns the rewards of the chosen and the rejected text of each pair.

  They are those of `grpo_jax.reward_model.RewardModel`: the output at the last token.

  Args:
    model: the functions of its trunk; `score` is used.
    params: parameters of the trunk, and `score` [1, D].
  """
  hidden = model.score(params, pairs.prompts, pairs.prompt_mask, pairs.completions)
  # hidden[p, g, t] has seen the tokens before slot t: at the length of a text, all of them.
  last = jnp.take_along_axis(hidden, pairs.lengths[..., None, None], axis=2)[:, :, 0]
  return score_of(params, last)


def make_rewards(
  model: Model, *, out_sharding: Sharding = None
) -> Callable[[Params, Pairs], Float[Array, "P 2"]]:
  """Returns the jitted `pair_rewards` of a model, `(params, pairs) -> rewards`.

  Args:
    out_sharding: sharding of the result; None leaves it to the compiler.
  """

  def rewards(params: Params, pairs: Pairs):
    return pair_rewards(model, params, pairs)

  return Jitted(rewards, lambda params, pairs: out_sharding)


def make_preference_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None = None,
  *,
  center: float = 0.0,
  micro_batches: int = 1,
  spike: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update of a reward model, `(state, pairs) -> (state, metrics)`.

  The state is donated.

  Args:
    center: as in `preference_loss`.
    schedule, micro_batches, spike: as in `learning.step.make_step`.

  References:
    Ouyang et al. 2022, arXiv 2203.02155, eq. 1; see `preference_loss`.
  """

  def loss(params: Params, pairs: Pairs, base_params: Params = None):
    rewards = pair_rewards(model, params, pairs)
    return preference_loss(
      rewards[:, CHOSEN],
      rewards[:, REJECTED],
      margin=pairs.margins,
      center=center,
      weights=pairs.weights,
    )

  return make_step(loss, optimizer, schedule, micro_batches=micro_batches, spike=spike)
