"""Arithmetic of the adapters."""
