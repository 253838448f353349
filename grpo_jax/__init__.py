"""GRPO in JAX: pure functions for advantages, log-probabilities and losses.

The names below take arrays and return arrays, with no model and no config. Importing this package
loads jax and numpy and touches no device. The choices of an algorithm that are not listed here are
in `grpo_jax.core`: `ratios`, `trust_regions`, `kl` and `corrections`. Training is in
`grpo_jax.train`, models are in `grpo_jax.models`, tasks in `grpo_jax.tasks`.
"""

__version__ = "0.1.0"  # the only place; setup.cfg reads it

from grpo_jax import testing
from grpo_jax.core.advantages import (
  ADVANTAGES,
  Advantage,
  batch_normalized,
  batch_whitened,
  centered_token_whitened,
  group_centered,
  group_normalized,
  leave_one_out,
  max_rl,
  multi_objective,
  process_advantages,
  right_only,
  token_whitened,
  turn_advantages,
  zero_advantages,
)
from grpo_jax.core.algorithms import ALGORITHMS, Algorithm, advantages
from grpo_jax.core.diagnosis import Finding, diagnose
from grpo_jax.core.divergences import head_divergence
from grpo_jax.core.kl import kl_k1, kl_k2, kl_k3
from grpo_jax.core.log_ratios import log_ratio_advantages, penalized_rewards
from grpo_jax.core.logprobs import head_logprobs, token_logprobs
from grpo_jax.core.losses import grpo_loss, policy_loss
from grpo_jax.core.masks import completion_mask, token_weights
from grpo_jax.core.preferences import preference_loss
from grpo_jax.core.values import gae, returns_whitened, value_loss

__all__ = [
  "ADVANTAGES",
  "ALGORITHMS",
  "Advantage",
  "Algorithm",
  "Finding",
  "advantages",
  "batch_normalized",
  "batch_whitened",
  "centered_token_whitened",
  "completion_mask",
  "diagnose",
  "gae",
  "group_centered",
  "group_normalized",
  "grpo_loss",
  "head_divergence",
  "head_logprobs",
  "kl_k1",
  "kl_k2",
  "kl_k3",
  "leave_one_out",
  "log_ratio_advantages",
  "max_rl",
  "multi_objective",
  "penalized_rewards",
  "policy_loss",
  "preference_loss",
  "process_advantages",
  "returns_whitened",
  "right_only",
  "testing",
  "token_logprobs",
  "token_weights",
  "token_whitened",
  "turn_advantages",
  "value_loss",
  "zero_advantages",
]
