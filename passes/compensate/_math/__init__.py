"""Arithmetic of the compensations."""
