"""Reads and writes model files: configs, weights, GGUF, hub sources. Imports no flax."""
