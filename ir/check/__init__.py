"""Comparison of two programs: errors, contracts, and the node where they part."""
