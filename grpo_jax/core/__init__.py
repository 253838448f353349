"""Pure functions on arrays: jax, numpy and jaxtyping, nothing else."""
