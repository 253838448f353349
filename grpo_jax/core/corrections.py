"""Sampler corrections."""

from collections.abc import Callable

import jax.numpy as jnp

from grpo_jax.core.ratios import finite_exp

# Where the sampler's probabilities differ from the trainer's: weights for the objective, from the
# log-ratio trainer (before this update) minus sampler. They carry no gradient.


def _no_correction(log_ratio, mask):
  """The two distributions are taken to be the same."""
  return jnp.ones_like(log_ratio)


def _token_truncate(log_ratio, mask, *, correction_max):
  """`min(ratio, correction_max)` per token: truncated importance sampling (TIS)."""
  return jnp.minimum(finite_exp(log_ratio), correction_max)


def _token_mask(log_ratio, mask, *, correction_min, correction_max):
  """`ratio`, and 0 where it lies outside [correction_min, correction_max]: IcePop."""
  ratio = finite_exp(log_ratio)
  return jnp.where((ratio < correction_min) | (ratio > correction_max), 0.0, ratio)


def _sequence_mask(log_ratio, mask, *, correction_min, correction_max):
  """As `token_mask`, with one ratio for the whole sequence (the product over its tokens)."""
  total = jnp.sum(log_ratio, -1, keepdims=True)
  weight = _token_mask(total, mask, correction_min=correction_min, correction_max=correction_max)
  return jnp.broadcast_to(weight, log_ratio.shape)


CORRECTIONS: dict[str, Callable] = {
  "none": _no_correction,
  "token_truncate": _token_truncate,
  "token_mask": _token_mask,
  "sequence_mask": _sequence_mask,
}
