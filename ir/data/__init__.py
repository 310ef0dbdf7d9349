"""Batches of data: read, checked, drawn at random."""
