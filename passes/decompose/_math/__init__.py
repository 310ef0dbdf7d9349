"""Arithmetic of the decompositions."""
