"""Language models as pure functions of their parameters; flax.linen is used nowhere else."""
