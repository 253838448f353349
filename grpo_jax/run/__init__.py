"""Keeps the state of a run: checkpoints, work directory, metrics, progress, signals."""
