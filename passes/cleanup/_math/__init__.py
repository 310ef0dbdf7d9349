"""Arithmetic of the cleanup passes."""
