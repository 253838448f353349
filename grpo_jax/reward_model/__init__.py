"""Scores completions with a learned reward, and learns one from preference pairs.

`RewardModel` is a reward function; `python -m grpo_jax.reward_model` trains one.
"""

from grpo_jax.reward_model.scoring import RewardModel

__all__ = ["RewardModel"]
