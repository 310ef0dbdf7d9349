"""Blocks of a transformer: feed-forward parts, and what a block does to its input."""
