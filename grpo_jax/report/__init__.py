"""Shows runs as a page: curves, completions token by token, comparisons. See `__main__`."""
