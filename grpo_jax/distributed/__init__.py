"""Device meshes, sharding tables, and the hosts of a multi-process run."""
