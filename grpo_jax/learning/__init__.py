"""Turns a batch into optimizer updates."""

from grpo_jax.learning.batch import Batch
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.learning.updates import Learner, UpdateConfig

__all__ = ["Batch", "Learner", "TrainState", "UpdateConfig", "make_train_step"]
