"""Generates completions on the device, with each prompt computed once per group."""

from grpo_jax.sampling.sampler import Generated, Sampler

__all__ = ["Generated", "Sampler"]
