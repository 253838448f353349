"""Scores completions: calls reward functions, grades answers, and runs worker processes."""
