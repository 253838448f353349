"""Scores with a learned reward, and learns one from preference pairs.

`RewardModel` is a reward function; `python -m grpo_jax.reward_model` trains one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from grpo_jax.reward_model.scoring import RewardModel

__all__ = ["RewardModel"]


def __getattr__(name: str) -> Any:
  """Loads `RewardModel` when it is asked for: the command first looks for its extra."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from grpo_jax.reward_model import scoring

  return getattr(scoring, name)
