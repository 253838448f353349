"""Details of core that a mutant (`mutants.py`) got past the other tests."""
