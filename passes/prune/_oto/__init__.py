"""Sparse optimizers of OTOv2 and their loop."""
