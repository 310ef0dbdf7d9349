"""Weights as a smooth function of their coordinates, over all widths of a network."""
