"""Pure functions on arrays. They need jax, numpy and jaxtyping, and nothing else."""
