"""Checkpoints whose weights are stored in codes: read as they are, and written."""
