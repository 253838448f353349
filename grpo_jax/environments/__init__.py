"""Runs what a model writes: environments of several turns, tools, and untrusted code."""
