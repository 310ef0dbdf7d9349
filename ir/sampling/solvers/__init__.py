"""Solvers: arithmetic on (D, E) and declared state, one file per kind; `table` has the names."""
