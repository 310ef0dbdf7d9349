"""Attention in a graph: its projections, its rotation, and both rebuilt with other widths."""
