"""Exports the model of the benchmarks as a Hugging Face folder, which peers can load.

python -m benchmarks.peers.export_smollm2
"""

from benchmarks.alternate import MODEL, PEER_MODEL
from grpo_jax.export import export_model
from grpo_jax.models.load import load

if __name__ == "__main__":
  export_model(*load(MODEL), MODEL, PEER_MODEL)
