"""Scores completions: graders, answer extraction, and the processes rewards run in."""
